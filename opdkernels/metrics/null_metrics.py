"""Metrics of the null: what is expected from bf16 rounding alone, and the observed metrics relative to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from opdkernels.metrics.aggregation import MEAN_BY_CHANGED_NULL, MEAN_BY_ENERGY, SUM, Aggregation, Members, recomputed
from opdkernels.metrics.batch import RATIO_LABELS, RATIO_SYMBOL, Columns
from opdkernels.metrics.coordinates import TOP_FRACTIONS, TOP_LABELS, TOP_SYMBOL
from opdkernels.metrics.registry import NON_NEGATIVE, Metric, family, interleave
from opdkernels.metrics.rounding_null import KINDS, Null
from opdkernels.ops.delta import magnitudes
from opdkernels.spectral.exact import RATIOS

BATCH = 128  # nulls at a time: arrays stay near the caches
VISIBLE = ("visible",)
SECTION = "against bf16 rounding alone"
BOTH_TABLES = ("tensors", "groups")


def over_null_of_group(label: str) -> Aggregation:
    """Near-zero coverage of a group over its expected coverage, from the means of both."""

    def compute(members: Members) -> np.ndarray:
        observed = members.mean(label, members.columns["changed"])
        return observed / members.mean(f"{label}_null", members.columns["changed_null"])

    return recomputed("from the means of both", compute)


def deviation_of_sum(members: Members, name: str) -> np.ndarray:
    """Standard deviation of a sum of independent counts, from that of each tensor."""
    return np.sqrt(members.total(np.nan_to_num(members.columns[name]) ** 2))


def deviation_of_mean(weight: str) -> Aggregation:
    """Standard deviation of a weighted mean of independent values, from that of each tensor."""

    def compute(members: Members, name: str) -> np.ndarray:
        weights, values = members.columns[weight], members.columns[name]
        known = ~np.isnan(values) & (weights > 0)
        total = members.total(np.where(known, weights, 0))
        squares = members.total(np.where(known, (weights * values) ** 2, 0))
        return np.sqrt(squares) / np.where(total > 0, total, np.nan)

    return Aggregation("from those of the tensors", compute)


def top_energy_over_null(label: str) -> Aggregation:
    """Top energy of a group over its expectation, from the means of both."""

    def compute(members: Members) -> np.ndarray:
        energy = members.columns["delta_energy"]
        return members.mean(label, energy) / members.mean(f"{label}_null", energy)

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
CHANGED_NULL_SD = Metric(
    name="changed_null_sd",
    label="expected changes, deviation",
    definition="standard deviation of the number of visible changes under the nearest null",
    range="expected count",
    format="measure",
    aggregation=Aggregation("from those of the tensors", deviation_of_sum),
    tables=BOTH_TABLES,
    views=VISIBLE,
)
COVERAGE_NULL_SD = family(
    Metric(
        name="near_zero_coverage_{}_null_sd",
        label="expected near-zero coverage at {}, deviation",
        definition="standard deviation of the near-zero coverage at {} under the nearest null",
        aggregation=deviation_of_mean("changed_null"),
        tables=BOTH_TABLES,
        views=VISIBLE,
    ),
    RATIO_LABELS,
    RATIO_SYMBOL,
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
    CHANGED_NULL_SD,
    *of_each_kind(CHANGED_NULL),
    *interleave(
        COVERAGE_NULL,
        COVERAGE_NULL_SD,
        [
            replace(metric, aggregation=over_null_of_group(f"near_zero_coverage_{label}"))
            for metric, label in zip(COVERAGE_OVER_NULL, RATIO_LABELS, strict=True)
        ],
        *zip(*map(of_each_kind, COVERAGE_NULL), strict=True),
    ),
    *interleave(
        family(
            Metric(
                name="top_energy_{}_null",
                label="expected top {} energy",
                definition="`top_energy_{}` expected from bf16 rounding alone, under the nearest null",
                aggregation=MEAN_BY_ENERGY,
                tables=BOTH_TABLES,
                views=VISIBLE,
            ),
            TOP_LABELS,
            TOP_SYMBOL,
        ),
        family(
            Metric(
                name="top_energy_{}_null_sd",
                label="expected top {} energy, deviation",
                definition="standard deviation of `top_energy_{}` under the nearest null",
                aggregation=deviation_of_mean("delta_energy"),
                tables=BOTH_TABLES,
                views=VISIBLE,
            ),
            TOP_LABELS,
            TOP_SYMBOL,
        ),
        [
            replace(metric, aggregation=top_energy_over_null(f"top_energy_{label}"))
            for metric, label in zip(
                family(
                    Metric(
                        name="top_energy_{}_over_null",
                        label="top {} energy / expected",
                        definition="`top_energy_{}`, observed over expected from bf16 rounding alone: 1× means "
                        "that rounding explains it",
                        range=NON_NEGATIVE,
                        format="times",
                        tables=BOTH_TABLES,
                        views=VISIBLE,
                        section=SECTION,
                    ),
                    TOP_LABELS,
                    TOP_SYMBOL,
                ),
                TOP_LABELS,
                strict=True,
            )
        ],
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
        metrics["changed_null_sd"] = column("chosen", lambda null: null.changed_sd)
        metrics |= {f"changed_null_{kind}": changed[kind] for kind in KINDS}
        for ratio, ratio_name in zip(RATIOS, RATIO_LABELS, strict=True):
            label = f"near_zero_coverage_{ratio_name}"
            coverage = {
                kind: column(kind, partial(near_zero_changes, ratio)) / nan_where_zero(changed[kind])
                for kind in changed
            }
            metrics[f"{label}_null"] = coverage["chosen"]
            deviation = column("chosen", partial(near_zero_deviation, ratio))
            metrics[f"{label}_null_sd"] = np.where(changed["chosen"] > 0, deviation, np.nan)
            metrics[f"{label}_over_null"] = columns[label] / nan_where_zero(coverage["chosen"])
            metrics |= {f"{label}_null_{kind}": coverage[kind] for kind in KINDS}
        for fraction_name, expected, deviation in zip(
            TOP_LABELS, *expected_top_energy(chosen, TOP_FRACTIONS), strict=True
        ):
            label = f"top_energy_{fraction_name}"
            metrics[f"{label}_null"], metrics[f"{label}_null_sd"] = expected, deviation
            metrics[f"{label}_over_null"] = columns[label] / nan_where_zero(expected)
    return metrics


def expected_top_energy(nulls: Sequence[Null], fractions: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Fraction of the energy in the ceil(fraction n) largest |visible delta| of null updates.

    Returns:
        Mean, and standard deviation by the delta method for independent coordinates, float64 [fractions, nulls] each;
        NaN if no change is expected.
    """
    mean = np.full((len(fractions), len(nulls)), np.nan)
    deviation = mean.copy()
    known = np.array([t for t, null in enumerate(nulls) if null.changed > 0], np.int64)
    for first in range(0, len(known), BATCH):
        batch = known[first : first + BATCH]
        mean[:, batch], deviation[:, batch] = top_energy_of_changes([nulls[t] for t in batch], fractions)
    return mean, deviation


