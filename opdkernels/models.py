"""Strict models of the content of files that a user hands in. Imports pydantic, which a machine that only runs the
kernels need not have."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from opdkernels.errors import InputError, UsageError, printable

T = TypeVar("T")


class Strict(BaseModel):
    """Base of the models of files: no value is converted to another type, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def validate(form: type[T] | TypeAdapter[T], value: Any, shown: str, *, remedy: str) -> T:
    """Returns a value as a model of pydantic.

    Args:
        form: The model or the type that the value must have.
        value: Content of a file, such as the result of `read_json`.
        shown: What it is, for messages, such as the printable path.
        remedy: What to do if it is not valid.

    Raises:
        InputError: It is not valid; one line names the first invalid entry and the reason.

    Examples:
        >>> class Step(Strict):
        ...     step: int
        >>> validate(Step, {"step": "3"}, "state.json", remedy="train again")
        Traceback (most recent call last):
        opdkernels.errors.InputError: state.json is not valid: step: Input should be a valid integer; train again
    """
    adapter: TypeAdapter[T] = form if isinstance(form, TypeAdapter) else TypeAdapter(form)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, (InputError, UsageError)):  # raised by a validator, wrapped by pydantic
            raise cause from None
        where = ".".join(str(part)[:80] for part in first["loc"])
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise InputError(f"{shown} is not valid: {printable(reason[:400])}; {remedy}") from None
    except RecursionError:
        raise InputError(f"{shown} is not valid: it is nested too deeply; {remedy}") from None
