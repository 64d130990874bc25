"""`trajectory`: the checkpoints of one run against their base: which coordinates and directions change when, and
which stay.

Every checkpoint gets all metrics of `analyze`, and those that need several checkpoints: how its set of changed
coordinates covers that of the last checkpoint T and vice versa, the cosine of its update with the last one, Sim_K of
their top directions, and what changed since the previous checkpoint. What depends only on the base is computed once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from opdkernels.analysis.analyze import describe_pair, finalize
from opdkernels.analysis.checkpoint_steps import CheckpointStep, order_checkpoints
from opdkernels.analysis.common_tensors import Elements, base_elements, common_coverage, match_in_all
from opdkernels.analysis.factors import FactorCache
from opdkernels.analysis.frames import format_path, to_pandas
from opdkernels.analysis.result import Analysis
from opdkernels.analysis.run_summaries import TrajectorySummary, read_run_summary
from opdkernels.analysis.spectra_schedule import RunJob, SpectraConfig, compute_spectra, tally_statuses
from opdkernels.analysis.tallying import tally_all, torch_threads
from opdkernels.analysis.trajectory_counts import TensorTotals, count_trajectories
from opdkernels.analysis.trajectory_tables import model_metrics, step_rows
from opdkernels.checkpoint.match import Pair, match
from opdkernels.checkpoint.open import open_checkpoint, repeated_path
from opdkernels.config import AnalyzeOptions, TrajectoryOptions
from opdkernels.errors import UsageError, printable
from opdkernels.files import write_json
from opdkernels.formatting import percent
from opdkernels.metrics import groups
from opdkernels.metrics.groups import Row
from opdkernels.metrics.similarity import Similarity, open_similarities
from opdkernels.metrics.spectra import open_spectra
from opdkernels.metrics.tallies import SCHEMA_VERSION, TallyRecord, open_tallies
from opdkernels.outputs import ANALYSIS, RUN_FILE, read_json_object
from opdkernels.progress import Progress
from opdkernels.runs.run_dir import describe_run, open_run_dir
from opdkernels.runs.store import ArrowStore

if TYPE_CHECKING:
    import pandas as pd


@dataclass(repr=False)
class Trajectory:
    """The checkpoints of one run.

    Attributes:
        table: One row per checkpoint, group and view; columns in docs/outputs.md.
        summary: The whole model, checkpoint by checkpoint.
        run: The content of run.json.
        path: The run directory, with the analysis of each checkpoint in `folders`; or None.
    """

    table: pa.Table
    summary: dict[str, Any]
    run: dict[str, Any]
    path: Path | None = None

    @property
    def folders(self) -> list[Path]:
        """The folders of the checkpoints' analyses, for `opdkernels.load`."""
        return [] if self.path is None else [self.path / "steps" / step["folder"] for step in self.summary["steps"]]

    @property
    def exit_status(self) -> int:
        """0, or 3 if tensors of a checkpoint were excluded, failed or contain non-finite coordinates, or if too little
        was compared, see `opdkernels.checkpoint.coverage.Coverage.sufficient`."""
        incomplete = self.summary["excluded"] or not self.summary["coverage"]["sufficient"]
        return max([3 if incomplete else 0, *(step["exit_status"] for step in self.summary["steps"])])

    def to_pandas(self) -> pd.DataFrame:
        """`table` as a DataFrame. Raises ImportError if pandas is not installed."""
        return to_pandas(self.table)

    def __repr__(self) -> str:
        steps = self.summary["steps"]
        unchanged = steps[-1]["views"].get("visible", {}).get("frac_zero")
        changed = None if unchanged is None else 1 - unchanged
        labels = [step["label"] if step["step"] is None else step["step"] for step in steps]
        return (
            f"Trajectory(base={self.summary['base']!r}, steps={labels}, "
            f"visibly changed at the end: {percent(changed)}, path={format_path(self.path)})"
        )


def load_trajectory(folder: Path, run: dict[str, Any]) -> Trajectory:
    """The finished trajectory in a folder, whose run.json is `run`."""
    summary = read_run_summary(folder, TrajectorySummary)
    return Trajectory(groups.read_table(folder, run, "trajectory"), summary, run, folder)


