"""Metrics of the null: what is expected from bf16 rounding alone, and the observed metrics relative to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from opdkernels.metrics.aggregation import MEAN_BY_CHANGED_NULL, SUM, Members, recomputed
from opdkernels.metrics.batch import RATIO_LABELS, RATIO_SYMBOL, Columns
from opdkernels.metrics.registry import NON_NEGATIVE, Aggregation, Metric, family, interleave
from opdkernels.metrics.rounding_null import KINDS, Null
from opdkernels.spectral.exact import RATIOS

VISIBLE = ("visible",)
SECTION = "against bf16 rounding alone"
BOTH_TABLES = ("tensors", "groups")


def over_null_of_group(label: str) -> Aggregation:
    """Near-zero coverage of a group over its expected coverage, from the means of both."""

    def compute(members: Members) -> np.ndarray:
        observed = members.mean(label, members.columns["changed"])
        return observed / members.mean(f"{label}_null", members.columns["changed_null"])

    return recomputed("from the means of both", compute)


def of_each_kind(metric: Metric) -> list[Metric]:
    """The metric of each kind of null, per tensor only."""
    return [
        replace(
            metric,
            name=f"{metric.name}_{kind}",
            label=f"{metric.label}, {kind}",
            definition=f"the same under the {kind} null",
            tables=("tensors",),
            family=f"{metric.family.split(' … ')[0] or metric.name}_{KINDS[0]} …",
            family_definition="the same under each kind of null (sign, normal, empirical)",
        )
        for kind in KINDS
    ]


CHANGED_NULL = Metric(
    name="changed_null",
    label="expected changes",
    definition="coordinates expected to change visibly from bf16 rounding alone, under the nearest null",
    range="expected count",
    format="measure",
    aggregation=SUM,
    tables=BOTH_TABLES,
    views=VISIBLE,
)
COVERAGE_NULL = family(
    Metric(
        name="near_zero_coverage_{}_null",
        label="expected near-zero coverage at {}",
        definition="near-zero coverage at {} expected from bf16 rounding alone, under the nearest null",
        aggregation=MEAN_BY_CHANGED_NULL,
        tables=BOTH_TABLES,
        views=VISIBLE,
    ),
    RATIO_LABELS,
    RATIO_SYMBOL,
)
COVERAGE_OVER_NULL = family(
    Metric(
        name="near_zero_coverage_{}_over_null",
        label="near-zero / expected",
        definition="near-zero coverage at {}, observed over expected from bf16 rounding alone: 1× means that rounding "
        "explains it",
        range=NON_NEGATIVE,
        format="times",
        tables=BOTH_TABLES,
        views=VISIBLE,
        section=SECTION,
    ),
    RATIO_LABELS,
    RATIO_SYMBOL,
    {"10pct": {"pages": {"groups": VISIBLE, "tensors": VISIBLE}}},
)
METRICS = (
    Metric(
        name="null_kind",
        label="nearest null",
        definition="the kind of null whose expected |Δ| is nearest to the observed one: sign (±a, one size), normal "
        "(Gaussian) or empirical (the |Δ| seen among the smallest tenth of |W|)",
        range="sign, normal, empirical",
        format="text",
        views=VISIBLE,
        pages={"tensors": VISIBLE},
        section=SECTION,
    ),
    Metric(
        name="null_size",
        label="null size",
        definition="root mean square of the dense update of the nearest null",
        range="units of the weights",
        format="measure",
        views=VISIBLE,
    ),
    Metric(
        name="null_distance",
        label="null distance",
        definition="total variation distance between the observed and the expected |Δ| of the nearest null: the "
        "fraction of coordinates that would have to change bins for the two to agree",
        views=VISIBLE,
        pages={"tensors": VISIBLE},
        section=SECTION,
    ),
    CHANGED_NULL,
    Metric(
        name="changed_over_null",
        label="changed / expected",
        definition="changed coordinates, observed over expected from bf16 rounding alone: 1× is no more and no fewer",
        range=NON_NEGATIVE,
        format="times",
        aggregation=recomputed("from both sums", lambda members: members.sum("changed") / members.sum("changed_null")),
        tables=BOTH_TABLES,
        views=VISIBLE,
        pages={"groups": VISIBLE, "tensors": VISIBLE, "trajectory": VISIBLE},
        section=SECTION,
    ),
    *of_each_kind(CHANGED_NULL),
    *interleave(
        COVERAGE_NULL,
        [
            replace(metric, aggregation=over_null_of_group(f"near_zero_coverage_{label}"))
            for metric, label in zip(COVERAGE_OVER_NULL, RATIO_LABELS, strict=True)
        ],
        *zip(*map(of_each_kind, COVERAGE_NULL), strict=True),
    ),
)


def null_metrics(columns: Columns, fitted: list[dict[str, Null]]) -> dict[str, Any]:
    """The metrics of the null of each tensor; `_null` is the nearest kind, the others have the kind in their names.

    Args:
        columns: Metrics of the visible view, from `compute_metrics` [tensors].
        fitted: For each tensor its nulls by kind, and the nearest as "chosen", from `rounding_null.fit_many`.

    Returns:
        Metric name -> float64 [tensors], NaN where a tensor lacks the metric; `null_kind` is a list of names.
    """
    chosen = [nulls["chosen"] for nulls in fitted]
    has_changed = columns["changed"] > 0

    def column(kind: str, value: Callable[[Null], float]) -> np.ndarray:
        return np.array([value(nulls[kind]) if kind in nulls else np.nan for nulls in fitted])

    metrics: dict[str, Any] = {
        "null_kind": [null.kind if change else None for null, change in zip(chosen, has_changed, strict=True)],
        "null_size": np.where(has_changed, column("chosen", lambda null: null.size), np.nan),
        "null_distance": np.where(has_changed, column("chosen", lambda null: null.distance), np.nan),
    }
    with np.errstate(divide="ignore", invalid="ignore"):
        changed = {kind: column(kind, lambda null: null.changed) for kind in ("chosen", *KINDS)}
        metrics["changed_null"] = changed["chosen"]
        metrics["changed_over_null"] = columns["changed"] / nan_where_zero(changed["chosen"])
        metrics |= {f"changed_null_{kind}": changed[kind] for kind in KINDS}
        for ratio, ratio_name in zip(RATIOS, RATIO_LABELS, strict=True):
            label = f"near_zero_coverage_{ratio_name}"
            coverage = {
                kind: column(kind, partial(near_zero_changes, ratio)) / nan_where_zero(changed[kind])
                for kind in changed
            }
            metrics[f"{label}_null"] = coverage["chosen"]
            metrics[f"{label}_over_null"] = columns[label] / nan_where_zero(coverage["chosen"])
            metrics |= {f"{label}_null_{kind}": coverage[kind] for kind in KINDS}
    return metrics


def near_zero_changes(ratio: float, null: Null) -> float:
    """Expected changes among the ceil(ratio n) smallest |W|."""
    return null.near_zero[ratio]


def nan_where_zero(values: np.ndarray) -> np.ndarray:
    """NaN instead of 0, for denominators."""
    return np.where(values == 0, np.nan, values)
