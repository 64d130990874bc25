"""Figures of matrices from the records of their spectra (metrics: arXiv 2606.13657 and its script; see each function).

A figure that a record cannot give is None. Energies and norms are in the units of the weights, squared or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np

from opdkernels.checkpoint.names import place
from opdkernels.metrics.coordinates import ratio_label, threshold_label
from opdkernels.metrics.spectra import NOTHING, SUBSPACE, SpectrumRecord
from opdkernels.spectral.exact import RATIOS, top_ranks
from opdkernels.spectral.principal import COUNTS

TOP = (1, 2, 4, 8, 16, 32, 64)
TOP_FRACTIONS = (0.01, 0.05, 0.1)
RANK_TOLERANCES = (1e-6, 1e-5, 1e-4)
Row = dict[str, Any]


def spectrum(sigma: np.ndarray) -> Row:
    """Figures of one spectrum, singular values descending: `spectral_norm` s_1; `delta_energy` sum s^2; `stable_rank`
    sum s^2 / s_1^2; `energy_k` share of the k largest in the energy, `energy_pct_p` of the max(1, int(p r)) largest;
    `effective_rank` exp of the entropy of s / sum s (Roy and Vetterli 2007); `rank_t` how many exceed t s_1, and
    `rank_share_t` that over r = min(m, n). All None for a matrix of zeros."""
    energy, r = float((sigma**2).sum()), len(sigma)
    names = [f"energy_{k}" for k in TOP] + [f"energy_pct_{100 * p:g}" for p in TOP_FRACTIONS]
    if not energy:
        ranks = [f"rank{share}_{threshold_label(t)}" for t in RANK_TOLERANCES for share in ("", "_share")]
        return dict.fromkeys(["spectral_norm", "delta_energy", "stable_rank", *names, "effective_rank", *ranks])
    captured = np.cumsum(sigma**2)
    counts = [min(k, r) for k in TOP] + [max(1, int(p * r)) for p in TOP_FRACTIONS]
    share = sigma[sigma > 0] / sigma.sum()
    found: Row = {
        "spectral_norm": float(sigma[0]),
        "delta_energy": energy,
        "stable_rank": energy / float(sigma[0]) ** 2,
    }
    found |= {name: float(captured[k - 1]) / energy for name, k in zip(names, counts, strict=True)}
    found["effective_rank"] = math.exp(-float((share * np.log(share)).sum()))
    for tolerance in RANK_TOLERANCES:
        rank = int((sigma > tolerance * sigma[0]).sum())
        found |= {f"rank_{threshold_label(tolerance)}": rank, f"rank_share_{threshold_label(tolerance)}": rank / r}
    return found


@cache
def marchenko_pastur(y: float) -> tuple[np.ndarray, np.ndarray]:
    """Of y = short / long: angles t, 0 .. pi, of the eigenvalues 1 + y + 2 sqrt(y) cos t, and the share of them above each."""
    t = np.linspace(0, math.pi, 20_001)
    with np.errstate(invalid="ignore", divide="ignore"):
        density = np.nan_to_num(2 * np.sin(t) ** 2 / (math.pi * (1 + y + 2 * math.sqrt(y) * np.cos(t))), posinf=0)
    above = np.concatenate(([0], np.cumsum((density[1:] + density[:-1]) / 2 * (t[1] - t[0]))))
    return t, above / above[-1]


def random_decay(m: int, n: int, shares: np.ndarray) -> np.ndarray:
    """s_i / s_1 of a matrix of independent entries at i = share * min(m, n), in the limit of large matrices."""
    y = min(m, n) / max(m, n)
    t, above = marchenko_pastur(y)
    root = math.sqrt(y)
    return np.sqrt(np.maximum(1 + y + 2 * root * np.cos(np.interp(shares, above, t)), 0)) / (1 + root)


@cache
def random_spectrum(m: int, n: int) -> tuple[float, dict[int, float]]:
    """Stable rank and top-k energy of a matrix of independent entries of one size, whichever of them are zero: what an
    update without direction shows (Marchenko and Pastur 1967). In the limit of large matrices.

    >>> stable_rank, energy = random_spectrum(896, 4864)
    >>> round(stable_rank), round(energy[16], 4)
    (438, 0.0341)
    """
    short, long = sorted((m, n))
    t, above = marchenko_pastur(short / long)
    energy = (t - np.sin(t) * np.cos(t)) / math.pi  # of the eigenvalues above t
    shares = {k: float(np.interp(min(k / short, 1), above, energy)) for k in TOP}
    return m * n / (math.sqrt(m) + math.sqrt(n)) ** 2, shares


def spectrum_row(record: SpectrumRecord) -> Row:
    """A row of spectra.parquet: figures of delta's spectrum, and beside two of them what a random update shows."""
    found = spectrum(NOTHING if record.method == "topk" else record.delta) | bounded(record)
    stable_rank, energy = random_spectrum(record.m, record.n) if record.method else (None, {})
    return found | {"stable_rank_null": stable_rank, "energy_16_null": energy.get(16)}


