"""The public functions that write a run and its page."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdkernels import report
from opdkernels.analysis import overlap as overlaps
from opdkernels.analysis import run
from opdkernels.analysis import trajectory as trajectories
from opdkernels.analysis.overlap import Overlaps, run_overlap
from opdkernels.analysis.result import Analysis, load
from opdkernels.analysis.trajectory import Trajectory
from opdkernels.checkpoint.open import checkpoint_bytes
from opdkernels.compat import paper_csv
from opdkernels.config import AnalyzeOptions, OverlapOptions, TrajectoryOptions, validate_options
from opdkernels.errors import InputError, printable
from opdkernels.progress import Progress
from opdkernels.runs.run_dir import load_finished

if TYPE_CHECKING:
    from opdkernels.distillation.options import DistillOptions

SMALL = 100 * 10**6  # bytes of a checkpoint whose spectra take seconds


def analyze(
    source: str | os.PathLike[str],
    trained: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Analysis:
    """Analyse what training changed between two checkpoints, coordinate by coordinate.

    source, trained: folders, files or hub ids. out: the folder of the run, where tables, summary and report go and from
    which a killed run goes on; without it nothing is written. progress: called with bytes done, bytes in all and the
    tensor at hand. options: the fields of `opdkernels.config.AnalyzeOptions` (memory="4GB", threads=None, io="auto",
    revision=None, allow_missing=False, device="cpu", spectra="exact", csv=False, paper_csv=False, report=True,
    overwrite=False); device="cuda" counts on a GPU, to the same bits.

    Raises InputError for input that cannot be read and a GPU that is not there, UsageError for options that make no sense. Source of the figures:
    arXiv 2606.13657; docs/outputs.md defines each.
    """
    chosen = validate_options(AnalyzeOptions, options)
    write_more = paper_csv.write if chosen.paper_csv else None
    result = run.analyze(source, trained, out, chosen, progress or (lambda done, total, name: None), write_more)
    if result.path is not None and chosen.report:
        report.write(result.path, result)
    return result


def overlap(
    base: str | os.PathLike[str],
    *runs: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Overlaps:
    """Compare which coordinates 2 to 16 runs of one source changed, with chance alone beside it.

    base: the source; runs: checkpoints trained from it; each a folder, a file or a hub id. out: the folder to write to;
    without it nothing is written. options: the fields of `opdkernels.config.OverlapOptions` (atol=1e-5, strata=(),
    memory="4GB", threads=None, io="auto", revision=None, allow_missing=False, csv=False, report=True, overwrite=False).

    Raises InputError for input that cannot be read, UsageError for options that make no sense. Source of coverage and
    uniform chance: arXiv 2606.13657; docs/outputs.md defines each column.
    """
    chosen = validate_options(OverlapOptions, options)
    result = run_overlap(base, runs, out, chosen, progress or (lambda done, total, name: None))
    if result.path is not None and chosen.report:
        report.write_overlap(result.path, result)
    return result


def trajectory(
    base: str | os.PathLike[str],
    *checkpoints: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Trajectory:
    """Follow a run over two or more of its checkpoints: every figure of `analyze` at each, and how far each is the last.

    base: the source; checkpoints: taken in the order of the steps in their names (checkpoint-200, step_0040), those without
    last. out: the folder to write to, each checkpoint's own analysis in steps/ below it; the same call with more
    checkpoints goes on, and what depends on the source alone is kept in factors/ (a fifth to four fifths of the source's
    size, the more the squarer its matrices; free to delete between runs). options: the fields of `opdkernels.config.TrajectoryOptions` (spectra="exact", atol=1e-5, memory="4GB",
    threads=None, io="auto", revision=None, allow_missing=False, csv=False, report=True, overwrite=False).

    Raises InputError for input that cannot be read, UsageError for options that make no sense. docs/outputs.md defines
    each column.
    """
    chosen = validate_options(TrajectoryOptions, options)
    result = trajectories.run_trajectory(base, checkpoints, out, chosen, progress or (lambda done, total, name: None))
    if result.path is not None and chosen.report:
        for folder in result.folders:
            report.write(folder, load(folder))
        report.write_trajectory(result.path, result)
    return result


def experiment(
    name: str,
    options: DistillOptions,
    out: str | os.PathLike[str],
    *,
    seeds: int = 1,
    density: float | None = None,
    arms: Sequence[str] = (),
    quiet: bool = True,
) -> dict[str, Any]:
    """Run an experiment on what on-policy distillation does to weights, analyse the pair that it makes, and write its page.

    name: masks, sgd, on-policy, precision, trajectory, subspace or grafts; options: of the runs; out: the folder, where
    finished runs are not made again; density: how large masks are, 0 for all that a run changed visibly, None for the
    experiment's own. Returns what results.json holds.

    Raises InputError for input that cannot be read, UsageError for options that make no sense.
    """
    from opdkernels.experiments.runner import reference_pair, run_experiment

    folder = Path(out)
    result = run_experiment(name, options, folder, seeds=seeds, density=density, arms=arms, quiet=quiet)
    start, end = reference_pair(folder, result)
    spectra = "exact" if checkpoint_bytes(end) < SMALL else "off"
    analyze(start, end, folder / "analysis", spectra=spectra, overwrite=True)
    report.write_experiment(folder, {**result, "analysis": True})
    return result


def read_results(folder: Path) -> dict[str, Any]:
    """What an experiment found. Raises InputError where its file cannot be read."""
    try:
        found = json.loads((folder / "results.json").read_text())
        if "experiment" in found and "rows" in found:
            return found
    except (OSError, ValueError, TypeError):
        pass
    raise InputError(
        f"{printable(str(folder))}/results.json is not what an experiment writes; run the experiment again"
    )


def write_report(out: str | os.PathLike[str]) -> Path:
    """Write report.html again from the tables of a finished run, of any command. Raises InputError where there is none."""
    folder = Path(out)
    if (folder / "results.json").is_file():
        return report.write_experiment(
            folder, {**read_results(folder), "analysis": (folder / "analysis" / "report.html").exists()}
        )
    run = load_finished(folder)
    if run["command"] == "overlap":
        return report.write_overlap(folder, overlaps.load(folder, run))
    if run["command"] == "trajectory":
        return report.write_trajectory(folder, trajectories.load(folder, run))
    return report.write(folder, load(folder))
