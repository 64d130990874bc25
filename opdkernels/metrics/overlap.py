"""Metrics of the overlap of two runs, A and B: which coordinates both changed, and what chance alone gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opdkernels.metrics.groups import ratio
from opdkernels.metrics.registry import COUNT, NON_NEGATIVE, PAPER, Metric
from opdkernels.ops.overlap import z_score

PAGE: dict[str, Any] = {"pages": {"overlap": ("",)}}
CHANCE: dict[str, Any] = {"section": "over chance", **PAGE}

COUNTS = (
    Metric("changed_a", "changed by A", "coordinates with visible |Δ| > atol in run A", COUNT, "count", source=PAPER),
    Metric("changed_b", "changed by B", "coordinates with visible |Δ| > atol in run B", COUNT, "count", source=PAPER),
    Metric("changed_both", "changed by both", "coordinates with visible |Δ| > atol in both runs", COUNT, "count"),
    Metric("coverage_a", "A covered by B", "fraction of what run A changed that run B changed too", source=PAPER),
    Metric("coverage_b", "B covered by A", "fraction of what run B changed that run A changed too", source=PAPER),
    Metric("jaccard", "Jaccard", "changed by both over changed by either", source=PAPER),
    Metric("both_zero", "changed by neither", "fraction of the coordinates that neither run changed"),
    Metric("only_a", "changed by A only", "fraction of the coordinates that run A alone changed"),
    Metric("only_b", "changed by B only", "fraction of the coordinates that run B alone changed"),
)


def strata_metrics(name: str, label: str, chance: str) -> tuple[Metric, ...]:
    """Expected count, variance, ratio and z-score for one kind of strata."""
    return (
        Metric(f"expected_{name}", f"expected, {label}", f"changed by both, expected from {chance}", COUNT, "measure"),
        Metric(f"over_{name}", label, f"changed by both over {chance}", NON_NEGATIVE, "times", **CHANCE),
        Metric(f"z_{name}", f"z, {label}", f"standard deviations above {chance}", "", "measure", **CHANCE),
        Metric(f"variance_{name}", f"variance, {label}", f"variance of the count under {chance}", "", "measure"),
    )


METRICS = tuple(
    replace(metric, tables=("overlap",), views=("visible",))
    for metric in (
        *(
            replace(metric, **PAGE) if metric.name not in ("changed_both", "both_zero", "only_a", "only_b") else metric
            for metric in COUNTS
        ),
        Metric(
            "expected_uniform_global",
            "expected, uniform over the model",
            "changed by both, expected from the densities of the whole model; summary.json only",
            COUNT,
            "measure",
            source=PAPER,
        ),
        Metric(
            "over_uniform_global",
            "uniform over the model",
            "changed by both over chance from the densities of the whole model; summary.json only",
            NON_NEGATIVE,
            "times",
            source=PAPER,
            section="over chance",
        ),
        Metric(
            "expected_uniform",
            "expected, uniform",
            "changed by both, expected from the densities of each tensor",
            COUNT,
            "measure",
        ),
        Metric(
            "over_uniform",
            "uniform per tensor",
            "changed by both over chance from the densities of each tensor",
            NON_NEGATIVE,
            "times",
            **CHANCE,
        ),
        *strata_metrics(
            "magnitude",
            "magnitude-conditioned",
            "the magnitude-conditioned chance level: chance among coordinates with the same |W| in bf16, per tensor "
            "(hypergeometric)",
        ),
        *strata_metrics("row", "within rows", "chance within classes of |W| of each row (with --strata row)"),
        *strata_metrics(
            "column", "within columns", "chance within classes of |W| of each column (with --strata column)"
        ),
    )
)


def pair_metrics(both: float, a: float, b: float, n: float) -> dict[str, float | None]:
    """Fractions of a pair of runs, None where the denominator is 0.

    Args:
        both: Coordinates that both runs changed.
        a: Coordinates that run A changed.
        b: Coordinates that run B changed.
        n: Finite coordinates.
    """
    either = a + b - both
    return {
        "coverage_a": ratio(both, a),
        "coverage_b": ratio(both, b),
        "jaccard": ratio(both, either),
        "both_zero": ratio(n - either, n),
        "only_a": ratio(a - both, n),
        "only_b": ratio(b - both, n),
    }


def chance_metrics(name: str, both: float, expected: float, variance: float) -> dict[str, float | None]:
    """Observed over expected, and its z-score, for one kind of strata (magnitude, row, column)."""
    return {
        f"expected_{name}": expected,
        f"over_{name}": ratio(both, expected),
        f"z_{name}": z_score(both, expected, variance) if variance > 0 else None,
    }
