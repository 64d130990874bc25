"""The options of each command: one model, shared by the command line and the Python API."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from opdkernels.errors import InputError, UsageError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
LEAST_MEMORY = 64 * 10**6


def parse_bytes(text: str | int) -> int:
    """A size in bytes from a number with a unit.

    >>> parse_bytes("2GB"), parse_bytes("512MiB")
    (2000000000, 536870912)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(text).upper())
    if not found:
        raise ValueError(f"{text!r} is not a size; write it like 2GB or 512MiB")
    if len(found[1]) > 18:
        raise ValueError(f"{text!r} is too large; write it like 2GB or 512MiB")
    size = int(float(found[1]) * UNITS[found[2]])
    if size < LEAST_MEMORY:
        raise ValueError(f"{text} is too little; 64MB is the least")
    return size


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


def device_name(text: str) -> str:
    """cpu, cuda or cuda:N."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", str(text)):
        raise ValueError("give cpu, cuda or cuda:1")
    return str(text)


def device_or_auto(text: str) -> str:
    return text if text == "auto" else device_name(text)


DeviceName = Annotated[str, BeforeValidator(device_name)]
DeviceOrAuto = Annotated[str, BeforeValidator(device_or_auto)]


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    io: Literal["auto", "mmap", "read"] = Field(
        "auto", description="How bytes come in: mapped files, positioned reads, or the better of the two for the disk."
    )
    revision: str | None = Field(None, description="Revision of hub ids.")
    allow_missing: bool = Field(False, description="Go on without shards that the index lists and the folder lacks.")

    @property
    def opening(self) -> dict[str, Any]:
        """The options of `open_checkpoint`."""
        return {"io": self.io, "revision": self.revision, "allow_missing": self.allow_missing}


class AnalyzeOptions(Options):
    memory: Bytes = Field(4 * 10**9, description="Most memory to use, such as 2GB; mapped files do not count.")
    threads: int | None = Field(
        None, ge=1, le=4096, description="Threads of the kernels; torch's own number if not given."
    )
    device: DeviceName = Field(
        "cpu", description="cpu, cuda or cuda:N: where coordinates are counted and Gram matrices made."
    )
    spectra: Literal["exact", "topk", "off"] = Field(
        "exact",
        description="Spectra of every matrix and its place in the geometry of the source: exact; topk, the top of the update's "
        "spectrum alone, with bounds and in less memory; or off.",
    )
    csv: bool = Field(False, description="Also write the tables as CSV.")
    paper_csv: bool = Field(
        False, description="Also write the files of the paper's analysis script (tensor_metrics.csv and others)."
    )
    report: bool = Field(True, description="Write report.html.")
    overwrite: bool = Field(False, description="Replace another run in the output folder.")


class OverlapOptions(Options):
    atol: float = Field(
        1e-5, ge=0, le=1e30, description="A coordinate changed where visible |delta| exceeds this (rounded to bf16)."
    )
    strata: tuple[Literal["row", "column"], ...] = Field(
        (), description="Also condition chance on |W| within the rows or columns of each matrix."
    )
    memory: Bytes = Field(4 * 10**9, description="Most memory to use, such as 2GB; mapped files do not count.")
    threads: int | None = Field(
        None, ge=1, le=4096, description="Threads of the kernels; torch's own number if not given."
    )
    csv: bool = Field(False, description="Also write overlap.csv.")
    report: bool = Field(True, description="Write report.html.")
    overwrite: bool = Field(False, description="Replace another run in the output folder.")


class TrajectoryOptions(Options):
    memory: Bytes = Field(4 * 10**9, description="Most memory to use, such as 2GB; mapped files do not count.")
    threads: int | None = Field(
        None, ge=1, le=4096, description="Threads of the kernels; torch's own number if not given."
    )
    spectra: Literal["exact", "topk", "off"] = Field("exact", description="As of analyze, for every checkpoint.")
    atol: float = Field(
        1e-5,
        ge=0,
        le=1e30,
        description="The changed set: coordinates whose visible |delta| exceeds this (rounded to bf16).",
    )
    csv: bool = Field(False, description="Also write the tables as CSV.")
    report: bool = Field(True, description="Write report.html, and one for every checkpoint.")
    overwrite: bool = Field(False, description="Replace another run in the output folder.")


Model = TypeVar("Model", bound=BaseModel)


def validate_options(model: type[Model], values: dict) -> Model:
    """The options, or a UsageError of one line that names the option, its value and what is allowed."""
    from pydantic import ValidationError

    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, (InputError, UsageError)):  # raised by a validator, wrapped by pydantic
            raise cause from None
        name = str(first["loc"][0]) if first["loc"] else "options"
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, model.model_fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(model.model_fields)}"
            raise UsageError(f"there is no option {name!r}; {hint}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"option {name} is {first['input']!r}: {message}" if first["loc"] else message) from None
