"""The part of the page that spectra make: how many directions an update has, and where they lie in the geometry of W."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from opdkernels.analysis.result import Analysis
from opdkernels.metrics.coordinates import RATIOS, ratio_label
from opdkernels.metrics.geometry import TOP, random_decay, random_spectrum
from opdkernels.report import charts
from opdkernels.report.order import MODULE_ORDER
from opdkernels.report.typography import percent, plural, significant

SHARES = np.linspace(0, 1, 51)
MOST_LAYERS = 200
Row = dict[str, Any]


def geometry(result: Analysis) -> dict[str, Any] | None:
    """The template's variables, None where the run has no spectra."""
    if result.spectra is None or result.geometry is None:
        return None
    rows = [
        a | b
        for a, b in zip(result.spectra.to_pylist(), result.geometry.to_pylist(), strict=True)
        if a["view"] == "stored"
    ]
    summary = result.summary["spectra"]
    known = [row for row in rows if row["method"]]
    if not known:
        return None
    exact = [row for row in known if row["method"] != "topk"]
    return {
        "matrices": len(known),
        "sentences": sentences(known, exact),
        "charts": [energy_chart(known), *([decay_chart(result)] if exact else [])],
        "ratios": ratios(exact, result.summary["views"]) if exact else [],
        "maps": maps(known, exact),
        "without": summary["without"],
    }


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows if row.get(name) is not None], float)


def sentences(known: Sequence[Row], exact: Sequence[Row]) -> list[str]:
    """What the spectra say, against what a random update of the same shapes would."""
    stable, random = (float(np.median(column(known, name))) for name in ("stable_rank", "stable_rank_null"))
    energy, random_energy = (float(np.median(column(known, name))) for name in ("energy_16", "energy_16_null"))
    ratio = energy / random_energy
    kind = (
        "few directions carry much of it"
        if ratio > 2
        else "somewhat more than chance in its top directions"
        if ratio > 1.1
        else "no direction stands out"
    )
    found = [
        f"The update of {plural(len(known), 'matrix', 'matrices')} has a median stable rank of {significant(stable, 3)}, where a random one has "
        f"{significant(random, 3)}; its 16 largest directions hold {percent(energy)} of the energy, against {percent(random_energy)}: {kind}."
    ]
    if exact:
        within, chance = (float(column(exact, name).mean()) for name in ("projection_10pct", "projection_10pct_chance"))
        masked = float(column(exact, "principal_coverage_10pct").mean())
        where = (
            "away from"
            if within < 0.8 * chance
            else "towards"
            if within > 1.25 * chance
            else "neither towards nor away from"
        )
        found.append(
            f"It lies {where} the principal directions of the weights: {percent(within)} of its energy is between their top tenths, "
            f"{percent(chance)} by chance, and {percent(masked)} of the changed coordinates are among the tenth that those directions make large (by chance 10 %)."
        )
    return found


def drawings(
    xs: Sequence[float],
    ticks: Sequence[tuple[float, str]],
    series: dict[str, np.ndarray],
    axis: str,
    label: str,
    told: Sequence[str],
) -> list:
    values = {name: [float(v) for v in one] for name, one in series.items()}
    return [charts.spectrum_curve(xs, ticks, values, axis, label, told, frame) for frame in charts.FRAMES]


def spread(values: np.ndarray, null: np.ndarray) -> dict[str, np.ndarray]:
    """Of [matrices, points]: mean, tenth and ninetieth percentile, and the mean of the null."""
    low, high = np.quantile(values, [0.1, 0.9], axis=0)
    return {"mean": values.mean(0), "low": low, "high": high, "null": null.mean(0)}


