"""`overlap`: which coordinates several runs of one source changed together, and what chance alone would share."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opdkernels.analysis.outputs import OUTPUTS
from opdkernels.analysis.run import slices, threads
from opdkernels.checkpoint.match import ITEM_BYTES, Match, Pair, match
from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.config import OverlapOptions
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.files import write_json
from opdkernels.formatting import measure, percent, times
from opdkernels.metrics import groups as tables
from opdkernels.metrics.coordinates import to_bf16_bits
from opdkernels.metrics.overlap import chance_metrics, pair_metrics
from opdkernels.metrics.tallies import SCHEMA_VERSION
from opdkernels.ops.overlap import (
    MAX_RUNS,
    Overlap,
    expected_uniform,
    fraction,
    overlap,
    strata_chance,
)
from opdkernels.progress import Progress
from opdkernels.runs.run_dir import as_input_error, describe_run, open_run_dir


@dataclass
class Counted:
    """One tensor of all runs: its counts, and chance within finer strata by name (expected, variance; [R, R])."""

    match: Match
    found: Overlap
    strata: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


@dataclass
class Overlaps:
    """How runs of one source overlap. `tensors`: one row a tensor and pair of runs; `summary`: the whole model, pair by
    pair, and how many coordinates changed in exactly j runs."""

    tensors: pa.Table
    summary: dict[str, Any]
    run: dict[str, Any]
    path: Path | None = None

    @property
    def exit_status(self) -> int:
        """0, or 3 where tensors were excluded or hold non-finite coordinates."""
        return 3 if self.summary["excluded"] or self.summary["nonfinite"] else 0


def load(folder: Path, run: dict[str, Any]) -> Overlaps:
    """The finished overlap in a folder, whose run.json is `run`."""
    with as_input_error(folder):
        return Overlaps(
            pq.read_table(folder / "overlap.parquet"), json.loads((folder / "summary.json").read_text()), run, folder
        )


def run_overlap(
    base: str | os.PathLike[str],
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None,
    chosen: OverlapOptions,
    progress: Progress,
) -> Overlaps:
    """`opdkernels.overlap` without the page."""
    if not 2 <= len(runs) <= MAX_RUNS:
        raise UsageError(f"overlap compares 2 to {MAX_RUNS} runs of one source, not {len(runs)}")
    with contextlib.ExitStack() as stack:
        sources = [
            stack.enter_context(contextlib.closing(open_checkpoint(path, **chosen.open_kwargs)))
            for path in (base, *runs)
        ]
        stack.enter_context(threads(chosen.threads))
        pairs = [match(sources[0], source) for source in sources[1:]]
        about = describe_run(
            "overlap",
            chosen.model_dump(mode="json"),
            dict(zip(("source", *names(len(runs))), sources, strict=True)),
            schema_version=SCHEMA_VERSION,
            identity_options=("atol", "strata"),
        )
        with open_run_dir(out, about, chosen.overwrite, OUTPUTS) as folder:
            together, excluded = in_all(pairs, [f"run {name}" for name in names(len(runs))])
            counted = count(pairs, together, chosen, progress)
            for source in sources:
                source.check()
            rows = [row for one in counted for row in tensor_rows(one)]
            summary = summarise([s.path for s in sources], counted, rows, excluded, chosen)
            result = Overlaps(tables.rows_to_arrow(rows), summary, about, folder)
            if folder is not None:
                tables.write_parquet(folder / "overlap.parquet", result.tensors)
                write_json(folder / "summary.json", summary)
                if chosen.csv:
                    tables.write_csv(folder / "overlap.csv", rows, result.tensors.column_names)
    return result


def names(count: int) -> list[str]:
    """Runs are called A, B, C … in the order given."""
    return [chr(ord("A") + i) for i in range(count)]


def place_of(match: Match) -> tuple[str, int, int]:
    """Which elements of the source a match compares."""
    return match.base.name, match.base_start, match.numel


def in_all(pairs: Sequence[Pair], names: Sequence[str]) -> tuple[list[list[Match]], list[dict[str, str]]]:
    """Matches of the source that every run has, a list of one match a run; and what some run lacks."""
    by_place = [{place_of(m): m for m in pair.matches} for pair in pairs]
    held = [{m.base.name for m in pair.matches} for pair in pairs]
    order = {name: i for i, name in enumerate(pairs[0].base.tensors)}
    first = {place_of(m): m for pair in reversed(pairs) for m in pair.matches}
    together, excluded = [], []
    for where, one in sorted(first.items(), key=lambda item: (order[item[0][0]], item[0][1:])):
        found = [matches[where] for matches in by_place if where in matches]
        if len(found) == len(pairs):
            together.append(found)
            continue
        lacking = [i for i, matches in enumerate(by_place) if where not in matches]
        cut = all(one.base.name in held[i] for i in lacking)
        absent = ", ".join(names[i] for i in lacking)
        excluded.append(
            {
                "name": one.name,
                "reason": f"stored in other parts in {absent}" if cut else f"not in {absent} in the same shape",
            }
        )
    for name, pair in zip(names, pairs, strict=True):
        excluded += [
            {"name": u.name, "reason": f"{name}: {u.reason}"} for u in pair.unmatched if u.kind in ("shape", "shard")
        ]
    if not together:
        raise InputError(
            "no tensor of the source is in every run in the same shape; check that the runs come from this source"
        )
    return together, excluded


def bytes_each(matches: Sequence[Match]) -> int:
    """Of one coordinate in the source and every run."""
    return ITEM_BYTES[matches[0].base.dtype] + sum(ITEM_BYTES[m.trained.dtype] for m in matches)


def read_all(pairs: Sequence[Pair], matches: Sequence[Match], begin: int, end: int) -> list[Any]:
    """Elements [begin, end) of a tensor of the source, and of it in every run."""
    first = matches[0]
    tensors = [pairs[0].base.read(first.base.name, first.base_start + begin, first.base_start + end)]
    for pair, m in zip(pairs, matches, strict=True):
        tensors.append(pair.trained.read(m.trained.name, m.trained_start + begin, m.trained_start + end))
    return tensors


def count(pairs: list[Pair], together: list[list[Match]], chosen: OverlapOptions, progress: Progress) -> list[Counted]:
    cut = to_bf16_bits(chosen.atol)
    total, done = sum(ms[0].numel * bytes_each(ms) for ms in together), 0
    counted = []
    for matches in together:
        first, each = matches[0], bytes_each(matches)
        found = Overlap.empty(len(pairs), cut)
        for begin, end in slices(first.numel, each, chosen.memory):
            w, *trained = read_all(pairs, matches, begin, end)
            overlap(w, trained, threshold_bits=cut, out=found)
            progress(done + end * each, total, first.name)
        one = Counted(first, found)
        if chosen.strata and len(first.shape) == 2 and first.numel:
            w, *trained = (t.reshape(first.shape) for t in read_all(pairs, matches, 0, first.numel))
            for strata in chosen.strata:
                one.strata[strata] = strata_chance(w, trained, strata, threshold_bits=cut)
        done += first.numel * each
        counted.append(one)
    return counted


def tensor_rows(one: Counted) -> list[dict[str, Any]]:
    found, where = one.found, parse_tensor_name(one.match.name)
    rows = []
    runs = names(found.n_runs)
    for a, b in itertools.combinations(range(found.n_runs), 2):
        both = found.n_both(a, b)
        row = {
            "name": one.match.name,
            "shape": json.dumps(list(one.match.shape)),
            "layer": where.layer,
            "module": where.module,
            "block": where.block,
            "run_a": runs[a],
            "run_b": runs[b],
            "numel": found.numel,
            "nonfinite": found.nonfinite,
            "changed_a": found.n_changed(a),
            "changed_b": found.n_changed(b),
            "changed_both": both,
            **pair_metrics(both, found.n_changed(a), found.n_changed(b), found.finite),
            "expected_uniform": found.expected_uniform(a, b),
            "over_uniform": tables.ratio(both, found.expected_uniform(a, b)),
            **chance_metrics("magnitude", both, found.expected_magnitude(a, b), found.variance_magnitude(a, b)),
            "variance_magnitude": found.variance_magnitude(a, b),
        }
        for strata, (expected, variance) in one.strata.items():
            row |= chance_metrics(strata, both, float(expected[a, b]), float(variance[a, b]))
            row[f"variance_{strata}"] = float(variance[a, b])
        rows.append(row)
    return rows


def summarise(
    paths: list[str],
    counted: list[Counted],
    rows: list[dict[str, Any]],
    excluded: list[dict[str, str]],
    chosen: OverlapOptions,
) -> dict[str, Any]:
    n_runs = counted[0].found.n_runs
    exactly = sum((c.found.hist_num_runs for c in counted), np.zeros(n_runs + 1, np.int64))
    finite = int(exactly.sum())
    return {
        "schema_version": tables.TABLE_VERSION,
        "source": paths[0],
        "runs": dict(zip(names(n_runs), paths[1:], strict=True)),
        "atol": chosen.atol,
        "tensors": len(counted),
        "coordinates": finite,
        "changed_in_exactly": {str(j): int(c) for j, c in enumerate(exactly)},
        "pairs": whole_model(rows, finite),
        "by_module": grouped(rows, "module"),
        "by_layer": grouped(rows, "layer"),
        "excluded": excluded,
        "nonfinite": [{"name": c.match.name, "coordinates": c.found.nonfinite} for c in counted if c.found.nonfinite],
    }


def pooled(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of one pair of runs together: counts, expectations and variances add up."""
    totals = {c: sum(r[c] for r in rows) for c in ("numel", "nonfinite", "changed_a", "changed_b", "changed_both")}
    finite, both = totals["numel"] - totals["nonfinite"], totals["changed_both"]
    found = {**totals, **pair_metrics(both, totals["changed_a"], totals["changed_b"], finite)}
    expected = sum(r["expected_uniform"] for r in rows)
    found |= {"expected_uniform": expected, "over_uniform": tables.ratio(both, expected)}
    for name in ("magnitude", "row", "column"):
        known = [r for r in rows if f"variance_{name}" in r]
        if known:
            part = sum(r["changed_both"] for r in known)
            found |= chance_metrics(
                name, part, sum(r[f"expected_{name}"] for r in known), sum(r[f"variance_{name}"] for r in known)
            )
    return found


