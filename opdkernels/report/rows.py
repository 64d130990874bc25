"""The tables of groups and of tensors on the page of an `analyze` run, both views of each row side by side."""

from __future__ import annotations

import json

import pyarrow as pa

from opdkernels.metrics.coordinates import VIEWS
from opdkernels.report import typography
from opdkernels.report.answer import COVERAGE
from opdkernels.report.tables import Cell, Column, Table, build

MOST_TENSORS = 2000  # rows on the page, largest energy first; tensors.parquet holds all

GROUP_FIGURES = [
    Column("tensors", "count"),
    Column("numel", "count"),
    Column("parameter_share", "percent"),
    *(
        Column(key, kind, view)
        for view in VIEWS
        for key, kind in (
            ("frac_zero", "percent"),
            ("frac_le_1e-5", "percent"),
            ("relative_norm", "percent"),
            ("energy_share", "percent"),
            ("energy_over_parameters", "times"),
        )
    ),
    Column(COVERAGE, "percent", "stored"),
    Column(COVERAGE, "percent", "visible"),
    Column("changed_over_null", "times", "visible", span="over rounding alone"),
    Column(f"{COVERAGE}_over_null", "times", "visible", span="over rounding alone"),
]
# In the order of the views, so that each view's columns stand together.
GROUP_FIGURES.sort(key=lambda c: ("", "stored", "visible", "over rounding alone").index(c.above))


def group_tables(groups: pa.Table) -> list[Table]:
    """By block, module and layer, and by tower where there is more than one; rows of both views joined."""
    rows = groups.to_pylist()
    found = []
    for by in ("block", "module", "layer", "tower"):
        own = {view: {r[by]: r for r in rows if r["by"] == by and r["view"] == view} for view in VIEWS}
        if by == "tower" and len(own["visible"]) < 2:
            continue
        joined = [
            {
                "": {**r, by: layer_cell(key) if by == "layer" else key},
                "visible": r,
                "stored": own["stored"].get(key, {}),
            }
            for key, r in own["visible"].items()
        ]
        if by == "layer":
            joined.sort(key=lambda row: int(row[""]["layer"].sort))
        found.append(
            build(
                f"by-{by}",
                f"By {by}",
                [Column(by), *GROUP_FIGURES],
                joined[:MOST_TENSORS],
                max(0, len(joined) - MOST_TENSORS),
            )
        )
    return found


def layer_cell(layer: int) -> Cell:
    return Cell(str(layer) if layer >= 0 else typography.MISSING, str(layer))


TENSOR_COLUMNS = [
    Column("name"),
    Column("layer"),
    Column("module"),
    Column("block"),
    Column("dtype"),
    Column("shape"),
    Column("numel", "count"),
    Column("frac_zero", "percent", "stored"),
    Column("relative_norm", "percent", "stored"),
    Column("max_abs", "measure", "stored"),
    Column("frac_zero", "percent", "visible"),
    Column("frac_le_1e-5", "percent", "visible"),
    Column("relative_norm", "percent", "visible"),
    Column("top_energy_1pct", "percent", "visible"),
    Column(COVERAGE, "percent", "visible"),
    Column("null_kind", "text", "visible", span="rounding alone"),
    Column("null_distance", "percent", "visible", span="rounding alone"),
    Column("changed_over_null", "times", "visible", span="rounding alone"),
    Column(f"{COVERAGE}_over_null", "times", "visible", span="rounding alone"),
]


def tensor_tables(tensors: pa.Table) -> list[Table]:
    """All tensors, both views joined, the largest update energy first."""
    columns = list(TENSOR_COLUMNS)
    half = len(tensors) // 2
    if not half:
        return [build("tensors", "Tensors", columns, [])]
    # Rows come in pairs, one a view, in the order of the source.
    views = tensors["view"].to_pylist()
    energy = tensors["delta_energy"].to_pylist()
    order = sorted(range(half), key=lambda i: -energy[2 * i + views[:2].index("stored")])[:MOST_TENSORS]
    if any(tensors["nonfinite"].to_pylist()):
        columns.insert(7, Column("nonfinite", "count"))
    own = tensors.select(
        [
            c
            for c in dict.fromkeys(["trained_name", "dtype_source", "dtype_trained", "view", *(c.key for c in columns)])
            if c in tensors.column_names
        ]
    )
    rows = own.take([2 * i + k for i in order for k in (0, 1)]).to_pylist()
    joined = []
    for a, b in zip(rows[::2], rows[1::2], strict=True):
        pair = {a["view"]: a, b["view"]: b}
        about = dict(pair["visible"])
        renamed = about["trained_name"] != about["name"]
        about["name"] = Cell(
            typography.name(about["name"]), None, f"→ {typography.name(about['trained_name'])}" if renamed else ""
        )
        about["layer"] = layer_cell(about["layer"])
        about["shape"] = Cell(" × ".join(map(str, json.loads(about["shape"]))) or "scalar", None)
        same = about["dtype_source"] == about["dtype_trained"]
        about["dtype"] = about["dtype_source"] if same else f"{about['dtype_source']} → {about['dtype_trained']}"
        joined.append({"": about, **pair})
    return [build("tensors", "Tensors", columns, joined, half - len(joined))]
