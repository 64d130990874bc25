"""The page of an `analyze` run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from opdkernels.analysis.result import Analysis
from opdkernels.metrics.batch import ratio_label
from opdkernels.metrics.catalog import metrics_on_page
from opdkernels.metrics.registry import VIEWS
from opdkernels.report import charts, heat_map, svg, typography
from opdkernels.report.figures import Figure, value_rows
from opdkernels.report.geometry import geometry_context
from opdkernels.report.glossary import glossary, term
from opdkernels.report.rows import group_tables, tensor_table
from opdkernels.report.run_info import coverage, files, left_out, run_info
from opdkernels.report.tables import sorted_modules
from opdkernels.report.verdict import COVERAGE, fit_of, summarize
from opdkernels.spectral.exact import RATIOS

MAX_LAYERS = 200
MAX_LARGEST = 3  # modules and layers that the first screen names
INCOMPLETE = ("Excluded", "Failed", "NaN or Inf")  # sections of what was left out that make a run incomplete
# Published values for comparison: arXiv 2606.13657, table 2 and its ranges.
PUBLISHED = {
    "frac_le_1e-5": ("66.7 to 89.5 %", "3.1 %"),
    "relative_norm": ("0.036 to 0.142 %", "11.9 %"),
    COVERAGE: ("25 to 49 %", "10.1 %"),
}


def page_context(result: Analysis) -> dict[str, Any]:
    """The variables of analyze.html."""
    summary, run = result.summary, result.run
    views, curve, ulp = summary["views"], summary["curve"], summary["ulp"]
    visible = (
        result.tensors.filter(pc.equal(result.tensors["view"], "visible"))
        if "view" in result.tensors.column_names
        else result.tensors
    )
    fit = fit_of(visible)
    modules = [row for row in result.groups.to_pylist() if row["by"] == "module" and row["view"] == "visible"]
    one_view = set(summary["matched"]["dtypes"]) == {"bf16 → bf16"}
    groups = group_tables(result.groups, one_view=one_view)
    tensors = tensor_table(result.tensors, one_view=one_view)
    sections = left_out(summary)
    overview = metrics_on_page("overview")
    columns = [column.key for table in (*groups, tensors) for column in table.columns]
    terms = ["stored", "visible", *(m.name for m in overview), "null", "null_kind", "null_distance"]
    terms += [
        "changed_over_null",
        f"{COVERAGE}_over_null",
        "ulp",
        "bit_equal",
        "energy_share",
        "energy_over_parameters",
    ]
    terms += [entry["metric"] for entry in summary["verdict"]["comparisons"]]
    return {
        "title": "What training changed",
        **vars(summarize(summary, fit, modules)),
        "sides": [(role, typography.location(summary[role])) for role in ("base", "trained")],
        "overview": overview_rows(views, curve),
        "one_view": one_view,
        "largest": largest_groups(result.groups),
        "comparisons": comparison_rows(summary["verdict"]["comparisons"]),
        "fit": fit,
        "null_kinds": [kind for kind in fit.kinds if kind.changed is not None],
        "curve": sparsity_figure(curve, one_view=one_view),
        "near_zero": near_zero_rows(views) if views and views["visible"]["changed"] else [],
        "maps": maps(result.groups, ("visible",) if one_view else VIEWS)
        if views and views["stored"]["changed"]
        else [],
        "ulp": ulp_figure(ulp["distance"], ulp["count"]),
        "geometry": geometry_context(result),
        "groups": groups,
        "tensors": tensors,
        "blocks": sorted(set(result.tensors["block"].to_pylist())) if len(result.tensors) else [],
        "coverage": coverage(summary),
        "left_out": sections,
        "incomplete": [section for section in sections if section["heading"] in INCOMPLETE],
        "run": run,
        "files": files(run),
        "run_info": run_info(run, summary["matched"]),
        "glossary": glossary([*terms, *columns]),
        "term": term,
    }


def overview_rows(
    views: Mapping[str, Mapping[str, Any]], curve: Mapping[str, Sequence[float | None]]
) -> list[dict[str, Any]]:
    """The rows of the first table: both views, what is expected from bf16 rounding alone, and published values."""
    if not views:
        return []
    visible = views["visible"]
    finite = visible["numel"] - visible["nonfinite"]
    expected: dict[str, float | None] = {}
    if finite and visible["changed"] and visible["changed_null"] is not None:
        unchanged = 1 - visible["changed_null"] / finite
        expected = {
            "changed": 1 - unchanged,
            "frac_le_1e-5": curve["null"][curve["eps"].index(1e-5)],
            "unchanged_rtol_1e-3": unchanged,
            **{name: visible[f"{name}_null"] for name in (COVERAGE, "top_energy_1pct")},
        }

    def value(view: str, name: str) -> float | None:
        metrics = views[view]
        if metrics["frac_zero"] is None:
            return None
        return 1 - metrics["frac_zero"] if name == "changed" else metrics[name]  # a fraction instead of a count

    return [
        {
            "metric": metric,
            "stored": value("stored", metric.name),
            "visible": value("visible", metric.name),
            "null": expected.get(metric.name),
            "published": PUBLISHED.get(metric.name, ("", "")),
        }
        for metric in metrics_on_page("overview")
    ]


def largest_groups(groups: pa.Table) -> list[dict[str, Any]]:
    """The modules and the layers with the largest fractions of the energy, and their fractions of the weights."""
    rows = [row for row in groups.to_pylist() if row["view"] == "stored" and row["energy_share"]]
    total = sum(row["numel"] for row in rows if row["by"] == "model")
    entries = []
    for by, name_of in (("module", lambda row: typography.name(row["module"])), ("layer", layer_name)):
        members = sorted((row for row in rows if row["by"] == by), key=lambda row: -row["energy_share"])
        entries += [
            {
                "name": name_of(row),
                "energy": row["energy_share"],
                "parameters": row["numel"] / total,
                "ratio": row["energy_over_parameters"],
            }
            for row in members[:MAX_LARGEST]
        ]
    return entries


def layer_name(row: Mapping[str, Any]) -> str:
    """The name of a group of a layer."""
    return f"layer {row['layer']}" if row["layer"] >= 0 else "outside the layers"


def comparison_rows(comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the table of metrics against rounding alone, formatted."""
    rows = []
    for entry in comparisons:
        metric = term(entry["metric"])
        show = typography.measure if metric.format == "measure" else typography.percent
        rows.append(
            {
                "name": metric.name,
                "label": entry["label"],
                "definition": metric.definition,
                "observed": show(entry["observed"]),
                "expected": show(entry["expected"]),
                "ratio": typography.times(entry["ratio"]),
                "interval": f"{typography.times(entry['low'])} to {typography.times(entry['high'])}",
                "words": entry["words"],
            }
        )
    return rows