def energy_chart(known: Sequence[Row]) -> dict[str, Any]:
    used = [k for k in TOP if all(row[f"energy_{k}"] is not None for row in known)]
    values = np.array([[row[f"energy_{k}"] for k in used] for row in known])
    null = np.array([[random_spectrum(row["m"], row["n"])[1][k] for k in used] for row in known])
    series = spread(values, null)
    told = [
        f"top {k}: {percent(m)}, random {percent(n)}"
        for k, m, n in zip(used, series["mean"], series["null"], strict=True)
    ]
    xs = [math.log2(k) for k in used] if len(used) > 1 else [0.0, 1.0]
    series = series if len(used) > 1 else {name: np.repeat(one, 2) for name, one in series.items()}
    return {
        "heading": "Energy of the largest directions.",
        "note": "Share of ‖Δ‖² in the k largest singular values.",
        "drawings": drawings(
            xs,
            [(math.log2(k), str(k)) for k in used],
            series,
            "k, singular values",
            "Energy against k. " + "; ".join(told),
            told * (2 if len(used) == 1 else 1),
        ),
    }


def decay_chart(result: Analysis) -> dict[str, Any]:
    records = [r for r in result.spectrum_records if r.view == "stored" and r.subspace.size and r.delta[0] > 0]
    values = np.array(
        [np.interp(SHARES * max(len(r.delta) - 1, 1), np.arange(len(r.delta)), r.delta / r.delta[0]) for r in records]
    )
    series = spread(values, np.array([random_decay(r.m, r.n, SHARES) for r in records]))
    told = [
        f"at {percent(s)}: {percent(m)} of σ₁, random {percent(n)}"
        for s, m, n in zip(SHARES, series["mean"], series["null"], strict=True)
    ]
    ticks = [(s, f"{100 * s:.0f} %") for s in (0, 0.25, 0.5, 0.75, 1.0)]
    return {
        "heading": "Decay of the singular values.",
        "note": "σᵢ over σ₁, along the spectrum of Δ.",
        "drawings": drawings(
            SHARES.tolist(),
            ticks,
            series,
            "i over min(m, n)",
            "Singular values of the update over the largest, along the spectrum",
            told,
        ),
    }


def ratios(exact: Sequence[Row], views: dict[str, Any]) -> list[Row]:
    found = []
    for ratio in RATIOS:
        label = ratio_label(ratio)
        names = {
            "projection": "projection",
            "left": "projection_left",
            "right": "projection_right",
            "rotation_left": "rotation_left",
            "rotation_right": "rotation_right",
            "principal": "principal_coverage",
        }
        means = {
            key: float(values.mean()) if (values := column(exact, f"{name}_{label}")).size else None
            for key, name in names.items()
        }
        chance = float(column(exact, f"projection_{label}_chance").mean())
        found.append(
            {
                "ratio": ratio,
                **means,
                "chance": chance,
                "near_zero": views["visible"].get(f"near_zero_coverage_{label}"),
            }
        )
    return found


def maps(known: Sequence[Row], exact: Sequence[Row]) -> list[dict[str, Any]]:
    """Heat maps of layer × module, mean over the matrices of a cell."""
    found = []
    for rows, value, heading, note in (
        (
            known,
            lambda r: r["stable_rank"] / r["stable_rank_null"],
            "Stable rank over that of a random update",
            "Blue: fewer directions than a random update has.",
        ),
        (
            exact,
            lambda r: ratio_of(r["principal_coverage_10pct"], 0.1),
            "Principal coverage at 10 % over chance",
            "Blue: the update avoids where the top singular vectors put weight; orange: it seeks it.",
        ),
    ):
        cells: dict[tuple[str, int], list[float]] = {}
        for row in rows:
            if (one := value(row)) is not None:
                cells.setdefault((row["module"], row["layer"]), []).append(one)
        layers = sorted({layer for _, layer in cells})[:MOST_LAYERS]
        if not any(layer >= 0 for layer in layers):
            continue
        means = {key: float(np.mean(values)) for key, values in cells.items() if key[1] in layers}
        scale = charts.ratio_scale(list(means.values()))
        modules = sorted({module for module, _ in means}, key=lambda m: (MODULE_ORDER.get(m, 99), m))
        names, drawing = charts.heat_map(dict(means), modules, layers, scale, heading)
        found.append(
            {"heading": heading, "note": note, "names": names, "drawing": drawing, "legend": charts.legend(scale)}
        )
    return found


def ratio_of(value: float | None, chance: float) -> float | None:
    return None if value is None else value / chance
