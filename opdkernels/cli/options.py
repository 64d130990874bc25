"""Options of commands, generated from the models in opdkernels/config.py; arguments and options that no model has."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
import typer
from click.core import ParameterSource
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from opdkernels.cli.exit_status import exit_on_error

OUTPUT = "Output"  # the last panel of --help
MAX_SHOWN_BOUND = 2**53  # larger bounds are not shown in --help
METAVARS: dict[Any, str] = {click.types.IntParamType: "INT", click.IntRange: "INT", click.FloatRange: "FLOAT"}

Base = Annotated[str, typer.Argument(metavar="BASE", help="Checkpoint before training.", show_default=False)]
Trained = Annotated[str, typer.Argument(metavar="TRAINED", help="Checkpoint after training.", show_default=False)]
Out = Annotated[
    str,
    typer.Option(
        "--out",
        "-o",
        metavar="FOLDER",
        help="Run directory; the same command resumes an interrupted run.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
OutFile = Annotated[
    str,
    typer.Option("--out", "-o", metavar="FILE", help="File to write.", show_default=False, rich_help_panel=OUTPUT),
]
NewFolder = Annotated[
    str,
    typer.Option(
        "--out",
        "-o",
        metavar="FOLDER",
        help="Folder to write, new or empty.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Print no progress and no summary; --json still prints.", rich_help_panel=OUTPUT
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=OUTPUT)]


def command(
    *models: type[BaseModel], config_file: bool = False, demo: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command: adds an option for each field of the models, and ends the process properly on errors.

    The command gets the options that are on the command line as keyword arguments, and not those left at their default.

    Args:
        models: Options models (opdkernels/config.py).
        config_file: Whether a configuration file may also give values, so that no option is required.
        demo: Values that replace the defaults if there is no configuration file; the help text names them.

    Returns:
        The decorator.
    """
    fields = {name: field for model in models for name, field in model.model_fields.items()}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        keywords = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        options = [parameter_of(name, field, config_file, (demo or {}).get(name)) for name, field in fields.items()]
        panels = [get_args(option.annotation)[1].rich_help_panel for option in options]
        before = [option for option, panel in zip(options, panels, strict=True) if panel != OUTPUT]
        after = [option for option, panel in zip(options, panels, strict=True) if panel == OUTPUT]
        every = [context, *positional, *before, *keywords, *after]

        @functools.wraps(function)
        def run(context: typer.Context, **values: Any) -> None:
            for option in options:
                if context.get_parameter_source(option.name) is ParameterSource.DEFAULT:
                    del values[option.name]
            with exit_on_error():
                function(**values)

        run.__doc__ = reflow(function.__doc__ or "")
        run.__signature__ = signature.replace(parameters=every)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in every}
        return run

    return decorate


def reflow(doc: str) -> str:
    """A docstring with one line per paragraph, for a help text of any width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(doc).split("\n\n"))


def parameter_of(name: str, field: FieldInfo, config_file: bool, demo: Any) -> inspect.Parameter:
    """The keyword parameter that typer turns into the option of a field."""
    flag = f"--{name.replace('_', '-')}"
    extra: Any = field.json_schema_extra or {}
    is_flag = field.annotation is bool
    if is_flag and (config_file or field.default):
        flag += f"/--no-{name.replace('_', '-')}"
    default = None if field.is_required() else field.default
    kind = None if is_flag else click_type(field)
    option = typer.Option(
        flag,
        help=f"{field.description} Without a configuration file: {text_of(demo)}." if demo else field.description,
        metavar=extra.get("metavar") or METAVARS.get(type(kind)),
        click_type=kind,
        show_default=default is not None and default != "" and default != () and (config_file or default is not False),
        rich_help_panel=extra.get("panel"),
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default if default is None or is_flag else text_of(default),
        annotation=Annotated[bool if is_flag else str | None, option],
    )


def value_type(field: FieldInfo) -> Any:
    """The type of a field's value, without None."""
    annotation: Any = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
    return annotation


def click_type(field: FieldInfo) -> click.ParamType:
    """The type that checks the option on the command line: choices of a Literal, ranges of numbers, otherwise text."""
    kind = value_type(field)
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if kind not in (int, float) or any(isinstance(item, BeforeValidator) for item in field.metadata):
        return click.STRING  # its model parses it
    bounds: dict[str, Any] = {}
    for constraint in field.metadata:
        for name, side, is_open in (
            ("ge", "min", False),
            ("gt", "min", True),
            ("le", "max", False),
            ("lt", "max", True),
        ):
            bound = getattr(constraint, name, None)
            if bound is not None and abs(bound) <= MAX_SHOWN_BOUND:
                bounds |= {side: bound, f"{side}_open": is_open}
    if not bounds:
        return click.INT if kind is int else click.FLOAT
    return click.IntRange(**bounds) if kind is int else click.FloatRange(**bounds)


def text_of(value: Any) -> str:
    """A value as the command line takes it.

    >>> text_of((0.9, 0.999)), text_of("4GB")
    ('0.9,0.999', '4GB')
    """
    if isinstance(value, tuple):
        return ",".join(map(text_of, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
