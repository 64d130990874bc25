"""What the page of an `analyze` run holds: the tables and drawings of an Analysis, ready for the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from opdkernels.analysis.result import Analysis
from opdkernels.metrics.coordinates import RATIOS, VIEWS, ratio_label
from opdkernels.report import charts, typography
from opdkernels.report.answer import COVERAGE, WITHIN, answer, fit
from opdkernels.report.facts import MOST_LISTED as MOST_LISTED
from opdkernels.report.facts import facts, files, left_out
from opdkernels.report.geometry import geometry
from opdkernels.report.glossary import FIGURES, glossary
from opdkernels.report.order import MODULE_ORDER
from opdkernels.report.rows import group_tables, tensor_tables

MOST_LAYERS = 200
# Published figures to stand beside: arXiv 2606.13657, table 2 and its ranges.
PUBLISHED = {
    "frac_le_1e-5": ("66.7 to 89.5 %", "3.1 %"),
    "relative_norm": ("0.036 to 0.142 %", "11.9 %"),
    COVERAGE: ("25 to 49 %", "10.1 %"),
}


def content(result: Analysis) -> dict[str, Any]:
    """The template's variables."""
    summary, run = result.summary, result.run
    visible = (
        result.tensors.filter(pc.equal(result.tensors["view"], "visible"))
        if "view" in result.tensors.column_names
        else result.tensors
    )
    fitted = fit(visible)
    views = summary["views"]
    tables = group_tables(result.groups) + tensor_tables(result.tensors)
    used = [c.key for t in tables for c in t.columns]
    return {
        "title": "What training changed",
        "answer": answer(
            summary, fitted, [r for r in result.groups.to_pylist() if r["by"] == "module" and r["view"] == "visible"]
        ),
        "sides": [(role, typography.name(summary[role])) for role in ("source", "trained")],
        "matched": summary["matched"],
        "figures": figures(views, summary["curve"]),
        "gauges": gauges(views.get("visible", {})),
        "fit": fitted,
        "null_kinds": [k for k in fitted.kinds if k.changed is not None],
        "curve": [d for frame in charts.FRAMES if (d := charts.sparsity_curve(summary["curve"], frame))],
        "curve_rows": curve_rows(summary["curve"]),
        "near_zero": near_zero_rows(views) if views and views["visible"]["changed"] else [],
        "maps": maps(result.groups) if views and views["stored"]["changed"] else [],
        "ulp": [
            d
            for frame in charts.FRAMES
            if (d := charts.ulp_histogram(summary["ulp"]["distance"], summary["ulp"]["count"], frame))
        ],
        "ulp_rows": list(zip(summary["ulp"]["distance"], summary["ulp"]["count"], strict=True)),
        "geometry": geometry(result),
        "groups": tables[:-1],
        "tensors": tables[-1],
        "blocks": sorted(set(result.tensors["block"].to_pylist())) if len(result.tensors) else [],
        "left_out": left_out(summary),
        "run": run,
        "files": files(run),
        "facts": facts(summary, run),
        "glossary": glossary(
            [
                "stored",
                "visible",
                "changed",
                "frac_zero",
                "frac_le_1e-5",
                "unchanged_rtol_1e-3",
                "relative_norm",
                "top_energy_1pct",
                COVERAGE,
                "null",
                "null_kind",
                "null_distance",
                "changed_over_null",
                f"{COVERAGE}_over_null",
                "ulp",
                "bit_equal",
                *used,
            ]
        ),
        "FIGURES": FIGURES,
    }