def bounded(record: SpectrumRecord) -> Row:
    """Of method "topk": figures of the top of the spectrum, with `lower_` and `upper_` that hold for certain; else the
    bounds are None, and the figures exact."""
    names = ["spectral_norm", "stable_rank", *(f"energy_{k}" for k in TOP)]
    found: Row = dict.fromkeys(f"{side}_{name}" for name in names for side in ("lower", "upper"))
    if record.method != "topk":
        return found
    energy, (lower, upper) = record.energy, record.bounds
    found |= {
        "delta_energy": energy,
        "spectral_norm": float(record.delta[0]),
        "stable_rank": energy / float(record.delta[0]) ** 2,
    }
    found |= {"lower_spectral_norm": float(lower[0]), "upper_spectral_norm": float(upper[0])}
    found |= {
        "lower_stable_rank": energy / float(upper[0]) ** 2,
        "upper_stable_rank": energy / float(lower[0]) ** 2 if lower[0] else None,
    }
    for k in (k for k in TOP if min(k, record.m, record.n) <= len(lower)):
        shares = [float((values[:k] ** 2).sum()) / energy for values in (record.delta, lower, upper)]
        found[f"energy_{k}"], found[f"lower_energy_{k}"] = min(shares[0], 1.0), shares[1]
        found[f"upper_energy_{k}"] = min(shares[0] + record.remainder, shares[2], 1.0)
    return found


def geometry_row(record: SpectrumRecord) -> Row:
    """A row of geometry.parquet: where delta lies in the geometry of W.

    `projection_r` ||U_k^T delta V_k||^2 / ||delta||^2, `projection_left_r`, `projection_right_r` one side alone, each with
    its `_chance` k^2 / (m n), k / m, k / n; `rotation_left_r`, `rotation_right_r` mean sine between the top subspaces of W
    and W'; `drift` ||s(W') - s(W)|| / ||s(W)||, `drift_over_delta` the same over ||delta||.
    """
    known = record.subspace.size > 0
    found: Row = {}
    for name, values in zip(
        SUBSPACE, record.subspace if known else [[None] * len(RATIOS)] * len(SUBSPACE), strict=True
    ):
        for ratio, k, value in zip(RATIOS, top_ranks(min(record.m, record.n)), values, strict=True):
            found[f"{name}_{ratio_label(ratio)}"] = None if value is None else float(value)
            chance = {
                "projection": k * k / (record.m * record.n),
                "projection_left": k / record.m,
                "projection_right": k / record.n,
            }
            if name in chance:
                found[f"{name}_{ratio_label(ratio)}_chance"] = chance[name]
    moved = float(np.linalg.norm(record.trained - record.source)) if known else 0.0
    sizes = [float(np.linalg.norm(s)) for s in (record.source, record.delta)]
    found["drift"], found["drift_over_delta"] = (moved / size if known and size else None for size in sizes)
    return found | mask_figures(record)


MASKS = ("principal", "low_magnitude", "principal_not_low", "nonprincipal_or_low", "principal_and_low")


