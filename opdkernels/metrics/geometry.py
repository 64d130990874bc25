"""Metrics of matrices from the records of their spectra (source: arXiv 2606.13657 and its script; see each function).

A metric that a record cannot give is None. Energies and norms are in the units of the weights, squared or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.metrics.aggregation import MEAN_OVER_MATRICES, NOT_AGGREGATED
from opdkernels.metrics.batch import RATIO_LABELS, threshold_label
from opdkernels.metrics.geometry_null import (
    NULL_METRICS,
    SPECTRUM_NULL_METRICS,
    at_ratios,
    null_of_geometry,
    null_of_spectrum,
)
from opdkernels.metrics.random_matrix import TOP
from opdkernels.metrics.registry import COUNT, NON_NEGATIVE, PAPER, WEIGHT_UNITS, Metric, family, interleave
from opdkernels.metrics.spectra import NO_VALUES, SUBSPACE, SpectrumRecord
from opdkernels.spectral.exact import RATIOS, top_ranks
from opdkernels.spectral.principal import COUNTS

TOP_FRACTIONS = (0.01, 0.05, 0.1)
RANK_TOLERANCES = (1e-6, 1e-5, 1e-4)
Row = dict[str, Any]


TOLERANCE_LABELS = [threshold_label(tolerance) for tolerance in RANK_TOLERANCES]
RANK_RANGE = "1 to min(m, n)"
MATRIX_GROUPS: dict[str, Any] = {"aggregation": MEAN_OVER_MATRICES, "tables": ("spectra", "trajectory")}

ENERGY = Metric(
    name="energy_{}",
    label="energy of the top {}",
    definition="fraction of ‖Δ‖² in the {} largest singular values of Δ",
    source=PAPER,
    tables=("spectra",),
)
SPECTRAL_NORM = Metric(
    name="spectral_norm",
    label="spectral norm",
    definition="σ₁(Δ), the largest singular value",
    range=WEIGHT_UNITS,
    format="measure",
    aggregation=MEAN_OVER_MATRICES,
    source=PAPER,
    tables=("spectra",),
)
STABLE_RANK = Metric(
    name="stable_rank",
    label="stable rank",
    definition="‖Δ‖² / σ₁², mean over matrices in groups",
    range=RANK_RANGE,
    format="measure",
    source=PAPER,
    pages={"trajectory": ("stored",)},
    **MATRIX_GROUPS,
)


def bounds_of(metric: Metric, side: str) -> Metric:
    """The guaranteed bound of a metric under method "topk"."""
    return replace(
        metric,
        name=f"{side}_{metric.name}",
        label=f"{metric.label}, {side} bound",
        definition=f"guaranteed {side} bound of `{metric.name}` (method `topk` only)",
        aggregation=NOT_AGGREGATED,
        tables=("spectra",),
        pages={},
    )


SPECTRUM_METRICS = (
    SPECTRAL_NORM,
    STABLE_RANK,
    *family(ENERGY, [str(k) for k in TOP], "k", {"16": MATRIX_GROUPS}),
    *family(
        Metric(
            name="energy_pct_{}",
            label="energy of the top {} %",
            definition="fraction of ‖Δ‖² in the max(1, int(p·r)) largest singular values, r = min(m, n), p = {} %",
            source=PAPER,
            tables=("spectra",),
        ),
        [f"{100 * p:g}" for p in TOP_FRACTIONS],
        "1, 5 or 10",
    ),
    Metric(
        name="effective_rank",
        label="effective rank",
        definition="exp(−Σ pᵢ ln pᵢ), pᵢ = σᵢ / Σσ",
        range=RANK_RANGE,
        format="measure",
        source="Roy and Vetterli 2007",
        **MATRIX_GROUPS,
    ),
    *interleave(
        family(
            Metric(
                name="rank_{}",
                label="rank at {}",
                definition="number of singular values above {} · σ₁",
                range=COUNT,
                format="count",
                source=PAPER,
                tables=("spectra",),
            ),
            TOLERANCE_LABELS,
            "tol",
        ),
        family(
            Metric(
                name="rank_share_{}",
                label="rank share at {}",
                definition="`rank_{}` over min(m, n)",
                source=PAPER,
                tables=("spectra",),
            ),
            TOLERANCE_LABELS,
            "tol",
            {"1e-5": {"aggregation": MEAN_OVER_MATRICES}},
        ),
    ),
    *(bounds_of(metric, side) for metric in (SPECTRAL_NORM, STABLE_RANK) for side in ("lower", "upper")),
    *interleave(
        *(family(bounds_of(replace(ENERGY, pages={}), side), [str(k) for k in TOP], "k") for side in ("lower", "upper"))
    ),
    *SPECTRUM_NULL_METRICS,
)


def spectrum(sigma: np.ndarray) -> Row:
    """Metrics of one spectrum: norm, energies and ranks (`SPECTRUM_METRICS`).

    Args:
        sigma: Singular values in descending order, fp64 [min(m, n)].

    Returns:
        Metric name -> value; all None for a matrix of zeros.
    """
    energy, r = float((sigma**2).sum()), len(sigma)
    names = [f"energy_{k}" for k in TOP] + [f"energy_pct_{100 * p:g}" for p in TOP_FRACTIONS]
    if not energy:
        ranks = [f"rank{share}_{label}" for label in TOLERANCE_LABELS for share in ("", "_share")]
        return dict.fromkeys(["spectral_norm", "delta_energy", "stable_rank", *names, "effective_rank", *ranks])
    captured = np.cumsum(sigma**2)
    counts = [min(k, r) for k in TOP] + [max(1, int(p * r)) for p in TOP_FRACTIONS]
    p = sigma[sigma > 0] / sigma.sum()
    metrics: Row = {
        "spectral_norm": float(sigma[0]),
        "delta_energy": energy,
        "stable_rank": energy / float(sigma[0]) ** 2,
    }
    metrics |= {name: float(captured[k - 1]) / energy for name, k in zip(names, counts, strict=True)}
    metrics["effective_rank"] = math.exp(-float((p * np.log(p)).sum()))
    for tolerance, label in zip(RANK_TOLERANCES, TOLERANCE_LABELS, strict=True):
        rank = int((sigma > tolerance * sigma[0]).sum())
        metrics |= {f"rank_{label}": rank, f"rank_share_{label}": rank / r}
    return metrics


def spectrum_row(record: SpectrumRecord) -> Row:
    """A row of spectra.parquet: metrics of delta's spectrum, and two of them for a random update."""
    metrics = spectrum(NO_VALUES if record.method == "topk" else record.delta) | topk_metrics(record)
    return metrics | null_of_spectrum(record, metrics)


