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
    Metric(
        name="changed_a",
        label="changed by A",
        definition="coordinates with visible |Δ| > atol in run A",
        range=COUNT,
        format="count",
        source=PAPER,
    ),
    Metric(
        name="changed_b",
        label="changed by B",
        definition="coordinates with visible |Δ| > atol in run B",
        range=COUNT,
        format="count",
        source=PAPER,
    ),
    Metric(
        name="changed_both",
        label="changed by both",
        definition="coordinates with visible |Δ| > atol in both runs",
        range=COUNT,
        format="count",
    ),
    Metric(
        name="coverage_a",
        label="A covered by B",
        definition="fraction of what run A changed that run B changed too",
        source=PAPER,
    ),
    Metric(
        name="coverage_b",
        label="B covered by A",
        definition="fraction of what run B changed that run A changed too",
        source=PAPER,
    ),
    Metric(name="jaccard", label="Jaccard", definition="changed by both over changed by either", source=PAPER),
    Metric(
        name="both_zero", label="changed by neither", definition="fraction of the coordinates that neither run changed"
    ),
    Metric(name="only_a", label="changed by A only", definition="fraction of the coordinates that run A alone changed"),
    Metric(name="only_b", label="changed by B only", definition="fraction of the coordinates that run B alone changed"),
)


def strata_metrics(name: str, label: str, chance: str) -> tuple[Metric, ...]:
    """Expected count, variance, ratio and z-score for one kind of strata."""
    return (
        Metric(
            name=f"expected_{name}",
            label=f"expected, {label}",
            definition=f"changed by both, expected from {chance}",
            range=COUNT,
            format="measure",
        ),
        Metric(
            name=f"over_{name}",
            label=label,
            definition=f"changed by both over {chance}",
            range=NON_NEGATIVE,
            format="times",
            **CHANCE,
        ),
        Metric(
            name=f"z_{name}",
            label=f"z, {label}",
            definition=f"standard deviations above {chance}",
            range="",
            format="measure",
            **CHANCE,
        ),
        Metric(
            name=f"variance_{name}",
            label=f"variance, {label}",
            definition=f"variance of the count under {chance}",
            range="",
            format="measure",
        ),
    )


METRICS = tuple(
    replace(metric, tables=("overlap",), views=("visible",))
    for metric in (
        *(
            replace(metric, **PAGE) if metric.name not in ("changed_both", "both_zero", "only_a", "only_b") else metric
            for metric in COUNTS
        ),
        Metric(
            name="expected_uniform_global",
            label="expected, uniform over the model",
            definition="changed by both, expected from the densities of the whole model; summary.json only",
            range=COUNT,
            format="measure",
            source=PAPER,
        ),
        Metric(
            name="over_uniform_global",
            label="uniform over the model",
            definition="changed by both over chance from the densities of the whole model; summary.json only",
            range=NON_NEGATIVE,
            format="times",
            source=PAPER,
            section="over chance",
        ),
        Metric(
            name="expected_uniform",
            label="expected, uniform",
            definition="changed by both, expected from the densities of each tensor",
            range=COUNT,
            format="measure",
        ),
        Metric(
            name="over_uniform",
            label="uniform per tensor",
            definition="changed by both over chance from the densities of each tensor",
            range=NON_NEGATIVE,
            format="times",
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
