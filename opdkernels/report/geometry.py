"""The geometry section of an `analyze` page: rank of the update, and its relation to the singular vectors of W."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opdkernels.analysis.result import Analysis
from opdkernels.metrics.batch import ratio_label
from opdkernels.metrics.random_matrix import TOP, random_decay, random_spectrum
from opdkernels.report import charts, heat_map, svg
from opdkernels.report.figures import Figure, Values, value_rows
from opdkernels.report.tables import sorted_modules
from opdkernels.report.typography import measure, percent, plural, significant, times
from opdkernels.spectral.exact import RATIOS

POSITIONS = np.linspace(0, 1, 51)  # along a spectrum, i / min(m, n)
MAX_LAYERS = 200
KEYS = (("visible-key", "mean and middle 80 % over matrices"), ("null-key", "random update"))
Row = dict[str, Any]


def geometry_context(result: Analysis) -> dict[str, Any] | None:
    """The variables of the section; None where the run has no spectra."""
    if result.spectra is None or result.geometry is None:
        return None
    rows = [
        spectra | geometry
        for spectra, geometry in zip(result.spectra.to_pylist(), result.geometry.to_pylist(), strict=True)
        if spectra["view"] == "stored" and spectra["method"]
    ]
    if not rows:
        return None
    exact = [row for row in rows if row["method"] != "topk"]
    return {
        "matrices": len(rows),
        "sentences": sentences(rows, result.summary["verdict"]["comparisons"]),
        "charts": [energy_chart(rows), *([decay_chart(result)] if exact else [])],
        "ratios": ratio_rows(exact, result.summary["views"]) if exact else [],
        "maps": maps(rows, exact),
        "without": result.summary["spectra"]["without"],
    }


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    """The known values of a metric, float64."""
    return np.array([row[name] for row in rows if row.get(name) is not None], float)


def sentences(rows: Sequence[Row], comparisons: Sequence[dict[str, Any]]) -> list[str]:
    """What the spectra show, compared with a random update and with rounding alone (medians over matrices)."""
    entry = {comparison["metric"]: comparison for comparison in comparisons}
    texts = []
    if "stable_rank" in entry and "energy_16" in entry:
        stable, energy = entry["stable_rank"], entry["energy_16"]
        texts.append(
            f"The update of {plural(len(rows), 'matrix', 'matrices')} has a median stable rank of "
            f"{significant(stable['observed'], 3)}; a random update has {significant(stable['expected'], 3)}. Its 16 "
            f"largest directions contain {percent(energy['observed'])} of the energy, those of a random update "
            f"{percent(energy['expected'])}: {times(energy['ratio'])}, {energy['words']}."
        )
    if "projection_10pct" in entry:
        within = entry["projection_10pct"]
        texts.append(
            f"Between the top tenths of the singular vectors of the weights is {percent(within['observed'])} of the "
            f"energy; rounding alone gives {percent(within['expected'])}: {times(within['ratio'])}, {within['words']}."
        )
    if "principal_coverage_10pct" in entry:
        covered = entry["principal_coverage_10pct"]
        texts.append(
            f"The principal mask of a tenth of the coordinates has {percent(covered['observed'])} of the changed ones; "
            f"rounding alone gives {percent(covered['expected'])}, as large weights hide small updates: "
            f"{times(covered['ratio'])}, {covered['words']}."
        )
    return texts


def drawings(
    xs: Sequence[float],
    ticks: Sequence[tuple[float, str]],
    series: dict[str, np.ndarray],
    axis: str,
    label: str,
    tooltips: Sequence[str],
) -> list:
    """A spectrum curve for each frame."""
    values = {name: [float(value) for value in line] for name, line in series.items()}
    return [charts.spectrum_curve(xs, ticks, values, axis, label, tooltips, frame) for frame in svg.HALF_FRAMES]


def spread(values: np.ndarray, null: np.ndarray) -> dict[str, np.ndarray]:
    """Mean, 10th and 90th percentile of [matrices, points], and the mean of the null."""
    low, high = np.quantile(values, [0.1, 0.9], axis=0)
    return {"mean": values.mean(0), "low": low, "high": high, "null": null.mean(0)}


def spread_values(name: str, text: Callable[[Any], str], xs: Sequence[Any], series: dict[str, np.ndarray]) -> Values:
    """The values of a chart of `spread`, with the positions `xs` in the first column."""
    columns = {"mean": "mean", "low": "10th percentile", "high": "90th percentile", "null": "random update"}
    return value_rows((name, text, xs), *((label, percent, series[key].tolist()) for key, label in columns.items()))


def energy_chart(rows: Sequence[Row]) -> Figure:
    """Fraction of the energy in the k largest singular values."""
    used = [k for k in TOP if all(row[f"energy_{k}"] is not None for row in rows)]
    values = np.array([[row[f"energy_{k}"] for k in used] for row in rows])
    null = np.array([[random_spectrum(row["m"], row["n"])[1][k] for k in used] for row in rows])
    series = spread(values, null)
    table = spread_values("k", str, used, series)
    tooltips = [
        f"top {k}: {percent(mean)}, random {percent(random)}"
        for k, mean, random in zip(used, series["mean"], series["null"], strict=True)
    ]
    label = "Energy against k. " + "; ".join(tooltips)
    xs = [math.log2(k) for k in used] if len(used) > 1 else [0.0, 1.0]
    if len(used) == 1:  # a line needs two points
        series, tooltips = {name: np.repeat(line, 2) for name, line in series.items()}, tooltips * 2
    ticks = [(math.log2(k), str(k)) for k in used]
    return Figure(
        "Energy of the largest directions.",
        "Fraction of ‖Δ‖² in the k largest singular values.",
        KEYS,
        drawings(xs, ticks, series, "k, singular values", label, tooltips),
        table,
    )


def decay_chart(result: Analysis) -> Figure:
    """Singular values over the largest one, along the spectrum."""
    records = [r for r in result.spectrum_records if r.view == "stored" and r.subspace.size and r.delta[0] > 0]
    values = np.array(
        [
            np.interp(POSITIONS * max(len(r.delta) - 1, 1), np.arange(len(r.delta)), r.delta / r.delta[0])
            for r in records
        ]
    )
    series = spread(values, np.array([random_decay(r.m, r.n, POSITIONS) for r in records]))
    tooltips = [
        f"at {percent(position)}: {percent(mean)} of σ₁, random {percent(random)}"
        for position, mean, random in zip(POSITIONS, series["mean"], series["null"], strict=True)
    ]
    ticks = [(position, f"{100 * position:.0f} %") for position in (0, 0.25, 0.5, 0.75, 1.0)]
    label = "Singular values of the update over the largest, along the spectrum"
    return Figure(
        "Decay of the singular values.",
        "σᵢ / σ₁ along the spectrum of Δ.",
        KEYS,
        drawings(POSITIONS.tolist(), ticks, series, "i / min(m, n)", label, tooltips),
        spread_values("i / min(m, n)", measure, POSITIONS.tolist(), series),
    )


def ratio_rows(exact: Sequence[Row], views: dict[str, Any]) -> list[Row]:
    """The rows of the table of subspaces and masks, one per size: medians over matrices."""
    names = [
        f"{name}{{}}{ending}"
        for name in ("projection", "projection_left", "projection_right", "rotation_left", "rotation_right")
        for ending in ("", "_null")
    ]
    names += [f"principal_coverage{{}}{ending}" for ending in ("", "_null", "_magnitude")]
    rows = []
    for ratio in RATIOS:
        label = ratio_label(ratio)
        values = {name.format(""): column(exact, name.format(f"_{label}")) for name in names}
        rows.append(
            {
                "ratio": ratio,
                **{name: float(np.median(known)) if known.size else None for name, known in values.items()},
                "near_zero": views["visible"].get(f"near_zero_coverage_{label}"),
            }
        )
    return rows


def maps(rows: Sequence[Row], exact: Sequence[Row]) -> list[heat_map.MapFigure]:
    """Heat maps by layer and module: means over the matrices of a cell."""
    figures: list[tuple[Sequence[Row], Callable[[Row], float | None], str, str]] = [
        (
            rows,
            lambda row: row["stable_rank"] / row["stable_rank_null"],
            "Stable rank relative to a random update",
            "Blue: fewer directions than a random update.",
        ),
        (
            exact,
            lambda row: row["principal_coverage_10pct_over_null"],
            "Principal coverage at 10 % relative to bf16 rounding alone",
            "1× is expected from rounding alone, as large weights hide small updates. Blue: the update avoids the "
            "coordinates that the top singular vectors make large; orange: it prefers them.",
        ),
    ]
    entries: list[heat_map.MapFigure] = []
    for matrices, value_of, heading, note in figures:
        cells: dict[tuple[str, int], list[float]] = {}
        for row in matrices:
            if (value := value_of(row)) is not None:
                cells.setdefault((row["module"], row["layer"]), []).append(value)
        layers = sorted({layer for _, layer in cells})[:MAX_LAYERS]
        if not any(layer >= 0 for layer in layers):
            continue
        means: dict[tuple[str, int], float | None] = {
            cell: float(np.mean(values)) for cell, values in cells.items() if cell[1] in layers
        }
        modules = sorted_modules(m for m, _ in means)
        entries += heat_map.map_figures(heading, note, {"": means}, heat_map.ratio_scale, modules, layers)
    return entries