def topk_metrics(record: SpectrumRecord) -> Row:
    """Metrics of the top of the spectrum with guaranteed bounds, under method "topk".

    Under the other methods the metrics are exact and the bounds None.
    """
    names = ["spectral_norm", "stable_rank", *(f"energy_{k}" for k in TOP)]
    metrics: Row = dict.fromkeys(f"{side}_{name}" for name in names for side in ("lower", "upper"))
    if record.method != "topk":
        return metrics
    energy, (lower, upper) = record.energy, record.bounds
    metrics |= {
        "delta_energy": energy,
        "spectral_norm": float(record.delta[0]),
        "stable_rank": energy / float(record.delta[0]) ** 2,
    }
    metrics |= {"lower_spectral_norm": float(lower[0]), "upper_spectral_norm": float(upper[0])}
    metrics |= {
        "lower_stable_rank": energy / float(upper[0]) ** 2,
        "upper_stable_rank": energy / float(lower[0]) ** 2 if lower[0] else None,
    }
    for k in (k for k in TOP if min(k, record.m, record.n) <= len(lower)):
        estimate, at_least, at_most = (float((sigma[:k] ** 2).sum()) / energy for sigma in (record.delta, lower, upper))
        metrics[f"energy_{k}"], metrics[f"lower_energy_{k}"] = min(estimate, 1.0), at_least
        metrics[f"upper_energy_{k}"] = min(estimate + record.remainder, at_most, 1.0)
    return metrics


def over_matrices(*shown: str) -> dict[str, dict[str, Any]]:
    """Overrides of a family that is averaged over matrices; `shown` are also in the trajectory table."""
    return {
        label: {
            "aggregation": MEAN_OVER_MATRICES,
            "tables": ("geometry", "trajectory") if label in shown else ("geometry",),
        }
        for label in RATIO_LABELS
    }


ratios_of = partial(at_ratios, source=PAPER)

