"""The command line. No logic: a command passes its options to a function of the package and prints the result."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import click
import typer
from click.exceptions import NoArgsIsHelpError

from opdkernels.cli import analyze, bench, distill, doctor, mask, patch, push
from opdkernels.cli.exit_status import ExitStatus, fail
from opdkernels.errors import printable
from opdkernels.version import __version__

SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "rich",
}
app = typer.Typer(name="opdkernels", **SETTINGS)
mask_app = typer.Typer(
    help="Create, combine and describe masks: which coordinates of a model are active. Files are safetensors.",
    **SETTINGS,
)
patch_app = typer.Typer(
    help="Store what training changed as one file, and restore the trained checkpoint from it, bit for bit.",
    **SETTINGS,
)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"opdkernels {__version__}")
        raise typer.Exit


@app.callback()
def opdkernels(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Measure what post-training changed in a model's weights.

    Checkpoints are folders, files (safetensors or PyTorch) or hub ids (org/name@revision).

    Exit status: 0 done, 2 usage, 3 done in part, 4 bad input, 130 interrupted.

    Done in part: too little was compared, or tensors were excluded, failed or hold NaN or Inf.
    """


for function, panel in (
    (analyze.inspect, "Measure"),
    (analyze.analyze, "Measure"),
    (analyze.lineage, "Measure"),
    (analyze.overlap, "Measure"),
    (analyze.trajectory, "Measure"),
    (analyze.report, "Measure"),
    (distill.distill, "Train"),
    (distill.experiment, "Train"),
    (patch.graft, "Select and transfer"),
    (push.push, "Select and transfer"),
    (doctor.doctor, "Setup"),
    (bench.bench, "Setup"),
):
    app.command(rich_help_panel=panel)(function)
app.add_typer(mask_app, name="mask", rich_help_panel="Select and transfer")
app.add_typer(patch_app, name="patch", rich_help_panel="Select and transfer")
for function in (
    mask.changed,
    mask.top_changed,
    mask.near_zero,
    mask.principal,
    mask.safe,
    mask.random,
    mask.magnitude_matched,
    mask.combine,
    mask.stats,
    mask.compare,
):
    mask_app.command()(function)
for function in (patch.create, patch.apply, patch.info):
    patch_app.command()(function)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process with its exit status; an error or warning is one line on stderr."""
    warnings.formatwarning = lambda message, *where: f"opdkernels: warning: {printable(str(message))}\n"
    try:
        status = app(arguments, standalone_mode=False)
    except NoArgsIsHelpError as error:
        error.show()
        status = ExitStatus.USAGE
    except click.ClickException as error:
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "opdkernels"
        message = " ".join(error.format_message().split()).rstrip(".")
        message = re.sub(r"Did you mean .*(?=Did you mean )", "", message)  # click and Typer both add a suggestion
        fail(f"{message}; see {command} --help", ExitStatus.USAGE)
    sys.exit(status or ExitStatus.DONE)
