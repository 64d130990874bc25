"""bench."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from opdkernels.cli.exit_status import ExitStatus
from opdkernels.cli.options import OUTPUT, Json, Quiet, command
from opdkernels.cli.output import emit
from opdkernels.config import BenchOptions
from opdkernels.errors import printable


@command(BenchOptions)
def bench(
    *,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder to write, new or empty: benchmark.json, table.md, chart.svg and report.html.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Measure every kernel family on this machine: time, fraction of the machine's measured limit, speed over PyTorch.

    Implementations take turns, and times are medians. Each kernel is compared with its reference first. Nothing is read
    or downloaded. It takes about a minute and at most 2 GB of memory on two cores; on a GPU at most half of its free
    memory. With --quick it takes seconds.

    Exit status 3: an implementation could not be measured; the others are in the table.

    Example: opdkernels bench --device cuda --against eager,compile -o bench
    """
    from opdkernels.api import bench
    from opdkernels.benchmark.result import failed
    from opdkernels.benchmark.text import format_text
    from opdkernels.progress import steps

    result = bench(out, progress=steps(quiet), **options)
    text = format_text(result)
    emit(result, text if out is None else [*text, f"written to {printable(out)}"], as_json=json, quiet=quiet)
    raise typer.Exit(ExitStatus.PARTIAL if failed(result) else ExitStatus.DONE)
