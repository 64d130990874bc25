"""Tables of a run: rows of tensors, groups of them, and how they are written."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opdkernels.files import write_atomically
from opdkernels.metrics.coordinates import RATIOS, TOP_FRACTIONS, ratio_label

TABLE_VERSION = 1
GROUPINGS: dict[str, tuple[str, ...]] = {
    "model": (),
    "tower": ("tower",),
    "block": ("block",),
    "module": ("module",),
    "layer": ("layer",),
    "layer_module": ("layer", "module"),
}
Row = dict[str, Any]


def interleave(about: dict[str, list], views: dict[str, dict[str, Any]]) -> pa.Table:
    """One row a tensor and view, from what both views share and the columns of each; a figure of one view is null in the other."""
    columns = {name: twice(values, values) for name, values in about.items()}
    count = len(about["name"])
    columns["view"] = pa.array([view for _ in range(count) for view in views])
    first, second = views.values()
    for name in dict.fromkeys([*first, *second]):
        none = [None] * count if isinstance(first.get(name, second.get(name)), list) else np.full(count, np.nan)
        columns[name] = twice(first.get(name, none), second.get(name, none))
    return pa.table(columns, metadata={"opdkernels_table": str(TABLE_VERSION)})


def twice(one: list | np.ndarray, other: list | np.ndarray) -> pa.Array:
    """Two columns, entry by entry in turn; NaN becomes null."""
    if isinstance(one, list):
        return pa.array([value for pair in zip(one, other, strict=True) for value in pair])
    values = np.stack([one, other], 1).ravel()
    if values.dtype != float:
        return pa.array(values)
    known = np.packbits(~np.isnan(values), bitorder="little")
    return pa.Array.from_buffers(pa.float64(), len(values), [pa.py_buffer(known), pa.py_buffer(values)])


def rows_to_arrow(rows: Sequence[Row]) -> pa.Table:
    """Columns in the order of their first appearance; a column of nothing but None is float."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    # One conversion for all columns: each call of pa.array looks for pandas anew.
    structs = pa.array(rows) if rows else pa.array([], pa.struct([]))
    arrays = [structs.field(name) for name in names]
    arrays = [a.cast(pa.float64()) if pa.types.is_null(a.type) else a for a in arrays]
    return pa.table(dict(zip(names, arrays, strict=True)), metadata={"opdkernels_table": str(TABLE_VERSION)})


def write_parquet(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(path, sink.getvalue())


def plain_cell(value: Any) -> Any:
    """A cell that no spreadsheet runs as a formula: text that starts like one gets an apostrophe in front."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value


def write_csv(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if (v := row.get(c)) is None else plain_cell(v) for c in columns])
    write_atomically(path, text.getvalue().encode("utf-8", "surrogatepass"))


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


class Members:
    """The rows of one view as columns, and sums of them by group. Sums run in the order of the rows: the same on any machine."""

    def __init__(self, columns: dict[str, np.ndarray], keys: Sequence[tuple]):
        self.columns = columns
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self.groups, self.group = list(number), np.array([number[key] for key in keys], np.int64)

    def sum(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.group, weights=values, minlength=len(self.groups))

    def mean(self, name: str, weight: np.ndarray) -> np.ndarray:
        """Weighted mean by group over the rows that have the figure; NaN where none has weight."""
        values = self.columns[name]
        used = ~np.isnan(values) & (weight > 0)
        total = self.sum(np.where(used, weight, 0))
        with np.errstate(invalid="ignore"):
            return self.sum(np.where(used, values * weight, 0)) / np.where(total > 0, total, np.nan)

    def median(self, name: str) -> np.ndarray:
        values = self.columns[name]
        known = ~np.isnan(values)
        order = np.lexsort((values[known], self.group[known]))
        ranked = np.append(values[known][order], np.nan)
        sizes = np.bincount(self.group[known], minlength=len(self.groups))
        starts = np.cumsum(sizes) - sizes
        low, high = starts + np.maximum(sizes - 1, 0) // 2, starts + sizes // 2
        return np.where(sizes > 0, (ranked[low] + ranked[np.minimum(high, len(ranked) - 1)]) / 2, np.nan)


def group_columns(members: Members, nulls: bool) -> dict[str, np.ndarray]:
    """Figures of each group in one view: sums, coordinate-weighted fractions, energy-weighted top energy, near-zero
    coverage over all changed coordinates, and the share of energy over the share of parameters."""
    column, total = members.columns, members.sum
    numel, nonfinite, changed, energy = (column[c] for c in ("numel", "nonfinite", "changed", "delta_energy"))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {
            "tensors": total(np.ones(len(numel))),
            "numel": total(numel),
            "nonfinite": total(nonfinite),
            "bit_equal": total(column["bit_equal"]),
            "bit_equal_tensors": total(column["bit_equal"] == numel),
            "changed": total(changed),
            "delta_energy": total(energy),
            "source_energy": total(column["source_energy"]),
            "energy_share": total(energy) / energy.sum(),
            "parameter_share": total(numel) / numel.sum(),
            "energy_over_parameters": total(energy) / energy.sum() / (total(numel) / numel.sum()),
            "relative_norm": np.sqrt(total(energy) / total(column["source_energy"])),
        }
        for name in column:
            if name.startswith("frac_") or name == "unchanged_rtol_1e-3":
                found[name] = members.mean(name, numel - nonfinite)
        for p in TOP_FRACTIONS:
            found[f"top_energy_{ratio_label(p)}"] = members.mean(f"top_energy_{ratio_label(p)}", energy)
        for r in RATIOS:
            label = f"near_zero_coverage_{ratio_label(r)}"
            for suffix in ("", "_lower", "_upper"):
                found[label + suffix] = members.mean(label + suffix, changed)
            if nulls:
                found[f"{label}_null"] = members.mean(f"{label}_null", column["changed_null"])
                found[f"{label}_over_null"] = found[label] / found[f"{label}_null"]
            found[f"{label}_median"] = members.median(label)
        if nulls:
            found["changed_null"] = total(column["changed_null"])
            found["changed_over_null"] = found["changed"] / found["changed_null"]
    return found


INTEGER_COLUMNS = ("tensors", "numel", "nonfinite", "bit_equal", "bit_equal_tensors", "changed")


def group_rows(about: dict[str, list], views: dict[str, dict[str, Any]]) -> list[Row]:
    """Groups by model, tower, block, module, layer and layer × module, in both views; within a grouping in order of energy."""
    found: list[Row] = []
    if not about["name"]:
        return found
    for view, figures in views.items():
        table = {name: values.astype(float) for name, values in figures.items() if isinstance(values, np.ndarray)}
        for grouping, keys in GROUPINGS.items():
            members = Members(
                table, list(zip(*(about[k] for k in keys), strict=True)) if keys else [()] * len(about["name"])
            )
            columns = {
                name: values.tolist() for name, values in group_columns(members, nulls=view == "visible").items()
            }
            groups = []
            for g, key in enumerate(members.groups):
                row: Row = {"by": grouping, "view": view, **dict.fromkeys(("tower", "block", "module", "layer"))}
                row |= dict(zip(keys, key, strict=True))
                for name, values in columns.items():
                    row[name] = (
                        int(values[g]) if name in INTEGER_COLUMNS else values[g] if math.isfinite(values[g]) else None
                    )
                groups.append(row)
            found += sorted(groups, key=lambda row: -row["delta_energy"])
    return found