def top_energy_of_changes(nulls: Sequence[Null], fractions: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """`expected_top_energy` of nulls that expect changes, all at once."""
    mean, deviation = np.empty((2, len(fractions), len(nulls)))
    # The bins of each null from the largest |delta| down, one after another. Counts are divided by their sum, squares
    # by their mean, so that the prefix sums of nulls of all sizes have the same magnitude.
    counts = np.maximum(np.concatenate([null.values[::-1] for null in nulls]), 0)  # differences may round below 0
    squares = np.concatenate([magnitudes[null.first : null.first + len(null.values)][::-1] for null in nulls]) ** 2
    sizes = np.array([len(null.values) for null in nulls])
    stop = np.cumsum(sizes)
    start = stop - sizes
    changes = np.add.reduceat(counts, start)
    mean_square = np.add.reduceat(counts * squares, start) / changes
    counts /= np.repeat(changes, sizes)
    squares /= np.repeat(mean_square, sizes)
    before, before_1, before_2 = (
        np.concatenate([[0.0], np.cumsum(x)]) for x in (counts, counts * squares, counts * squares**2)
    )
    numel = np.array([round(null.changed + null.unchanged) for null in nulls])
    for k, fraction in enumerate(fractions):
        taken = np.array([max(1, math.ceil(fraction * n)) for n in numel.tolist()]) / changes
        reached = np.searchsorted(before, np.minimum(before[start] + taken, before[stop]))
        last = np.maximum(reached - 1, start)  # the bin of the smallest |delta| of which coordinates are taken
        above, above_1, above_2 = (sums[last] - sums[start] for sums in (before, before_1, before_2))
        threshold = squares[last]
        top = above_1 + np.clip(taken - above, 0, counts[last]) * threshold
        # Sums of the influence of coordinates, max(square - threshold, 0) - top square, and of its square.
        influence = above_1 - threshold * above - top
        influence_sq = above_2 - 2 * threshold * above_1 + threshold**2 * above
        influence_sq += -2 * top * (above_2 - threshold * above_1) + top**2 * (before_2[stop] - before_2[start])
        mean[k] = top
        deviation[k] = np.sqrt(np.maximum(influence_sq - influence**2 * changes / numel, 0) / changes)
    return mean, deviation


def near_zero_deviation(ratio: float, null: Null) -> float:
    """Standard deviation of the near-zero coverage at a ratio."""
    return null.near_zero_sd.get(ratio, math.nan)


def near_zero_changes(ratio: float, null: Null) -> float:
    """Expected changes among the ceil(ratio n) smallest |W|."""
    return null.near_zero[ratio]


def nan_where_zero(values: np.ndarray) -> np.ndarray:
    """NaN instead of 0, for denominators."""
    return np.where(values == 0, np.nan, values)
