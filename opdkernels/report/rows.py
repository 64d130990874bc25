"""The tables of groups and of tensors on the page of an `analyze` run, with both views of a row joined."""

from __future__ import annotations

import json

import pyarrow as pa

from opdkernels.metrics.registry import VIEWS
from opdkernels.report import typography
from opdkernels.report.tables import Cell, Column, Table, build, columns_of, layer_cell

MAX_TENSORS = 2000  # rows on the page, largest energy first; tensors.parquet has all
TENSOR_LABELS = tuple(map(Column, ("name", "layer", "module", "block", "dtype", "shape")))


def group_tables(groups: pa.Table, *, one_view: bool) -> list[Table]:
    """Tables by block, module and layer, and by tower where there are several; `one_view` as for `columns_of`."""
    rows = groups.to_pylist()
    tables = []
    for by in ("block", "module", "layer", "tower"):
        views = {view: {r[by]: r for r in rows if r["by"] == by and r["view"] == view} for view in VIEWS}
        if by == "tower" and len(views["visible"]) < 2:
            continue
        joined = [
            {
                "": {**row, by: layer_cell(group) if by == "layer" else group},
                "visible": row,
                "stored": views["stored"].get(group, {}),
            }
            for group, row in views["visible"].items()
        ]
        if by == "layer":
            joined.sort(key=lambda row: int(row[""]["layer"].sort))
        columns = [Column(by), *columns_of("groups", one_view=one_view)]
        left_out = max(0, len(joined) - MAX_TENSORS)
        tables.append(build(f"by-{by}", f"By {by}", columns, joined[:MAX_TENSORS], left_out))
    return tables


def tensor_table(tensors: pa.Table, *, one_view: bool) -> Table:
    """All tensors, both views joined, the largest update energy first; `one_view` as for `columns_of`."""
    metrics = columns_of("tensors", one_view=one_view)
    num_tensors = len(tensors) // 2
    if not num_tensors:
        return build("tensors", "Tensors", [*TENSOR_LABELS, *metrics], [])
    # Rows come in pairs, one per view, in the order of the base checkpoint.
    stored = tensors["view"].to_pylist()[:2].index("stored")
    energy = tensors["delta_energy"].to_pylist()
    order = sorted(range(num_tensors), key=lambda i: -energy[2 * i + stored])[:MAX_TENSORS]
    if any(tensors["nonfinite"].to_pylist()):
        metrics.insert(1, Column("nonfinite", "count"))
    columns = [*TENSOR_LABELS, *metrics]
    names = ["trained_name", "dtype_base", "dtype_trained", "view", *(column.key for column in columns)]
    needed = tensors.select([name for name in dict.fromkeys(names) if name in tensors.column_names])
    rows = needed.take([2 * i + k for i in order for k in (0, 1)]).to_pylist()
    joined = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        views = {first["view"]: first, second["view"]: second}
        labels = dict(views["visible"])
        renamed = labels["trained_name"] != labels["name"]
        trained_name = f"→ {typography.name(labels['trained_name'])}" if renamed else ""
        labels["name"] = Cell(typography.name(labels["name"]), None, trained_name)
        labels["layer"] = layer_cell(labels["layer"])
        labels["shape"] = Cell(" × ".join(map(str, json.loads(labels["shape"]))) or "scalar", None)
        same = labels["dtype_base"] == labels["dtype_trained"]
        labels["dtype"] = labels["dtype_base"] if same else f"{labels['dtype_base']} → {labels['dtype_trained']}"
        joined.append({"": labels, **views})
    return build("tensors", "Tensors", columns, joined, num_tensors - len(joined))