GEOMETRY_METRICS = (
    *interleave(
        ratios_of(
            "projection_{}",
            "energy within",
            "‖U_kᵀ Δ V_k‖² / ‖Δ‖², the fraction of the energy of Δ between the top k = max(1, int(p·r)) left and right "
            "singular vectors of W, r = min(m, n), p = {}",
            over_matrices("10pct"),
        ),
        ratios_of("projection_{}_chance", "energy within by chance", "k² / (m n)", over_matrices("10pct")),
    ),
    *(
        metric
        for side, formula, chance in (("left", "‖U_kᵀ Δ‖² / ‖Δ‖²", "k / m"), ("right", "‖Δ V_k‖² / ‖Δ‖²", "k / n"))
        for metric in interleave(
            ratios_of(f"projection_{side}_{{}}", f"energy within, {side}", formula, over_matrices()),
            ratios_of(f"projection_{side}_{{}}_chance", f"energy within by chance, {side}", chance),
        )
    ),
    *(
        metric
        for side in ("left", "right")
        for metric in ratios_of(
            f"rotation_{side}_{{}}",
            f"rotation, {side}",
            f"mean sine of the principal angles between the top {side} singular subspaces of W and W′",
            over_matrices("10pct"),
            format="measure",
        )
    ),
    Metric(
        name="drift",
        label="drift",
        definition="‖σ(W′) − σ(W)‖ / ‖σ(W)‖",
        range=NON_NEGATIVE,
        format="measure",
        aggregation=MEAN_OVER_MATRICES,
        source=PAPER,
        tables=("geometry", "trajectory"),
    ),
    Metric(
        name="drift_over_delta",
        label="drift over Δ",
        definition="‖σ(W′) − σ(W)‖ / ‖Δ‖",
        range=NON_NEGATIVE,
        format="measure",
        aggregation=MEAN_OVER_MATRICES,
        source=PAPER,
        tables=("geometry",),
    ),
    *interleave(
        ratios_of(
            "principal_coverage_{}",
            "principal coverage",
            "fraction of the changed coordinates in the principal mask, the ⌈p·m·n⌉ largest |U_k S_k V_kᵀ|, p = {}. "
            "Rounding hides updates of large weights: compare with `_null`, not with p. Ties count in expectation",
            {
                label: fields | ({"pages": {"trajectory": ("stored",)}} if label == "10pct" else {})
                for label, fields in over_matrices("10pct").items()
            },
        ),
        ratios_of(
            "principal_not_low_coverage_{}",
            "principal, not near-zero coverage",
            "fraction of the changed coordinates in the principal mask and not in the near-zero mask",
        ),
        ratios_of(
            "nonprincipal_or_low_coverage_{}",
            "not principal or near-zero coverage",
            "fraction of the changed coordinates outside the principal mask or in the near-zero mask",
        ),
        *(
            ratios_of(
                f"principal_coverage_{{}}_{side}",
                f"principal coverage, {side} bound,",
                f"{side} bound of the principal coverage over all ways to break ties",
            )
            for side in ("lower", "upper")
        ),
        ratios_of(
            "principal_coverage_{}_enrichment",
            "principal enrichment",
            "principal coverage over the density of the mask",
            range=NON_NEGATIVE,
            format="times",
        ),
        ratios_of(
            "principal_mask_changed_{}",
            "principal mask changed",
            "fraction of the principal mask that changed, |mask ∩ changed| / |mask|",
        ),
        ratios_of(
            "principal_low_density_{}",
            "principal and near-zero",
            "fraction of the coordinates in both the principal and the near-zero mask",
        ),
    ),
)
METRICS = (*SPECTRUM_METRICS, *GEOMETRY_METRICS, *NULL_METRICS)
SUMMARY_METRICS = tuple(metric.name for metric in METRICS if metric.aggregation is MEAN_OVER_MATRICES)
TRAJECTORY_METRICS = tuple(metric.name for metric in METRICS if "trajectory" in metric.tables)


def geometry_row(record: SpectrumRecord) -> Row:
    """A row of geometry.parquet: how delta relates to the singular vectors of W (`GEOMETRY_METRICS`)."""
    known = record.subspace.size > 0
    metrics: Row = {}
    for name, values in zip(
        SUBSPACE, record.subspace if known else [[None] * len(RATIOS)] * len(SUBSPACE), strict=True
    ):
        for label, k, value in zip(RATIO_LABELS, top_ranks(min(record.m, record.n)), values, strict=True):
            metrics[f"{name}_{label}"] = None if value is None else float(value)
            chance = {
                "projection": k * k / (record.m * record.n),
                "projection_left": k / record.m,
                "projection_right": k / record.n,
            }
            if name in chance:
                metrics[f"{name}_{label}_chance"] = chance[name]
    drift = float(np.linalg.norm(record.trained - record.base)) if known else 0.0
    sizes = [float(np.linalg.norm(sigma)) for sigma in (record.base, record.delta)]
    metrics["drift"], metrics["drift_over_delta"] = (drift / size if known and size else None for size in sizes)
    metrics |= mask_metrics(record)
    return metrics | null_of_geometry(record, metrics)


MASKS = ("principal", "low_magnitude", "principal_not_low", "nonprincipal_or_low", "principal_and_low")


