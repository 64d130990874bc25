"""Metrics of matrices that are expected from bf16 rounding alone, and the observed ones relative to them.

The null is a dense update whose entries are independent of W and of each other, with the observed visible energy,
stored as the pair is stored (`opdkernels.spectral.null`). Conditioned on magnitude, as many coordinates of each |W| as
changed are drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from opdkernels.metrics.aggregation import MEAN_OVER_MATRICES
from opdkernels.metrics.batch import RATIO_LABELS, RATIO_SYMBOL
from opdkernels.metrics.random_matrix import largest_eigenvalue_deviation, random_spectrum
from opdkernels.metrics.registry import NON_NEGATIVE, Metric, family, interleave
from opdkernels.metrics.spectra import COMPOSITES, SUBSPACE, SpectrumRecord

COVERAGES = [f"{name}_coverage" for name in COMPOSITES]
SUBTRACTED = "nonprincipal_or_low_coverage"  # nearly all of the changes in any case: a ratio says nothing
SUMMARIZED = {"10pct": {"aggregation": MEAN_OVER_MATRICES, "tables": ("geometry", "trajectory")}}
SUMMARIZED_ONLY = {"10pct": {"aggregation": MEAN_OVER_MATRICES}}
FLOOR = 1e-12  # expectations below it are the rounding of their sums
SINE_NOISE = 1e-7  # sines below 3e-8 are noise
Row = dict[str, Any]

SPECTRUM_GROUPS: dict[str, Any] = {"aggregation": MEAN_OVER_MATRICES, "tables": ("spectra", "trajectory")}
SPECTRUM_NULL_METRICS = tuple(
    metric
    for name, label, range_, format_ in (
        ("stable_rank", "stable rank", "1 to min(m, n)", "measure"),
        ("energy_16", "energy of the top 16", "0 to 1", "percent"),
    )
    for metric in (
        Metric(
            name=f"{name}_null",
            label=f"{label} of a random update",
            definition=f"`{name}` of a matrix of the same shape whose entries are independent, with the variance at "
            "each |W| that bf16 rounding leaves",
            range=range_,
            format=format_,  # type: ignore[arg-type]
            source="Marchenko and Pastur 1967",
            **SPECTRUM_GROUPS,
        ),
        Metric(
            name=f"{name}_null_sd",
            label=f"{label} of a random update, deviation",
            definition=f"standard deviation of `{name}_null` over random updates, at most",
            range=range_,
            format=format_,  # type: ignore[arg-type]
            aggregation=MEAN_OVER_MATRICES,
            source="Johnstone 2001",
            tables=("spectra",),
        ),
        Metric(
            name=f"{name}_over_null",
            label=f"{label} / random",
            definition=f"`{name}` over that of a random update: 1× is an update without directions",
            range=NON_NEGATIVE,
            format="times",
            aggregation=MEAN_OVER_MATRICES,
            tables=("spectra",),
        ),
    )
)


def at_ratios(
    name: str, label: str, definition: str, overrides: Mapping[str, Mapping[str, Any]] | None = None, **fields: Any
) -> list[Metric]:
    """A metric of geometry.parquet at each ratio; `{}` in the name is replaced by the ratio."""
    pattern = Metric(name=name, label=f"{label} at {{}}", definition=definition, tables=("geometry",), **fields)
    return family(pattern, RATIO_LABELS, RATIO_SYMBOL, overrides)


def null_family(name: str, label: str) -> list[Metric]:
    """Expected value, its standard deviation, and observed over expected (or minus expected) of one metric."""
    expected = at_ratios(
        f"{name}_{{}}_null",
        f"{label}, expected",
        f"`{name}` expected from bf16 rounding alone: of a dense update that is independent of W, with the same "
        "visible energy and stored as the pair is",
        SUMMARIZED,
        format="measure" if "rotation" in name else "percent",
    )
    deviation = at_ratios(
        f"{name}_{{}}_null_sd",
        f"{label}, expected, deviation",
        f"standard deviation of `{name}` over such updates",
        SUMMARIZED_ONLY,
        format="measure" if "rotation" in name else "percent",
    )
    if name == SUBTRACTED:
        relative = at_ratios(
            f"{name}_{{}}_minus_null",
            f"{label}, minus expected",
            f"`{name}` minus its expectation from bf16 rounding alone",
            SUMMARIZED_ONLY,
            range="−1 to 1",
        )
    else:
        relative = at_ratios(
            f"{name}_{{}}_over_null",
            f"{label} / expected",
            f"`{name}`, observed over expected from bf16 rounding alone: 1× means that rounding explains it",
            {"10pct": {"aggregation": MEAN_OVER_MATRICES}},
            range=NON_NEGATIVE,
            format="times",
        )
    return interleave(expected, deviation, relative)


def magnitude_family(name: str, label: str) -> list[Metric]:
    """The magnitude-conditioned chance level of a coverage, and how far the observed one is from it."""
    return interleave(
        at_ratios(
            f"{name}_{{}}_magnitude",
            f"{label}, magnitude-conditioned",
            f"`{name}` if the changed coordinates were drawn at random among those of the same |W|",
            SUMMARIZED_ONLY,
        ),
        at_ratios(
            f"{name}_{{}}_z_magnitude",
            f"{label}, z",
            f"standard deviations by which `{name}` is above its magnitude-conditioned chance level",
            SUMMARIZED_ONLY,
            range="",
            format="measure",
        ),
    )


LABELS = {
    "projection": "energy within",
    "projection_left": "energy within, left,",
    "projection_right": "energy within, right,",
    "rotation_left": "rotation, left,",
    "rotation_right": "rotation, right,",
    "principal_coverage": "principal coverage",
    "principal_not_low_coverage": "principal, not near-zero coverage",
    "nonprincipal_or_low_coverage": "not principal or near-zero coverage",
}
DRIFT = Metric(
    name="drift_null",
    label="drift, expected",
    definition="`drift` of a dense update that is independent of W, with the same visible energy and stored as the "
    "pair is; null if the update is above 3 % of ‖W‖. `drift_over_delta` has the same ratio",
    range=NON_NEGATIVE,
    format="measure",
    aggregation=MEAN_OVER_MATRICES,
    tables=("geometry", "trajectory"),
)
NULL_METRICS = (
    *(metric for name in (*SUBSPACE, *COVERAGES) for metric in null_family(name, LABELS[name])),
    DRIFT,
    replace(
        DRIFT,
        name="drift_null_sd",
        label="drift, expected, deviation",
        definition="standard deviation of `drift` over such updates",
        tables=("geometry",),
    ),
    replace(
        DRIFT,
        name="drift_over_null",
        label="drift / expected",
        definition="`drift`, observed over expected from bf16 rounding alone: 1× means that rounding explains it",
        format="times",
        tables=("geometry",),
    ),
    *(metric for name in COVERAGES for metric in magnitude_family(name, LABELS[name])),
)


def null_of_spectrum(record: SpectrumRecord, metrics: Mapping[str, float | None]) -> Row:
    """The metrics `SPECTRUM_NULL_METRICS` of a row of spectra.parquet with the given metrics."""
    if not record.method:
        return {metric.name: None for metric in SPECTRUM_NULL_METRICS}
    stable_rank, energy = random_spectrum(record.m, record.n)
    factors = record.profile_factors if record.profile_factors.size else (1.0, 1.0)
    deviation = largest_eigenvalue_deviation(record.m, record.n)
    row: Row = {}
    for name, null, factor in zip(("stable_rank", "energy_16"), (stable_rank, energy[16]), factors, strict=True):
        row |= {f"{name}_null": null * float(factor), f"{name}_null_sd": null * float(factor) * deviation}
        row[f"{name}_over_null"] = over(metrics[name], row[f"{name}_null"])
    return row


def null_of_geometry(record: SpectrumRecord, metrics: Mapping[str, float | None]) -> Row:
    """The metrics `NULL_METRICS` of a row of geometry.parquet with the given metrics."""
    row: Row = {}

    def add(name: str, mean: float | None, deviation: float | None) -> None:
        """The expected value of a metric, and the observed one relative to it."""
        observed = metrics[name]
        row[f"{name}_null"], row[f"{name}_null_sd"] = mean, deviation
        if name.startswith(SUBTRACTED):
            row[f"{name}_minus_null"] = None if observed is None or mean is None else observed - mean
        else:
            row[f"{name}_over_null"] = over(observed, mean, SINE_NOISE if "rotation" in name else FLOOR)

    for i, name in enumerate(SUBSPACE):
        for j, label in enumerate(RATIO_LABELS):
            add(f"{name}_{label}", *pair_of(record.null_subspace, i, j))
    for i, name in enumerate(COVERAGES):
        for j, label in enumerate(RATIO_LABELS):
            add(f"{name}_{label}", *pair_of(record.null_coverage, 0, j, i))
    add("drift", *pair_of(record.null_drift))
    for i, name in enumerate(COVERAGES):
        for j, label in enumerate(RATIO_LABELS):
            mean, deviation = pair_of(record.null_coverage, 1, j, i)
            observed = metrics[f"{name}_{label}"]
            row[f"{name}_{label}_magnitude"] = mean
            known = observed is not None and mean is not None and deviation
            row[f"{name}_{label}_z_magnitude"] = (observed - mean) / deviation if known else None  # type: ignore
    return row


def pair_of(values: np.ndarray, *index: int) -> tuple[float | None, float | None]:
    """Mean and standard deviation at an index; None where they are unknown."""
    if not values.size:
        return None, None
    mean, deviation = (float(value) for value in values[index])
    return (None, None) if np.isnan(mean) else (mean, deviation)


def over(observed: float | None, expected: float | None, floor: float = FLOOR) -> float | None:
    """A ratio; None if a side is unknown or less is expected than `floor`."""
    return None if observed is None or expected is None or expected < floor else observed / expected
