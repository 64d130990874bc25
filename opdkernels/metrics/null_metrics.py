"""Metrics of the null: what is expected from bf16 rounding alone, and the observed metrics relative to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from opdkernels.metrics.aggregation import MEAN_BY_CHANGED_NULL, MEAN_BY_ENERGY, SUM, Aggregation, Members, recomputed
from opdkernels.metrics.batch import RATIO_LABELS, RATIO_SYMBOL, Columns
from opdkernels.metrics.coordinates import TOP_FRACTIONS, TOP_LABELS, TOP_SYMBOL
from opdkernels.metrics.registry import NON_NEGATIVE, Metric, family, interleave
from opdkernels.ops.delta.many import SparseTally
from opdkernels.ops.null import Nulls, fit_many
from opdkernels.ops.null.layout import FIT_CHANGED, FIT_CHANGED_SD, FIT_DISTANCE, FIT_SIZE, KINDS
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


def fit_tallies(tallies: Sequence[SparseTally], remainders: Sequence[str], limits: Sequence[int] = ()) -> Nulls:
    """The null updates fitted to tallies, with the ratios and fractions that `null_metrics` needs.

    Args:
        tallies: The tallies of the tensors.
        remainders: Of each tensor, as for `ops.null.fit_many`.
        limits: As for `ops.null.fit_many`.
    """
    return fit_many(
        [tally.bin_bits for tally in tallies],
        [tally.hist_base for tally in tallies],
        [tally.hist_delta for tally in tallies],
        remainders,
        ratios=RATIOS,
        fractions=TOP_FRACTIONS,
        limits=limits,
    )


def null_metrics(columns: Columns, nulls: Nulls) -> dict[str, Any]:
    """The metrics of the null of each tensor; `_null` is the nearest kind, the others have the kind in their names.

    Args:
        columns: Metrics of the visible view, from `compute_metrics` [tensors].
        nulls: Of the tensors, from `fit_tallies`.

    Returns:
        Metric name -> float64 [tensors], NaN where a tensor lacks the metric; `null_kind` is a list of names.
    """
    has_changed = columns["changed"] > 0

    def of_chosen(column: int) -> np.ndarray:
        return np.where(has_changed, nulls.of_kind("chosen", nulls.fits)[:, column], np.nan)

    metrics: dict[str, Any] = {
        "null_kind": [
            KINDS[kind] if change else None for kind, change in zip(nulls.chosen.tolist(), has_changed, strict=True)
        ],
        "null_size": of_chosen(FIT_SIZE),
        "null_distance": of_chosen(FIT_DISTANCE),
    }
    with np.errstate(divide="ignore", invalid="ignore"):
        changed = {kind: nulls.of_kind(kind, nulls.fits)[:, FIT_CHANGED] for kind in ("chosen", *KINDS)}
        metrics["changed_null"] = changed["chosen"]
        metrics["changed_over_null"] = columns["changed"] / nan_where_zero(changed["chosen"])
        metrics["changed_null_sd"] = nulls.of_kind("chosen", nulls.fits)[:, FIT_CHANGED_SD]
        metrics |= {f"changed_null_{kind}": np.where(has_changed, changed[kind], np.nan) for kind in KINDS}
        deviation = nulls.of_kind("chosen", nulls.near_zero_sd)
        for k, ratio_name in enumerate(RATIO_LABELS):
            label = f"near_zero_coverage_{ratio_name}"
            coverage = {
                kind: nulls.of_kind(kind, nulls.near_zero)[:, k] / nan_where_zero(changed[kind]) for kind in changed
            }
            metrics[f"{label}_null"] = coverage["chosen"]
            metrics[f"{label}_null_sd"] = np.where(changed["chosen"] > 0, deviation[:, k], np.nan)
            metrics[f"{label}_over_null"] = columns[label] / nan_where_zero(coverage["chosen"])
            metrics |= {f"{label}_null_{kind}": coverage[kind] for kind in KINDS}
        for k, fraction_name in enumerate(TOP_LABELS):
            label = f"top_energy_{fraction_name}"
            metrics[f"{label}_null"], metrics[f"{label}_null_sd"] = nulls.top_energy[:, k], nulls.top_energy_sd[:, k]
            metrics[f"{label}_over_null"] = columns[label] / nan_where_zero(nulls.top_energy[:, k])
    return metrics


def nan_where_zero(values: np.ndarray) -> np.ndarray:
    """NaN instead of 0, for denominators."""
    return np.where(values == 0, np.nan, values)