def run_trajectory(
    base: str | os.PathLike[str],
    checkpoints: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None,
    options: TrajectoryOptions,
    progress: Progress,
) -> Trajectory:
    """`opdkernels.trajectory` without the reports."""
    if len(checkpoints) < 2:
        raise UsageError("trajectory takes two or more checkpoints of a run; use analyze for one")
    if out is None and options.csv:
        raise UsageError("csv writes files; give an output folder")
    points, notes = order_checkpoints([os.fspath(path) for path in checkpoints], options.steps)
    with contextlib.ExitStack() as stack:
        opened_base, *trained = (
            stack.enter_context(contextlib.closing(open_checkpoint(path, **options.open_kwargs)))
            for path in (base, *(point.path for point in points))
        )
        if repeated := repeated_path([os.fspath(path) for path in checkpoints]):
            first, second = map(printable, repeated)
            raise UsageError(f"{first} and {second} are one checkpoint; give each checkpoint once")
        stack.enter_context(torch_threads(options.threads))
        pairs = [match(opened_base, checkpoint) for checkpoint in trained]
        labels = [point.label for point in points]
        run_info = describe_run(
            "trajectory",
            options.model_dump(mode="json"),
            {"base": opened_base, **dict(zip(labels, trained, strict=True))},
            schema_version=SCHEMA_VERSION,
            identity_inputs=["base"],  # checkpoints may be added; each has its own run directory
        )
        folder = stack.enter_context(open_run_dir(out, run_info, options.overwrite))
        runs = [
            stack.enter_context(checkpoint_run(folder, point, pair, options))
            for point, pair in zip(points, pairs, strict=True)
        ]
        tally_runs(runs, options, progress)
        similarities = compute_run_spectra(folder, runs, options, progress)
        common, excluded = match_in_all(pairs, [point.title for point in points])
        totals = [run.totals for run in runs]
        trajectories = count_trajectories(pairs, totals, common, options.atol, options.memory, progress)
        for checkpoint in (opened_base, *trained):
            checkpoint.check()
        tensor_names = {i: m.name for i, m in enumerate(pairs[-1].matches)}
        named_similarities = [(tensor_names[similarity.index], similarity) for similarity in similarities]
        rows: list[Row] = []
        steps = []
        for i, (run, point) in enumerate(zip(runs, points, strict=True)):
            analysis = run.finalize()
            checkpoint_rows = step_rows(i, point, analysis, trajectories, named_similarities)
            rows += checkpoint_rows
            verdict = analysis.summary["verdict"]
            if verdict["kind"].startswith("unrelated"):
                notes.append(f"{point.title}: {verdict['text']}")
            steps.append(
                {
                    "step": point.step,
                    "label": point.label,
                    "path": point.path,
                    "folder": run.folder.name if run.folder is not None else None,
                    "exit_status": analysis.exit_status,
                    "views": model_metrics(checkpoint_rows),
                }
            )
        summary = {
            "schema_version": groups.TABLE_VERSION,
            "base": opened_base.path,
            "atol": options.atol,
            "coverage": common_coverage(pairs, [point.title for point in points], common).to_dict(),
            "steps": steps,
            "excluded": excluded,
            "notes": notes,
        }
        result = Trajectory(groups.rows_to_arrow(rows), summary, run_info, folder)
        if folder is not None:
            write_trajectory(folder, result, rows, options)
    return result


def write_trajectory(folder: Path, result: Trajectory, rows: Sequence[Row], options: TrajectoryOptions) -> None:
    """Writes the table and the summary, and removes the files of an earlier run with other options."""
    groups.write_parquet(folder / "trajectory.parquet", result.table)
    write_json(folder / "summary.json", result.summary)
    if options.csv:
        groups.write_csv(folder / "trajectory.csv", rows, result.table.column_names)
    else:
        (folder / "trajectory.csv").unlink(missing_ok=True)
    if not options.report:
        (folder / "report.html").unlink(missing_ok=True)


