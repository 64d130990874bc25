"""`trajectory`: checkpoints of one run against their source: what changed when, and whether it is what stays changed.

Every checkpoint gets all figures of `analyze`; beside them stand those that take more than one: how its changed set covers
that of the last checkpoint T and back, the cosine of its update with the last, Sim_K of their top directions, and what
changed since the checkpoint before. What depends on the source alone is computed once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from opdkernels.analysis.compute import Job, Rules, compute_all
from opdkernels.analysis.factors import Factors
from opdkernels.analysis.outputs import OUTPUTS
from opdkernels.analysis.overlap import bytes_each, in_all, place_of, read_all
from opdkernels.analysis.result import Analysis
from opdkernels.analysis.run import conclude, count_all, describe_pair, facts, slices, threads
from opdkernels.checkpoint.match import Match, Pair, match
from opdkernels.checkpoint.names import TensorRole, parse_tensor_name
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.config import AnalyzeOptions, TrajectoryOptions
from opdkernels.errors import UsageError, printable
from opdkernels.files import write_json
from opdkernels.formatting import measure, percent
from opdkernels.metrics import groups as tables
from opdkernels.metrics.coordinates import VIEWS, to_bf16_bits
from opdkernels.metrics.geometry import TRAJECTORY_METRICS
from opdkernels.metrics.groups import Row
from opdkernels.metrics.similarity import TOP, Similarity, open_similarities
from opdkernels.metrics.spectra import open_spectra
from opdkernels.metrics.tallies import SCHEMA_VERSION, TallyRecord, open_tallies
from opdkernels.metrics.trajectory import CHANCE, SIMILARITY
from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, Tally, delta, exact_float, from_limbs
from opdkernels.ops.overlap import MAX_RUNS, Overlap, overlap
from opdkernels.progress import Progress
from opdkernels.runs.run_dir import as_input_error, describe_run, open_run_dir, read_run
from opdkernels.runs.store import ArrowStore

STEP = re.compile(r"(?:step|steps|checkpoint|ckpt|iter|iteration|epoch)[-_]?0*(\d{1,15})(?!\d)(?!.*\d)", re.IGNORECASE)


@dataclass
class Trajectory:
    """Checkpoints of one run. `table`: one row a checkpoint, group and view; `summary`: the whole model, checkpoint by
    checkpoint; `path`: where it was written, the analysis of each checkpoint in `folders`. Columns and keys: docs/outputs.md."""

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
        """0, or 3 where tensors of a checkpoint were excluded, failed or hold non-finite coordinates."""
        return max([3 if self.summary["excluded"] else 0, *(step["exit_status"] for step in self.summary["steps"])])


def load(folder: Path, run: dict[str, Any]) -> Trajectory:
    """The finished trajectory in a folder, whose run.json is `run`."""
    with as_input_error(folder):
        return Trajectory(
            pq.read_table(folder / "trajectory.parquet"), json.loads((folder / "summary.json").read_text()), run, folder
        )


def step_of(path: str) -> int | None:
    """The number of steps that a path names, from its last part that names one.

    >>> step_of("run/checkpoint-200"), step_of("run/global_step_40/actor"), step_of("run/final")
    (200, 40, None)
    """
    for part in reversed(os.path.normpath(path).split(os.sep)):
        if found := STEP.search(part):
            return int(found[1])
    return None


def in_order(paths: Sequence[str]) -> tuple[list[tuple[int, str]], list[str]]:
    """Checkpoints with their numbers, ascending, and what a reader should know of them: the steps in their names; those without
    one come last, in the order given; where two have the same, all are numbered in the order given."""
    steps = [(step_of(path), path) for path in paths]
    known = sorted((step, path) for step, path in steps if step is not None)
    if len({step for step, _ in known}) < len(known):
        return list(enumerate(paths, 1)), ["two checkpoints name the same step: all are numbered in the order given"]
    if not known:
        return list(enumerate(paths, 1)), ["no checkpoint names its step: they are numbered in the order given"]
    unnamed = list(enumerate((path for step, path in steps if step is None), known[-1][0] + 1))
    return known + unnamed, [f"{printable(path)} names no step: it is taken as step {step}" for step, path in unnamed]


def run_trajectory(
    base: str | os.PathLike[str],
    checkpoints: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None,
    chosen: TrajectoryOptions,
    progress: Progress,
) -> Trajectory:
    """`opdkernels.trajectory` without the page."""
    if len(checkpoints) < 2:
        raise UsageError("trajectory follows two or more checkpoints of a run; analyze looks at one")
    if out is None and chosen.csv:
        raise UsageError("csv writes files; give an output folder")
    numbered, notes = in_order([os.fspath(path) for path in checkpoints])
    with contextlib.ExitStack() as stack:
        source, *trained = (
            stack.enter_context(contextlib.closing(open_checkpoint(path, **chosen.open_kwargs)))
            for path in (base, *(path for _, path in numbered))
        )
        stack.enter_context(threads(chosen.threads))
        pairs = [match(source, one) for one in trained]
        numbers = [number for number, _ in numbered]
        about = describe_run(
            "trajectory",
            chosen.model_dump(mode="json"),
            {"source": source, **dict(zip(map(str, numbers), trained, strict=True))},
            schema_version=SCHEMA_VERSION,
            identity_inputs=["source"],  # checkpoints may be added
        )
        folder = stack.enter_context(open_run_dir(out, about, chosen.overwrite, OUTPUTS))
        runs = [
            stack.enter_context(step_run(folder, number, pair, chosen))
            for number, pair in zip(numbers, pairs, strict=True)
        ]
        count_each(runs, chosen, progress)
        alike = compute(folder, runs, chosen, progress)
        together, excluded = in_all(pairs, [f"step {number}" for number in numbers])
        paths = count_along(runs, together, chosen, progress)
        for one in (source, *trained):
            one.check()
        names = {i: m.name for i, m in enumerate(pairs[-1].matches)}
        similar = [(names[one.index], one) for one in alike]
        rows, steps = [], []
        for i, (run, (number, path)) in enumerate(zip(runs, numbered, strict=True)):
            analysis = run.conclude()
            own = step_rows(i, number, analysis, paths, similar)
            rows += own
            where = run.folder.name if run.folder is not None else None
            steps.append(
                {
                    "step": number,
                    "path": path,
                    "folder": where,
                    "exit_status": analysis.exit_status,
                    "views": whole_model(own),
                }
            )
        summary = {
            "schema_version": tables.TABLE_VERSION,
            "source": source.path,
            "atol": chosen.atol,
            "steps": steps,
            "excluded": excluded,
            "notes": notes,
        }
        result = Trajectory(tables.rows_to_arrow(rows), summary, about, folder)
        if folder is not None:
            write(folder, result, rows, chosen)
    return result


def write(folder: Path, result: Trajectory, rows: Sequence[Row], chosen: TrajectoryOptions) -> None:
    tables.write_parquet(folder / "trajectory.parquet", result.table)
    write_json(folder / "summary.json", result.summary)
    if chosen.csv:
        tables.write_csv(folder / "trajectory.csv", rows, result.table.column_names)
    else:
        (folder / "trajectory.csv").unlink(missing_ok=True)
    if not chosen.report:
        (folder / "report.html").unlink(missing_ok=True)


@dataclass(frozen=True)
class Counted:
    """What a tensor's tally says beside its figures: finite coordinates, those that visibly changed, and, exact, in units of
    2^-1074, the sums of W^2 and delta^2. None of a tensor that failed or holds NaN or Inf."""

    finite: int
    changed: int
    source_sq: int
    delta_sq: int

    @classmethod
    def of(cls, record: TallyRecord) -> Counted | None:
        tally = record.tally
        if tally is None or tally.nonfinite:
            return None
        return cls(
            tally.finite, int(tally.changed("visible").sum()), from_limbs(tally.sums[0]), from_limbs(tally.sums[2])
        )


@dataclass
class StepRun:
    """One checkpoint's analysis under way. Its tallies are kept on disk, where there is a folder, and read again at the end."""

    job: Job
    records: ArrowStore[TallyRecord]
    about: dict[str, Any]
    folder: Path | None
    options: AnalyzeOptions
    counted: dict[tuple[str, int, int], Counted | None]

    def count(self, memory: int, progress: Progress) -> None:
        count_all(self.job.pair, self.records, memory, progress)
        self.job.facts.update(facts(self.records))
        self.counted = {place_of(m): Counted.of(self.records.records[i]) for i, m in enumerate(self.job.pair.matches)}
        self.records.flush()
        if self.folder is not None:
            self.records.records.clear()

    def conclude(self) -> Analysis:
        records = open_tallies(self.folder / "tallies") if self.folder is not None else self.records
        return conclude(self.job.pair, records, self.job.spectra, self.about, self.folder, self.options)