def shared(counts: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Expected counts of each mask within each subset, with ties broken at random.

    Args:
        counts: `masks` of a record [ratios, subsets, counts].
        sizes: `mask_sizes` of a record [ratios, 3].

    Returns:
        Name of the mask -> [ratios, subsets]; `total` is the size of the subset; bounds of the principal mask.
    """
    count = {name: counts[:, :, i].astype(float) for i, name in enumerate(COUNTS)}
    taken, low_taken = (  # fractions of the tied coordinates that the masks contain
        sizes[:, 1 + i, None] / count[name][:, :1] for i, name in enumerate(("principal_tied", "low_tied"))
    )
    principal = count["principal"] + taken * count["principal_tied"]
    low = count["low"] + low_taken * count["low_tied"]
    both = (
        count["both"]
        + low_taken * count["principal_and_low_tied"]
        + taken * (count["principal_tied_and_low"] + low_taken * count["both_tied"])
    )
    outside = count["principal_tied"][:, :1] - count["principal_tied"]
    return {
        "total": count["total"],
        "principal": principal,
        "principal_lower": count["principal"] + np.maximum(0, sizes[:, 1, None] - outside),
        "principal_upper": count["principal"] + np.minimum(sizes[:, 1, None], count["principal_tied"]),
        "low_magnitude": low,
        "principal_not_low": principal - both,
        "nonprincipal_or_low": count["total"] - principal + both,
        "principal_and_low": both,
    }


def mask_metrics(record: SpectrumRecord) -> Row:
    """Coverage of the changed coordinates by the principal mask and its combinations with the near-zero mask."""
    metrics: Row = {}
    count = shared(record.masks, record.mask_sizes) if record.masks.size else None
    for i, label in enumerate(RATIO_LABELS):
        names = ["principal_coverage", "principal_not_low_coverage", "nonprincipal_or_low_coverage"]
        columns = [f"principal_coverage_{label}{end}" for end in ("_lower", "_upper", "_enrichment")]
        columns += [f"principal_mask_changed_{label}", f"principal_low_density_{label}"]
        metrics |= dict.fromkeys([*(f"{name}_{label}" for name in names), *columns])
        if count is None:
            continue
        numel, changed = count["total"][i, :2]
        metrics[f"principal_mask_changed_{label}"] = count["principal"][i, 1] / count["principal"][i, 0]
        metrics[f"principal_low_density_{label}"] = count["principal_and_low"][i, 0] / numel
        if changed:
            for name in names:
                metrics[f"{name}_{label}"] = count[name.removesuffix("_coverage")][i, 1] / changed
            for end in ("_lower", "_upper"):
                metrics[f"principal_coverage_{label}{end}"] = count["principal" + end][i, 1] / changed
            metrics[f"principal_coverage_{label}_enrichment"] = metrics[f"principal_coverage_{label}"] / (
                count["principal"][i, 0] / numel
            )
    return {name: None if value is None else float(value) for name, value in metrics.items()}


def identity(record: SpectrumRecord, name: str) -> Row:
    """The first columns of a row; a matrix of a stack of experts has its number in `part`."""
    where = parse_tensor_name(name)
    return {
        "name": name,
        "part": record.part if record.part >= 0 else None,
        "m": record.m,
        "n": record.n,
        "layer": where.layer,
        "module": where.module,
        "block": where.block,
        "tower": where.tower,
        "view": record.view,
    }


def tables(records: Iterable[SpectrumRecord], names: dict[int, str]) -> tuple[list[Row], list[Row]]:
    """Rows of spectra.parquet and of geometry.parquet, one per matrix and view, in the order of the base checkpoint."""
    spectra, geometry = [], []
    for record in sorted(records, key=lambda r: r.key):
        first = identity(record, names[record.index])
        last = {"method": record.method or None, "reason": record.reason or None, "seconds": record.seconds}
        spectra.append(first | spectrum_row(record) | last)
        geometry.append(first | geometry_row(record) | last)
    return spectra, geometry


def summarise(spectra: list[Row], geometry: list[Row]) -> dict[str, Any]:
    """Mean, median and size-weighted mean over the matrices of the stored view, and the number without spectra.

    Args:
        spectra: Rows of spectra.parquet.
        geometry: Rows of geometry.parquet, in the same order.

    Returns:
        matrices: their number; without: reason -> number of matrices without spectra; metrics: name -> mean, median,
        weighted (by m n).
    """
    rows = [a | b for a, b in zip(spectra, geometry, strict=True) if a["view"] == "stored"]
    summary: dict[str, Any] = {"matrices": len(rows), "without": {}, "metrics": {}}
    for row in rows:
        if row["reason"]:
            reason = row["reason"].split(":")[0]
            summary["without"][reason] = summary["without"].get(reason, 0) + 1
    for name in SUMMARY_METRICS:
        values = [(row[name], row["m"] * row["n"]) for row in rows if row["method"] and row[name] is not None]
        if values:
            value, size = np.array(values, float).T
            summary["metrics"][name] = {
                "mean": float(value.mean()),
                "median": float(np.median(value)),
                "weighted": float((value * size).sum() / size.sum()),
            }
    return summary
