"""The table and the summary of `overlap`, from the joint counts of every tensor."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from opdkernels.checkpoint.match import Match
from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.metrics import groups
from opdkernels.metrics.groups import Row, ratio
from opdkernels.metrics.overlap import chance_metrics, pair_metrics
from opdkernels.ops.overlap import Overlap, expected_uniform


@dataclass
class TensorOverlap:
    """One tensor of all runs: its joint counts, and by stratum (row, column) the expectation and the variance of the
    overlap of each pair of runs if changes were independent within stratum and |W|, [runs, runs] each."""

    match: Match
    counts: Overlap
    strata: dict[str, tuple[np.ndarray, np.ndarray]]


def run_names(count: int) -> list[str]:
    """Runs are called A, B, C, … in the order given."""
    return [chr(ord("A") + i) for i in range(count)]


def tensor_rows(tensor: TensorOverlap) -> list[Row]:
    """One row per pair of runs."""
    counts, role = tensor.counts, parse_tensor_name(tensor.match.name)
    names = run_names(counts.n_runs)
    rows = []
    for a, b in itertools.combinations(range(counts.n_runs), 2):
        both = counts.n_both(a, b)
        variance = counts.variance_magnitude(a, b)
        row = {
            "name": tensor.match.name,
            "shape": json.dumps(list(tensor.match.shape)),
            "layer": role.layer,
            "module": role.module,
            "block": role.block,
            "run_a": names[a],
            "run_b": names[b],
            "numel": counts.numel,
            "nonfinite": counts.nonfinite,
            "changed_a": counts.n_changed(a),
            "changed_b": counts.n_changed(b),
            "changed_both": both,
            **pair_metrics(both, counts.n_changed(a), counts.n_changed(b), counts.finite),
            "expected_uniform": counts.expected_uniform(a, b),
            "over_uniform": ratio(both, counts.expected_uniform(a, b)),
            **chance_metrics("magnitude", both, counts.expected_magnitude(a, b), variance),
            "variance_magnitude": variance,
        }
        for stratum, (expected, variances) in tensor.strata.items():
            row |= chance_metrics(stratum, both, float(expected[a, b]), float(variances[a, b]))
            row[f"variance_{stratum}"] = float(variances[a, b])
        rows.append(row)
    return rows


def summarize(
    paths: list[str],
    tensors: list[TensorOverlap],
    rows: list[Row],
    excluded: list[dict[str, str]],
    atol: float,
) -> dict[str, Any]:
    """The content of summary.json. paths: of the base and the runs."""
    n_runs = tensors[0].counts.n_runs
    num_changed_in = sum((tensor.counts.hist_num_runs for tensor in tensors), np.zeros(n_runs + 1, np.int64))
    finite = int(num_changed_in.sum())
    return {
        "schema_version": groups.TABLE_VERSION,
        "base": paths[0],
        "runs": dict(zip(run_names(n_runs), paths[1:], strict=True)),
        "atol": atol,
        "tensors": len(tensors),
        "coordinates": finite,
        "changed_in_exactly": {str(j): int(count) for j, count in enumerate(num_changed_in)},
        "pairs": model_rows(rows, finite),
        "by_module": grouped_rows(rows, "module"),
        "by_layer": grouped_rows(rows, "layer"),
        "excluded": excluded,
        "nonfinite": [
            {"name": tensor.match.name, "coordinates": tensor.counts.nonfinite}
            for tensor in tensors
            if tensor.counts.nonfinite
        ],
    }


def pool_rows(rows: list[Row]) -> Row:
    """The rows of one pair of runs combined: counts, expectations and variances add up."""
    counts = ("numel", "nonfinite", "changed_a", "changed_b", "changed_both")
    totals = {name: sum(row[name] for row in rows) for name in counts}
    finite, both = totals["numel"] - totals["nonfinite"], totals["changed_both"]
    pooled = {**totals, **pair_metrics(both, totals["changed_a"], totals["changed_b"], finite)}
    expected = sum(row["expected_uniform"] for row in rows)
    pooled |= {"expected_uniform": expected, "over_uniform": ratio(both, expected)}
    for name in ("magnitude", "row", "column"):
        known = [row for row in rows if f"variance_{name}" in row]
        if known:
            known_both = sum(row["changed_both"] for row in known)
            known_expected = sum(row[f"expected_{name}"] for row in known)
            known_variance = sum(row[f"variance_{name}"] for row in known)
            pooled |= chance_metrics(name, known_both, known_expected, known_variance)
    return pooled


def model_rows(rows: list[Row], finite: int) -> list[Row]:
    """One row per pair of runs for the whole model. `expected_uniform` is stratified by tensor;
    `expected_uniform_global` is the paper's, from the density of the whole model."""
    result = []
    for pair in dict.fromkeys((row["run_a"], row["run_b"]) for row in rows):
        total = pool_rows([row for row in rows if (row["run_a"], row["run_b"]) == pair])
        expected = float(expected_uniform(total["changed_a"], total["changed_b"], finite))
        result.append(
            {
                "run_a": pair[0],
                "run_b": pair[1],
                **total,
                "expected_uniform_global": expected,
                "over_uniform_global": ratio(total["changed_both"], expected),
            }
        )
    return result


def grouped_rows(rows: list[Row], key: str) -> list[Row]:
    """One row per pair of runs and value of a column."""
    members: dict[tuple, list[Row]] = {}
    for row in rows:
        members.setdefault((row["run_a"], row["run_b"], row[key]), []).append(row)
    return [{"run_a": a, "run_b": b, key: value, **pool_rows(group)} for (a, b, value), group in members.items()]
