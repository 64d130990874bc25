"""The paper's `svd_metrics.csv`, `base_geometry_metrics.csv` and the principal columns of `mask_overlap_metrics.csv`.

They come from records of the visible view: delta is the script's, and W' is W + delta, as there. The script uses fp32
SVDs, this package fp64 Gram matrices: the script's rotations and drifts are rounding noise for small delta (at 1e-3
of W they are off by a third).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from opdkernels.metrics.batch import EPSILON, ratio_label, threshold_label
from opdkernels.metrics.geometry import RANK_TOLERANCES, TOP_FRACTIONS, shared, spectrum
from opdkernels.metrics.random_matrix import TOP
from opdkernels.metrics.spectra import SUBSPACE, SpectrumRecord
from opdkernels.spectral.exact import RATIOS, top_ranks

Row = dict[str, Any]
LABELS = [ratio_label(r) for r in RATIOS]
TOLERANCES = [threshold_label(t).replace("-", "_") for t in RANK_TOLERANCES]
SVD_COLUMNS = (
    "matrix_m",
    "matrix_n",
    "min_dim",
    "spectral_norm",
    "spectral_fro_ratio",
    "stable_rank",
    "effective_rank_entropy",
    *(f"rank{pct}_tol_{t}" for t in TOLERANCES for pct in ("", "_pct")),
    *(f"top{k}_energy_ratio" for k in TOP),
    *(f"top{100 * p:g}pct_energy_ratio" for p in TOP_FRACTIONS),
    "svd_mode",
)
PROJECTIONS = (
    "principal_projection_energy_ratio",
    "left_principal_projection_energy_ratio",
    "right_principal_projection_energy_ratio",
)
BASE_COLUMNS = (
    "base_geometry_mode",
    *(f"{name}_{label}" for label in LABELS for name in (*PROJECTIONS, "top_subspace_rotation")),
    "spectral_drift_l2_ratio",
    "spectral_drift_to_delta_fro_ratio",
    "skipped_reason",
)
MASKS = ("principal", "principal_not_low", "nonprincipal_or_low")
METRICS = ("density", "update_overlap_ratio", "covered_by_update_ratio", "enrichment_vs_random")
PRINCIPAL_COLUMNS = tuple(
    column
    for label in LABELS
    for column in (
        f"principal_rank_{label}",
        *(f"{mask}_{label}_{metric}" for mask in MASKS for metric in METRICS),
        f"principal_low_intersection_density_{label}",
    )
)


def svd_row(record: SpectrumRecord) -> Row:
    """The row of svd_metrics.csv, from a record with singular values of delta."""
    metrics, r = spectrum(record.delta), min(record.m, record.n)
    p = record.delta / (record.delta.sum() + EPSILON)
    row: Row = {
        "matrix_m": record.m,
        "matrix_n": record.n,
        "min_dim": r,
        "spectral_norm": metrics["spectral_norm"],
        "spectral_fro_ratio": metrics["spectral_norm"] / (math.sqrt(metrics["delta_energy"]) + EPSILON),
        "stable_rank": metrics["delta_energy"] / (metrics["spectral_norm"] ** 2 + EPSILON),
        "effective_rank_entropy": math.exp(-float((p * np.log(p + EPSILON)).sum())),
    }
    for tolerance, name in zip(RANK_TOLERANCES, TOLERANCES, strict=True):
        rank = metrics[f"rank_{threshold_label(tolerance)}"]
        row |= {f"rank_tol_{name}": rank, f"rank_pct_tol_{name}": rank / r}
    row |= {f"top{k}_energy_ratio": metrics[f"energy_{k}"] for k in TOP}
    row |= {f"top{100 * share:g}pct_energy_ratio": metrics[f"energy_pct_{100 * share:g}"] for share in TOP_FRACTIONS}
    return row | {"svd_mode": "exact"}


def base_row(record: SpectrumRecord) -> Row:
    """The row of base_geometry_metrics.csv."""
    if not record.subspace.size:
        reason = "zero_delta" if record.reason == "delta is zero" else record.reason or "topk"
        return {"base_geometry_mode": "exact" if reason == "zero_delta" else "skipped", "skipped_reason": reason}
    row: Row = {"base_geometry_mode": "exact"}
    subspace = dict(zip(SUBSPACE, record.subspace, strict=True))
    for i, label in enumerate(LABELS):
        for name, of in zip(PROJECTIONS, SUBSPACE[:3], strict=True):
            row[f"{name}_{label}"] = float(subspace[of][i])
        row[f"top_subspace_rotation_{label}"] = float(subspace["rotation_left"][i])
    drift = float(np.linalg.norm(record.trained - record.base))
    row["spectral_drift_l2_ratio"] = drift / (float(np.linalg.norm(record.base)) + EPSILON)
    row["spectral_drift_to_delta_fro_ratio"] = drift / (float(np.linalg.norm(record.delta)) + EPSILON)
    return row


def principal_columns(record: SpectrumRecord, subset: int) -> Row:
    """Principal columns of mask_overlap_metrics.csv, from a record with masks; `subset` counts the update thresholds
    from 1."""
    row: Row = {}
    count = shared(record.masks, record.mask_sizes)
    ranks = top_ranks(min(record.m, record.n))
    for i, (label, rank) in enumerate(zip(LABELS, ranks, strict=True)):
        numel, updates = count["total"][i, 0], count["total"][i, subset]
        row[f"principal_rank_{label}"] = rank
        for mask in MASKS:
            size, both = count[mask][i, 0], count[mask][i, subset]
            density, overlap = size / numel, both / updates if updates else math.nan
            values = density, overlap, both / size if size else math.nan, overlap / (density + EPSILON)
            row |= {f"{mask}_{label}_{metric}": float(value) for metric, value in zip(METRICS, values, strict=True)}
        row[f"principal_low_intersection_density_{label}"] = float(count["principal_and_low"][i, 0] / numel)
    return row