@contextlib.contextmanager
def step_run(folder: Path | None, number: int, pair: Pair, chosen: TrajectoryOptions) -> Iterator[StepRun]:
    """The analysis of one checkpoint, in a folder of its own that `analyze` could have made."""
    options = AnalyzeOptions(
        **{
            name: getattr(chosen, name)
            for name in AnalyzeOptions.model_fields
            if name in TrajectoryOptions.model_fields
        }
    )
    about = describe_pair(pair, options)
    with open_run_dir(
        step_folder(folder, number, about["identity"]) if folder is not None else None, about, False, OUTPUTS
    ) as own:
        records = open_tallies(own / "tallies" if own is not None else None)
        about["resumed_tensors"] = len(records.records)
        job = Job(pair, {}, open_spectra(own / "spectra" if own is not None else None))
        try:
            yield StepRun(job, records, about, own, options, {})
        finally:
            records.flush()
            job.spectra.flush()


def step_folder(folder: Path, number: int, identity: str) -> Path:
    """Where the analysis is or goes: found by its identity, named after the step."""
    steps = folder / "steps"
    for path in sorted(steps.glob("*/run.json")):
        before = read_run(path.parent)
        if before is not None and before["identity"] == identity:
            return path.parent
    name = f"{number:06d}"
    return steps / (f"{name}-{identity[:8]}" if (steps / name).exists() else name)