@dataclass
class CheckpointRun:
    """The analysis of one checkpoint in progress. With a folder, its tallies are on disk only and read again at the
    end."""

    job: RunJob
    tallies: ArrowStore[TallyRecord]
    run_info: dict[str, Any]
    folder: Path | None
    options: AnalyzeOptions
    totals: dict[Elements, TensorTotals | None]

    def tally(self, memory: int, progress: Progress) -> None:
        tally_all(self.job.pair, self.tallies, memory, progress)
        self.job.statuses.update(tally_statuses(self.tallies))
        self.totals = {
            base_elements(match): TensorTotals.of(self.tallies.records[i])
            for i, match in enumerate(self.job.pair.matches)
        }
        self.tallies.flush()
        if self.folder is not None:
            self.tallies.records.clear()

    def finalize(self) -> Analysis:
        tallies = open_tallies(self.folder / "tallies") if self.folder is not None else self.tallies
        return finalize(self.job.pair, tallies, self.job.spectra, self.run_info, self.folder, self.options)


@contextlib.contextmanager
def checkpoint_run(
    folder: Path | None, point: CheckpointStep, pair: Pair, options: TrajectoryOptions
) -> Iterator[CheckpointRun]:
    """The analysis of one checkpoint, in a folder that `analyze` could have written."""
    common_fields = (name for name in AnalyzeOptions.model_fields if name in TrajectoryOptions.model_fields)
    analyze_options = AnalyzeOptions(**{name: getattr(options, name) for name in common_fields})
    run_info = describe_pair(pair, analyze_options)
    out = step_folder(folder, point, run_info["identity"]) if folder is not None else None
    with open_run_dir(out, run_info, False) as run_folder:
        tallies = open_tallies(run_folder / "tallies" if run_folder is not None else None)
        run_info["resumed_tensors"] = len(tallies.records)
        job = RunJob(pair, {}, open_spectra(run_folder / "spectra" if run_folder is not None else None))
        try:
            yield CheckpointRun(job, tallies, run_info, run_folder, analyze_options, {})
        finally:
            tallies.flush()
            job.spectra.flush()


def step_folder(folder: Path, point: CheckpointStep, identity: str) -> Path:
    """The folder of a checkpoint's analysis: an existing one of the same identity, or a new one named after the
    step."""
    steps = folder / "steps"
    for path in sorted(steps.glob(f"*/{RUN_FILE}")):
        existing = read_json_object(path)
        if (existing.get("format"), existing.get("identity")) == (ANALYSIS.format, identity):
            return path.parent
    name = "final" if point.step is None else f"{point.step:06d}"
    return steps / (f"{name}-{identity[:8]}" if (steps / name).exists() else name)


def tally_runs(runs: Sequence[CheckpointRun], options: TrajectoryOptions, progress: Progress) -> None:
    """Tallies every checkpoint, with one progress for all."""
    total, done = sum(run.job.pair.nbytes for run in runs), 0
    for run in runs:
        run.tally(options.memory, lambda at, _, name, done=done: progress(done + at, total, name))  # type: ignore[misc]
        done += run.job.pair.nbytes


def compute_run_spectra(
    folder: Path | None, runs: Sequence[CheckpointRun], options: TrajectoryOptions, progress: Progress
) -> list[Similarity]:
    """Computes the spectra of every checkpoint; returns the similarities of the updates to the last one, per matrix."""
    if options.spectra == "off":
        return []
    similarities = open_similarities(folder / "similarity" if folder is not None else None)
    identities = " ".join([options.spectra, *(run.run_info["identity"] for run in runs)])
    run_id = hashlib.blake2b(identities.encode(), digest_size=16).hexdigest()
    factors = FactorCache(folder / "factors") if folder is not None and options.spectra == "exact" else None
    config = SpectraConfig(options.spectra, options.memory, similarity=True, factors=factors)
    try:
        compute_spectra([run.job for run in runs], config, progress, similarities, run_id)
    finally:
        similarities.flush()
    records = similarities.records
    return [records[key] for key in sorted(records) if records[key].run == run_id]