def shared(counts: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Expected counts of each mask within each subset, [ratios, subsets], ties broken at random; `total` of the subset, and
    the bounds of the principal mask. counts, sizes: `masks` and `mask_sizes` of a record."""
    count = {name: counts[:, :, i].astype(float) for i, name in enumerate(COUNTS)}
    share, low_share = (
        sizes[:, 1 + i, None] / count[name][:, :1] for i, name in enumerate(("principal_tied", "low_tied"))
    )
    principal = count["principal"] + share * count["principal_tied"]
    low = count["low"] + low_share * count["low_tied"]
    both = (
        count["both"]
        + low_share * count["principal_and_low_tied"]
        + share * (count["principal_tied_and_low"] + low_share * count["both_tied"])
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


def mask_figures(record: SpectrumRecord) -> Row:
    """`principal_coverage_r` |mask & changed| / |changed| with `_lower`, `_upper` for ties and `_enrichment` over the mask's
    density, `principal_mask_changed_r` |mask & changed| / |mask|; the coverage of `principal_not_low` and
    `nonprincipal_or_low`; `principal_low_density_r`, the share of coordinates in the principal and the near-zero mask."""
    found: Row = {}
    count = shared(record.masks, record.mask_sizes) if record.masks.size else None
    for i, ratio in enumerate(RATIOS):
        label = ratio_label(ratio)
        names = ["principal_coverage", "principal_not_low_coverage", "nonprincipal_or_low_coverage"]
        columns = [f"principal_coverage_{label}{end}" for end in ("_lower", "_upper", "_enrichment")]
        columns += [f"principal_mask_changed_{label}", f"principal_low_density_{label}"]
        found |= dict.fromkeys([*(f"{name}_{label}" for name in names), *columns])
        if count is None:
            continue
        numel, changed = count["total"][i, :2]
        found[f"principal_mask_changed_{label}"] = count["principal"][i, 1] / count["principal"][i, 0]
        found[f"principal_low_density_{label}"] = count["principal_and_low"][i, 0] / numel
        if changed:
            for name in names:
                found[f"{name}_{label}"] = count[name.removesuffix("_coverage")][i, 1] / changed
            for end in ("_lower", "_upper"):
                found[f"principal_coverage_{label}{end}"] = count["principal" + end][i, 1] / changed
            found[f"principal_coverage_{label}_enrichment"] = found[f"principal_coverage_{label}"] / (
                count["principal"][i, 0] / numel
            )
    return {name: None if value is None else float(value) for name, value in found.items()}


def about(record: SpectrumRecord, name: str) -> Row:
    """What every row starts with; a matrix of a stack of experts has its number in `part`."""
    where = place(name)
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
    """Rows of spectra.parquet and of geometry.parquet, matrix by matrix in the order of the source."""
    spectra, geometry = [], []
    for record in sorted(records, key=lambda r: r.key):
        first = about(record, names[record.index])
        last = {"method": record.method or None, "reason": record.reason or None, "seconds": record.seconds}
        spectra.append(first | spectrum_row(record) | last)
        geometry.append(first | geometry_row(record) | last)
    return spectra, geometry


SUMMARISED = (
    *(
        "stable_rank",
        "stable_rank_null",
        "energy_16",
        "energy_16_null",
        "effective_rank",
        "rank_share_1e-5",
        "spectral_norm",
    ),
    *(f"{name}_{ratio_label(r)}" for name in (*SUBSPACE, "principal_coverage") for r in RATIOS),
    *(f"projection_{ratio_label(r)}_chance" for r in RATIOS),
    *("drift", "drift_over_delta"),
)


def summarise(spectra: list[Row], geometry: list[Row]) -> dict[str, Any]:
    """Over the matrices of the stored view that have figures: mean, median and mean weighted by size of each; how many
    have none, by reason."""
    found: dict[str, Any] = {"matrices": 0, "without": {}, "metrics": {}}
    rows = [a | b for a, b in zip(spectra, geometry, strict=True) if a["view"] == "stored"]
    found["matrices"] = len(rows)
    for row in rows:
        if row["reason"]:
            reason = row["reason"].split(":")[0]
            found["without"][reason] = found["without"].get(reason, 0) + 1
    for name in SUMMARISED:
        values = [(row[name], row["m"] * row["n"]) for row in rows if row["method"] and row[name] is not None]
        if values:
            value, size = np.array(values, float).T
            found["metrics"][name] = {
                "mean": float(value.mean()),
                "median": float(np.median(value)),
                "weighted": float((value * size).sum() / size.sum()),
            }
    return found