def count_each(runs: Sequence[StepRun], chosen: TrajectoryOptions, progress: Progress) -> None:
    total, done = sum(run.job.pair.nbytes for run in runs), 0
    for run in runs:
        run.count(chosen.memory, lambda at, _, name, done=done: progress(done + at, total, name))  # type: ignore[misc]
        done += run.job.pair.nbytes


def compute(
    folder: Path | None, runs: Sequence[StepRun], chosen: TrajectoryOptions, progress: Progress
) -> list[Similarity]:
    """The spectra of every checkpoint, and how like the last update's top directions those of the others are."""
    if chosen.spectra == "off":
        return []
    alike = open_similarities(folder / "similarity" if folder is not None else None)
    identity = hashlib.blake2b(
        " ".join([chosen.spectra, *(run.about["identity"] for run in runs)]).encode(), digest_size=16
    ).hexdigest()
    factors = Factors(folder / "factors") if folder is not None and chosen.spectra == "exact" else None
    try:
        compute_all(
            [run.job for run in runs],
            Rules(chosen.spectra, chosen.memory, similar=True, factors=factors),
            progress,
            alike,
            identity,
        )
    finally:
        alike.flush()
    return [alike.records[key] for key in sorted(alike.records) if alike.records[key].run == identity]


@dataclass
class Along:
    """One tensor of the source along the run; int64 and float64, an entry a checkpoint.

    `changed`: visible |delta| > atol; `shared`: changed then and at the end; `expected`: of those, what independent changes
    within each |W| would share; `moved`: visibly other than at the checkpoint before. `energy`: sum of delta^2, `dot`: of delta
    with the last one, `step_energy`: of the difference to the checkpoint before; `source_energy`: of W.
    """

    match: Match
    finite: int
    source_energy: float
    changed: np.ndarray
    shared: np.ndarray
    expected: np.ndarray
    moved: np.ndarray
    energy: np.ndarray
    dot: np.ndarray
    step_energy: np.ndarray