def figures(
    views: Mapping[str, Mapping[str, Any]], curve: Mapping[str, Sequence[float | None]]
) -> list[dict[str, Any]]:
    """The rows of the first table: both views, the null, and published figures beside them."""
    if not views:
        return []
    stored, visible = views["stored"], views["visible"]
    finite = visible["numel"] - visible["nonfinite"]
    null: dict[str, float | None] = {}
    if finite and visible["changed"]:
        unchanged = 1 - visible["changed_null"] / finite
        null = {
            "changed": 1 - unchanged,
            "frac_le_1e-5": curve["null"][curve["eps"].index(1e-5)],
            "unchanged_rtol_1e-3": unchanged,
            COVERAGE: visible[f"{COVERAGE}_null"],
        }
    rows = []
    for key in ("changed", "frac_le_1e-5", "unchanged_rtol_1e-3", "relative_norm", "top_energy_1pct", COVERAGE):
        pair = [
            None if view["frac_zero"] is None else 1 - view["frac_zero"] if key == "changed" else view[key]
            for view in (stored, visible)
        ]
        rows.append(
            {
                "figure": FIGURES[key],
                "key": key,
                "stored": pair[0],
                "visible": pair[1],
                "null": null.get(key),
                "published": PUBLISHED.get(key, ("", "")),
            }
        )
    return rows


def gauges(visible: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for key, what in (
        ("changed_over_null", "Changed coordinates"),
        (f"{COVERAGE}_over_null", "Near-zero coverage at 10 %"),
    ):
        value = visible.get(key)
        if value is not None:
            found.append(
                {"what": what, "value": value, "drawing": charts.gauge(value, WITHIN, what), "figure": FIGURES[key]}
            )
    return found


def near_zero_rows(views: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for ratio in RATIOS:
        key = f"near_zero_coverage_{ratio_label(ratio)}"
        visible = views["visible"]
        rows.append(
            {
                "ratio": ratio,
                "stored": views["stored"][key],
                "visible": visible[key],
                "lower": visible[f"{key}_lower"],
                "upper": visible[f"{key}_upper"],
                "stored_lower": views["stored"][f"{key}_lower"],
                "stored_upper": views["stored"][f"{key}_upper"],
                "null": visible.get(f"{key}_null"),
                "over": visible.get(f"{key}_over_null"),
            }
        )
    return rows


def curve_rows(curve: Mapping[str, Sequence[float | None]]) -> list[dict[str, Any]]:
    return [{key: curve[key][i] for key in curve} for i in range(0, len(curve["eps"]), 10)]


def maps(groups: pa.Table) -> list[dict[str, Any]]:
    """Heat maps of layer × module: sparsity and energy over parameters in both views, near-zero coverage over the null."""
    rows = [r for r in groups.to_pylist() if r["by"] == "layer_module"]
    layers = sorted({r["layer"] for r in rows})
    if not any(layer >= 0 for layer in layers):
        return []
    shown = layers[:MOST_LAYERS]
    on_page = set(shown)
    order = sorted({r["module"] for r in rows}, key=lambda m: (MODULE_ORDER.get(m, 99), m))
    found: list[dict[str, Any]] = []
    for key, heading, note, scaling, views in (
        (
            "frac_zero",
            "Unchanged coordinates",
            "Share of coordinates with Δ = 0. Numbers in cells are percent.",
            charts.share_scale,
            VIEWS,
        ),
        (
            "energy_over_parameters",
            "Energy share over parameter share",
            "1× moved as much as its size alone would give; orange moved more, blue less.",
            charts.ratio_scale,
            VIEWS,
        ),
        (
            f"{COVERAGE}_over_null",
            "Near-zero coverage at 10 % over rounding alone",
            "1× is what rounding alone would show; orange more, blue less. Visible view only: the null is a "
            "model of what is visible.",
            charts.ratio_scale,
            ("visible",),
        ),
    ):
        drawings = []
        for view in views:
            cells = {(r["module"], r["layer"]): r[key] for r in rows if r["view"] == view and r["layer"] in on_page}
            values = [v for v in cells.values() if v is not None]
            if values:
                scale = scaling(values)
                names, drawing = charts.heat_map(cells, order, shown, scale, heading)
                drawings.append({"view": view, "names": names, "drawing": drawing, "legend": charts.legend(scale)})
        if drawings:
            found.append(
                {
                    "heading": heading,
                    "note": note,
                    "drawings": drawings,
                    "both": len(views) == 2,
                    "left_out": len(layers) - len(shown),
                }
            )
    return found
