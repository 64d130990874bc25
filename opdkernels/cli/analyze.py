"""inspect, analyze, overlap, trajectory and report."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from opdkernels.cli.exit_status import ExitStatus
from opdkernels.cli.options import Base, Json, Out, Quiet, Trained, command
from opdkernels.cli.output import emit
from opdkernels.config import AnalyzeOptions, InspectOptions, LineageOptions, OverlapOptions, TrajectoryOptions


@command(InspectOptions)
def inspect(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A checkpoint.", show_default=False)],
    trained: Annotated[
        str | None,
        typer.Argument(metavar="[TRAINED]", help="A second checkpoint, to match with the first.", show_default=False),
    ] = None,
    *,
    json: Json = False,
    **options: Any,
) -> None:
    """Read headers only: formats, dtypes, parameters, what matches, and the bytes, memory and time that analyze needs.

    Example: opdkernels inspect Qwen2.5-0.5B my-run/step-200
    """
    from opdkernels.analysis.headers import inspect
    from opdkernels.analysis.text import format_inspection

    result = inspect(base, trained, **options)
    emit(result, format_inspection(result), as_json=json)
    complete = not result.get("excluded") and result.get("coverage", {"sufficient": True})["sufficient"]
    raise typer.Exit(ExitStatus.DONE if complete else ExitStatus.PARTIAL)


@command(AnalyzeOptions)
def analyze(
    base: Base, trained: Trained, *, out: Out, quiet: Quiet = False, json: Json = False, **options: Any
) -> None:
    """Measure what training changed: sparsity, norms, near-zero coverage, the effect of rounding, spectra, subspaces.

    Writes tensors.parquet, groups.parquet, spectra.parquet, geometry.parquet, summary.json and report.html to the
    output folder. Run the same command again to resume an interrupted run. Counting takes a second or two per billion
    coordinates; spectra take minutes or more: `inspect` estimates the time, and `--spectra off` skips them.

    With `--device cuda`, files stream through pinned memory to the GPU: reading, copying and counting overlap.

    Example: opdkernels analyze Qwen2.5-0.5B my-run/step-200 -o out
    """
    from opdkernels.analysis.text import format_analysis
    from opdkernels.api import analyze
    from opdkernels.progress import reporting

    with reporting(quiet) as progress:
        result = analyze(base, trained, out, progress=progress, **options)
    emit(result.summary, format_analysis(result), as_json=json, quiet=quiet)
    raise typer.Exit(result.exit_status)


@command(LineageOptions)
def lineage(
    child: Annotated[str, typer.Argument(metavar="CHILD", help="The trained checkpoint.", show_default=False)],
    candidates: Annotated[
        list[str],
        typer.Argument(metavar="CANDIDATE...", help="Checkpoints that may be its base.", show_default=False),
    ],
    *,
    json: Json = False,
    **options: Any,
) -> None:
    """Find out which of several checkpoints another one was trained from: distance and equal bits of sampled tensors.

    The exit status is 3 if no candidate is plausible.

    Example: opdkernels lineage my-run/step-200 Qwen2.5-0.5B Qwen2.5-0.5B-Instruct
    """
    from opdkernels.analysis.text import format_lineage
    from opdkernels.api import lineage

    result = lineage(child, *candidates, **options)
    emit(result, format_lineage(result), as_json=json)
    raise typer.Exit(ExitStatus.DONE if result["base"] is not None else ExitStatus.PARTIAL)


@command(OverlapOptions)
def overlap(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Checkpoint that the runs were trained from.", show_default=False)
    ],
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="2 to 16 trained checkpoints.", show_default=False)
    ],
    *,
    out: Out,
    quiet: Quiet = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Compare which coordinates several runs from one base changed: coverage, Jaccard index and chance levels.

    Chance levels are uniform and magnitude-conditioned (coordinates of the same |W|).

    Example: opdkernels overlap Qwen2.5-0.5B opd-run rl-run -o out --strata row,column
    """
    from opdkernels.analysis.text import format_overlap
    from opdkernels.api import overlap
    from opdkernels.progress import reporting

    with reporting(quiet) as progress:
        result = overlap(base, *runs, out=out, progress=progress, **options)
    emit(result.summary, format_overlap(result), as_json=json, quiet=quiet)
    raise typer.Exit(result.exit_status)


@command(TrajectoryOptions)
def trajectory(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Checkpoint that the run was trained from.", show_default=False)
    ],
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="CHECKPOINT...", help="Two or more checkpoints of the run.", show_default=False),
    ],
    *,
    out: Out,
    quiet: Quiet = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Follow a run over its checkpoints: sparsity, norm, stable rank, and when final directions and coordinates appear.

    Checkpoints are sorted by their steps, from `--steps`, names (checkpoint-200, step_0040) or trainer_state.json.
    Those without a step come last and get no number. The output folder gets the results of analyze for each checkpoint
    in steps/, trajectory.parquet and report.html. Run the same command with more checkpoints to extend the run.
    factors/ caches factorisations of the base and may be deleted.

    Example: opdkernels trajectory Qwen2.5-0.5B my-run/checkpoint-* -o out
    """
    from opdkernels.analysis.text import format_trajectory
    from opdkernels.api import trajectory
    from opdkernels.progress import reporting

    with reporting(quiet) as progress:
        result = trajectory(base, *checkpoints, out=out, progress=progress, **options)
    emit(result.summary, format_trajectory(result), as_json=json, quiet=quiet)
    raise typer.Exit(result.exit_status)


@command()
def report(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder of a finished run.", show_default=False)],
) -> None:
    """Write report.html again from the tables of a finished run, and print its path.

    Example: opdkernels report out
    """
    from opdkernels.api import write_report

    typer.echo(write_report(out))