class Counter:
    """Counts one tensor along the run, from slices of it."""

    def __init__(self, steps: int, cut: int):
        others = range(steps - 1)
        self.groups = [[*others[i : i + MAX_RUNS - 1], steps - 1] for i in range(0, steps - 1, MAX_RUNS - 1)]
        self.cut, self.overlaps = cut, [Overlap.empty(len(group), cut) for group in self.groups]
        self.to_last = [Tally.empty(DEFAULT_THRESHOLD_BITS) for _ in others]
        self.since = [Tally.empty(DEFAULT_THRESHOLD_BITS) for _ in others[1:]]

    def clear(self) -> None:
        for tally in (*self.to_last, *self.since):
            tally.reset()
        for found in self.overlaps:
            for array in found.arrays:
                array.fill(0)

    def add(self, w: torch.Tensor, trained: Sequence[torch.Tensor]) -> None:
        for group, found in zip(self.groups, self.overlaps, strict=True):
            overlap(w, [trained[i] for i in group], threshold_bits=self.cut, out=found)
        for one, tally in zip(trained, self.to_last, strict=False):
            delta(one, trained[-1], out=tally)
        for one, after, tally in zip(trained, trained[1:], self.since, strict=False):
            delta(one, after, out=tally)

    def along(self, match: Match, counted: Sequence[Counted]) -> Along:
        """Of the whole tensor, of which `counted` is known against the source."""
        steps = len(counted)
        changed, shared, expected = np.zeros(steps, np.int64), np.zeros(steps, np.int64), np.zeros(steps)
        for group, found in zip(self.groups, self.overlaps, strict=True):
            last = len(group) - 1
            for i, step in enumerate(group):
                changed[step], shared[step] = found.n_changed(i), found.n_both(i, last)
                expected[step] = (
                    found.expected_magnitude(i, last) if i != last else 0
                )  # of the last with itself: no chance
        energies = [one.delta_sq for one in counted]
        to_last = [*(tally.sum_delta_sq for tally in self.to_last), 0]
        since = [*(self.since or []), self.to_last[-1]]
        return Along(
            match,
            counted[0].finite,
            exact_float(counted[0].source_sq),
            changed,
            shared,
            expected,
            np.array([counted[0].changed, *(int(tally.hist_base_over[0].sum()) for tally in since)]),
            np.array([exact_float(energy) for energy in energies]),
            np.array(
                [
                    exact_float(energy + energies[-1] - apart) / 2
                    for energy, apart in zip(energies, to_last, strict=True)
                ]
            ),
            np.array([exact_float(energies[0]), *(exact_float(tally.sum_delta_sq) for tally in since)]),
        )


def count_along(
    runs: Sequence[StepRun], together: list[list[Match]], chosen: TrajectoryOptions, progress: Progress
) -> list[Along]:
    """What takes several checkpoints at once. Tensors that failed, or hold NaN or Inf anywhere, are left out."""
    pairs = [run.job.pair for run in runs]
    total, done, found = sum(ms[0].numel * bytes_each(ms) for ms in together), 0, []
    counter = Counter(len(runs), to_bf16_bits(chosen.atol))
    for matches in together:
        first, each = matches[0], bytes_each(matches)
        whole = [one for run in runs if (one := run.counted[place_of(first)]) is not None]
        if len(whole) == len(runs):
            counter.clear()
            for begin, end in slices(first.numel, each, chosen.memory):
                w, *trained = read_all(pairs, matches, begin, end)
                counter.add(w, trained)
                progress(done + end * each, total, first.name)
            found.append(counter.along(first, whole))
        done += first.numel * each
        progress(done, total, first.name)
    return found


def along_figures(members: Sequence[Along], step: int, view: str) -> Row:
    """Of a group of tensors at one checkpoint; None where there is no whole to take a share of.

    visible: `recall_vs_final` |S_t & S_T| / |S_T|, `precision_vs_final` the same over |S_t|, S the coordinates with visible |delta| >
    atol; `shared_over_magnitude` |S_t & S_T| over what independent changes within each |W| of each tensor would share;
    `frac_changed_since_previous`. stored: `cosine_final` of the update with the last one, `relative_norm_since_previous` of
    what changed since the checkpoint before, over ||W||.
    """
    total = {
        name: float(sum(getattr(one, name)[step] for one in members))
        for name in ("changed", "shared", "expected", "moved", "energy", "dot", "step_energy")
    }
    if view == "visible":
        return {
            "recall_vs_final": tables.ratio(total["shared"], float(sum(one.changed[-1] for one in members))),
            "precision_vs_final": tables.ratio(total["shared"], total["changed"]),
            "shared_over_magnitude": tables.ratio(total["shared"], total["expected"]),  # None of the last with itself
            "frac_changed_since_previous": tables.ratio(total["moved"], sum(one.finite for one in members)),
        }
    size = math.sqrt(total["energy"] * float(sum(one.energy[-1] for one in members)))
    weight = sum(one.source_energy for one in members)
    return {
        "cosine_final": max(-1.0, min(1.0, total["dot"] / size)) if size else None,
        "relative_norm_since_previous": math.sqrt(total["step_energy"] / weight) if weight else None,
    }