def near_zero_rows(views: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the near-zero table, one per size of the mask."""
    stored, visible = views["stored"], views["visible"]
    rows = []
    for ratio in RATIOS:
        name = f"near_zero_coverage_{ratio_label(ratio)}"
        rows.append(
            {
                "ratio": ratio,
                "stored": stored[name],
                "stored_range": typography.format_range(stored[f"{name}_lower"], stored[f"{name}_upper"]),
                "visible": visible[name],
                "visible_range": typography.format_range(visible[f"{name}_lower"], visible[f"{name}_upper"]),
                "null": visible.get(f"{name}_null"),
                "over_null": visible.get(f"{name}_over_null"),
            }
        )
    return rows


def sparsity_figure(curve: Mapping[str, Sequence[float | None]], *, one_view: bool) -> list[Figure]:
    """The curve of the sparsity; empty without finite coordinates."""
    drawings = [drawing for frame in svg.HALF_FRAMES if (drawing := charts.sparsity_curve(curve, frame))]
    if not drawings:
        return []
    names = {"visible": "visible", "stored_lower": "stored, at least", "stored_upper": "stored, at most"}
    names = ({"visible": "observed"} if one_view else names) | {"null": "expected from bf16 rounding alone"}
    keys = [("visible-key", names["visible"])]
    keys += [] if one_view else [("stored-key", "stored, between its bounds")]
    return [
        Figure(
            "Sparsity.",
            "Fraction of coordinates with |Δ| ≤ ε. The dotted line marks ε = 1e-5, the paper’s threshold.",
            [*keys, ("null-key", names["null"])],
            drawings,
            value_rows(
                ("ε", typography.measure, curve["eps"]),
                *((label, typography.percent, curve[key]) for key, label in names.items()),
            ),
        )
    ]


def ulp_figure(distance: Sequence[str], counts: Sequence[int]) -> list[Figure]:
    """The histogram of bf16 steps; empty without finite coordinates."""
    drawings = [drawing for frame in svg.FRAMES if (drawing := charts.ulp_histogram(distance, counts, frame))]
    if not drawings:
        return []
    total = sum(counts)
    return [
        Figure(
            "bf16 steps.",
            "Coordinates by the number of bf16 values from the old to the new one, on a logarithmic scale. The pale "
            "bar is no step; the outermost bars include all larger steps.",
            [],
            drawings,
            value_rows(
                ("steps", None, distance),
                ("coordinates", typography.count, counts),
                ("fraction", typography.percent, [n / total for n in counts]),
            ),
        )
    ]


def maps(groups: pa.Table, shown_views: Sequence[str]) -> list[heat_map.MapFigure]:
    """Heat maps by layer and module in some views."""
    rows = [row for row in groups.to_pylist() if row["by"] == "layer_module"]
    layers = sorted({row["layer"] for row in rows})
    if not any(layer >= 0 for layer in layers):
        return []
    shown = layers[:MAX_LAYERS]
    modules = sorted_modules(row["module"] for row in rows)
    entries: list[heat_map.MapFigure] = []
    for name, heading, note, scale_of, views in (
        (
            "frac_zero",
            "Unchanged coordinates",
            "Fraction of coordinates with Δ = 0. Numbers in cells are percent.",
            heat_map.fraction_scale,
            shown_views,
        ),
        (
            "energy_over_parameters",
            "Energy share over parameter share",
            "1× changed as much as its size alone would give; orange changed more, blue less.",
            heat_map.ratio_scale,
            shown_views,
        ),
        (
            f"{COVERAGE}_over_null",
            "Near-zero coverage at 10 %, relative to bf16 rounding alone",
            "1× is expected from bf16 rounding alone; orange is more, blue is less. Visible view only: the null is a "
            "model of what is visible.",
            heat_map.ratio_scale,
            ("visible",),
        ),
    ):
        cells = {
            view: {
                (row["module"], row["layer"]): row[name]
                for row in rows
                if row["view"] == view and row["layer"] in set(shown)
            }
            for view in views
        }
        entries += heat_map.map_figures(heading, note, cells, scale_of, modules, shown, len(layers) - len(shown))
    return entries