def whole_model(rows: list[dict[str, Any]], finite: int) -> list[dict[str, Any]]:
    """Pair by pair. `expected_uniform` is stratified by tensor; `expected_uniform_global` is the paper's, by the density
    of the whole model."""
    found = []
    for pair in dict.fromkeys((r["run_a"], r["run_b"]) for r in rows):
        total = pooled([r for r in rows if (r["run_a"], r["run_b"]) == pair])
        everywhere = float(expected_uniform(total["changed_a"], total["changed_b"], finite))
        found.append(
            {
                "run_a": pair[0],
                "run_b": pair[1],
                **total,
                "expected_uniform_global": everywhere,
                "over_uniform_global": tables.ratio(total["changed_both"], everywhere),
            }
        )
    return found


def grouped(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["run_a"], row["run_b"], row[key]), []).append(row)
    return [{"run_a": a, "run_b": b, key: value, **pooled(members)} for (a, b, value), members in groups.items()]


def format_text(result: Overlaps) -> list[str]:
    """A finished overlap in a few lines, for the terminal."""
    summary = result.summary
    text = [f"run {name}: {printable(path)}" for name, path in summary["runs"].items()]
    text.append(
        f"{summary['tensors']} tensors, {summary['coordinates']:,} coordinates; changed: visible |delta| > {summary['atol']:g}"
    )
    text.append(f"{'runs':6}{'changed':>18}{'coverage':>20}{'Jaccard':>9}{'over uniform':>14}{'over |W|':>10}{'z':>10}")
    for p in summary["pairs"]:
        densities = f"{percent(fraction(p['changed_a'], summary['coordinates']))} {percent(fraction(p['changed_b'], summary['coordinates']))}"
        coverage = f"{percent(p['coverage_a'])} {percent(p['coverage_b'])}"
        text.append(
            f"{p['run_a']} {p['run_b']:4}{densities:>18}{coverage:>20}{percent(p['jaccard']):>9}{times(p['over_uniform_global']):>14}"
            f"{times(p['over_magnitude']):>10}{measure(p['z_magnitude']):>10}"
        )
        for strata in ("row", "column"):
            if f"over_{strata}" in p:
                text.append(
                    f"  within {strata}s and |W|: {times(p[f'over_{strata}'])} chance, z {measure(p[f'z_{strata}'])}"
                )
    text += [f"excluded: {printable(e['name'])}: {printable(e['reason'])}" for e in summary["excluded"][:10]]
    text += [
        f"NaN or Inf: {printable(e['name'])}: {e['coordinates']} coordinates left out"
        for e in summary["nonfinite"][:10]
    ]
    if result.path is not None:
        text.append(f"{result.run['seconds']:.2f} s; written to {printable(str(result.path))}")
    return text