def step_rows(
    step: int, number: int, analysis: Analysis, paths: Sequence[Along], alike: Sequence[tuple[str, Similarity]]
) -> list[Row]:
    """The rows of one checkpoint: its groups, with what takes several checkpoints, and the means of what its matrices show."""
    along: dict[tuple, list[Along]] = {}
    for one in paths:
        for key in keys_of(parse_tensor_name(one.match.name)):
            along.setdefault(key, []).append(one)
    spectral: dict[tuple, list[Row]] = {}
    for row in matrix_rows(step, analysis, alike):
        for key in keys_of(parse_tensor_name(row["name"])):
            spectral.setdefault(key, []).append(row)
    rows = []
    for group in analysis.groups.to_pylist():
        key = (group["by"], *(group[name] for name in tables.GROUPINGS[group["by"]]))
        row = {"step": number, **group, **along_figures(along.get(key, []), step, group["view"])}
        if group["view"] == "stored":
            row |= {
                name: mean([m[name] for m in spectral.get(key, [])])
                for name in (*TRAJECTORY_METRICS, *SIMILARITY, *CHANCE)
            }
        rows.append(row)
    return rows


def keys_of(where: TensorRole) -> Iterator[tuple]:
    """The groups that a tensor belongs to."""
    for grouping, names in tables.GROUPINGS.items():
        yield (grouping, *(getattr(where, name) for name in names))


def mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return sum(known) / len(known) if known else None


def matrix_rows(step: int, analysis: Analysis, alike: Sequence[tuple[str, Similarity]]) -> Iterator[Row]:
    """What the matrices of one checkpoint show in the stored view, and Sim_K with its chance, K over the side."""
    for name, one in alike:
        yield {
            "name": name,
            **dict.fromkeys(TRAJECTORY_METRICS),
            **dict(zip(SIMILARITY, (float(one.left[step]), float(one.right[step])), strict=True)),
            **dict(zip(CHANCE, (TOP / one.m, TOP / one.n), strict=True)),
        }
    if analysis.spectra is None or analysis.geometry is None:
        return
    for a, b in zip(analysis.spectra.to_pylist(), analysis.geometry.to_pylist(), strict=True):
        if a["view"] == "stored" and a["method"]:
            yield {
                "name": a["name"],
                **{name: (a | b)[name] for name in TRAJECTORY_METRICS},
                **dict.fromkeys((*SIMILARITY, *CHANCE)),
            }


def whole_model(rows: Sequence[Row]) -> dict[str, Row]:
    """Of one checkpoint, its figures of the whole model by view."""
    about = ("step", "by", "view", *(name for names in tables.GROUPINGS.values() for name in names))
    return {
        row["view"]: {name: value for name, value in row.items() if name not in about}
        for row in rows
        if row["by"] == "model"
    }


def format_text(result: Trajectory) -> list[str]:
    """A finished trajectory in a few lines, for the terminal."""
    summary = result.summary
    found = [f"source: {printable(summary['source'])}"]
    found.append(
        f"{'step':>8}{'unchanged':>11}{'visible':>10}{'rel. norm':>11}{'stable rank':>13}{'cosine':>9}{'Sim_16':>8}{'coverage':>10}{'since':>9}  checkpoint"
    )
    for step in summary["steps"]:
        stored, visible = (step["views"].get(view, {}) for view in VIEWS)
        found.append(
            f"{step['step']:8}{percent(stored.get('frac_zero')):>11}{percent(visible.get('frac_zero')):>10}{percent(stored.get('relative_norm')):>11}"
            f"{measure(stored.get('stable_rank')):>13}{measure(stored.get('cosine_final')):>9}{measure(mean([stored.get(name) for name in SIMILARITY])):>8}"
            f"{percent(visible.get('recall_vs_final')):>10}{percent(visible.get('frac_changed_since_previous')):>9}  {printable(step['path'])}"
        )
    found.append(
        f"unchanged: stored and visible view; cosine, Sim_16 (mean of left and right) and coverage (of what the last changed by more than {summary['atol']:g}): with the last checkpoint;"
    )
    found.append("since: share of the coordinates that visibly changed since the checkpoint before")
    found += [f"note: {note}" for note in summary["notes"]]
    found += [f"excluded: {printable(e['name'])}: {printable(e['reason'])}" for e in summary["excluded"][:10]]
    found += [
        f"step {s['step']}: tensors were excluded, failed or hold NaN or Inf; see its own report"
        for s in summary["steps"]
        if s["exit_status"]
    ]
    if result.path is not None:
        found.append(f"{result.run['seconds']:.2f} s; written to {printable(str(result.path))}")
    return found
