"""Tables of a run: one row per tensor, one row per group of tensors, and how tables are written."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opdkernels.errors import InputError, printable
from opdkernels.files import write_atomically
from opdkernels.metrics import coordinates, null_metrics
from opdkernels.metrics.aggregation import Members, median_of, recomputed
from opdkernels.metrics.batch import RATIO_LABELS, RATIO_SYMBOL
from opdkernels.metrics.registry import COUNT, NON_NEGATIVE, PAPER, VIEWS, Metric, family
from opdkernels.outputs import RUN_FILE
from opdkernels.runs.run_dir import REMEDY
from opdkernels.untrusted import read_file

TABLE_VERSION = 1
MAX_TABLE_BYTES = 2**31
GROUPINGS: dict[str, tuple[str, ...]] = {
    "model": (),
    "tower": ("tower",),
    "block": ("block",),
    "module": ("module",),
    "layer": ("layer",),
    "layer_module": ("layer", "module"),
}
Row = dict[str, Any]


def interleave(tensors: dict[str, list], views: dict[str, dict[str, Any]]) -> pa.Table:
    """One row per tensor and view, from the columns of both views; a metric of one view is null in the other."""
    columns = {name: twice(values, values) for name, values in tensors.items()}
    count = len(tensors["name"])
    columns["view"] = pa.array([view for _ in range(count) for view in views])
    first, second = views.values()
    for name in dict.fromkeys([*first, *second]):
        nulls = [None] * count if isinstance(first.get(name, second.get(name)), list) else np.full(count, np.nan)
        columns[name] = twice(first.get(name, nulls), second.get(name, nulls))
    return pa.table(columns, metadata={"opdkernels_table": str(TABLE_VERSION)})


def twice(first: list | np.ndarray, second: list | np.ndarray) -> pa.Array:
    """Two columns interleaved, entry by entry; NaN becomes null."""
    if isinstance(first, list):
        return pa.array([value for pair in zip(first, second, strict=True) for value in pair])
    values = np.stack([first, second], 1).ravel()
    if values.dtype != float:
        return pa.array(values)
    known = np.packbits(~np.isnan(values), bitorder="little")
    return pa.Array.from_buffers(pa.float64(), len(values), [pa.py_buffer(known), pa.py_buffer(values)])


def rows_to_arrow(rows: Sequence[Row]) -> pa.Table:
    """Columns in the order of their first appearance; a column that is None throughout is float64."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    # One conversion for all columns: every call of pa.array tries to import pandas.
    structs = pa.array(rows) if rows else pa.array([], pa.struct([]))
    arrays = [structs.field(name) for name in names]
    arrays = [a.cast(pa.float64()) if pa.types.is_null(a.type) else a for a in arrays]
    return pa.table(dict(zip(names, arrays, strict=True)), metadata={"opdkernels_table": str(TABLE_VERSION)})


def write_parquet(path: Path, table: pa.Table) -> None:
    """Writes a table atomically, compressed with zstd."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(path, sink.getvalue())


def read_table(folder: Path, run: dict[str, Any], name: str) -> pa.Table:
    """Returns a table of a finished run. Raises InputError unless run.json lists it, or if it cannot be read."""
    path = folder / f"{name}.parquet"
    if path.name not in run.get("outputs", {}):
        raise InputError(f"{printable(str(folder / RUN_FILE))} does not list {path.name}; {REMEDY}")
    return read_parquet(path)


def read_parquet(path: Path) -> pa.Table:
    """Returns a table of `write_parquet`. Raises InputError if it cannot be read, or is of another version."""
    content = read_file(path, max_bytes=MAX_TABLE_BYTES, remedy=REMEDY)
    try:
        table = pq.read_table(pa.BufferReader(content))
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = printable((str(error).splitlines() or [""])[0][:200])
        raise InputError(f"{printable(str(path))} is damaged ({reason}); {REMEDY}") from None
    version = (table.schema.metadata or {}).get(b"opdkernels_table")
    if version != str(TABLE_VERSION).encode():
        raise InputError(f"{printable(str(path))} was not written by this version of opdkernels; {REMEDY}")
    return table


def plain_cell(value: Any) -> Any:
    """A cell that no spreadsheet runs as a formula: text that starts like a formula is prefixed with an apostrophe."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value


def write_csv(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Writes rows atomically as CSV; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if (v := row.get(c)) is None else plain_cell(v) for c in columns])
    write_atomically(path, text.getvalue().encode("utf-8", "surrogatepass"))


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """numerator / denominator; None where either is missing or the denominator is 0."""
    return numerator / denominator if numerator is not None and denominator else None


GROUP_METRICS = (
    Metric(
        name="tensors",
        label="tensors",
        definition="matched tensors in the group",
        range=COUNT,
        format="count",
        aggregation=recomputed("count", lambda members: members.total(np.ones(len(members.group)))),
        tables=("groups",),
        pages={"groups": ("",)},
    ),
    Metric(
        name="bit_equal_tensors",
        label="bit-identical tensors",
        definition="tensors of the group whose coordinates are all bit-identical",
        range=COUNT,
        format="count",
        aggregation=recomputed(
            "count", lambda members: members.total(members.columns["bit_equal"] == members.columns["numel"])
        ),
        tables=("groups",),
    ),
    Metric(
        name="parameter_share",
        label="parameter share",
        definition="the group's fraction of the compared coordinates",
        aggregation=recomputed("over the model", lambda members: fraction_of_model(members, "numel")),
        tables=("groups",),
        pages={"groups": ("",)},
    ),
    Metric(
        name="energy_share",
        label="energy share",
        definition="the group's fraction of the update energy, the sum of Δ²",
        aggregation=recomputed("over the model", lambda members: fraction_of_model(members, "delta_energy")),
        source=PAPER,
        tables=("groups",),
        pages={"groups": VIEWS},
    ),
    Metric(
        name="energy_over_parameters",
        label="energy / parameters",
        definition="energy share over parameter share: above 1× the group changed more than its size alone would give",
        range=NON_NEGATIVE,
        format="times",
        aggregation=recomputed(
            "over the model",
            lambda members: fraction_of_model(members, "delta_energy") / fraction_of_model(members, "numel"),
        ),
        tables=("groups",),
        pages={"groups": VIEWS},
    ),
    *(
        replace(metric, aggregation=median_of(f"near_zero_coverage_{label}"))
        for label, metric in zip(
            RATIO_LABELS,
            family(
                Metric(
                    name="near_zero_coverage_{}_median",
                    label="near-zero coverage at {}, median",
                    definition="near-zero coverage at {}, median over the tensors of the group",
                    tables=("groups",),
                ),
                RATIO_LABELS,
                RATIO_SYMBOL,
            ),
            strict=True,
        )
    ),
)
METRICS = tuple(
    metric for metric in (*coordinates.METRICS, *null_metrics.METRICS, *GROUP_METRICS) if "groups" in metric.tables
)


def fraction_of_model(members: Members, name: str) -> np.ndarray:
    """The groups' fractions of the sum over all tensors [groups]."""
    return members.sum(name) / members.columns[name].sum()


def group_columns(members: Members, view: str) -> dict[str, np.ndarray]:
    """Metrics of each group in one view, as their aggregations give them [groups]."""
    columns = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for metric in METRICS:
            if view in metric.views:
                assert metric.aggregation.compute is not None, metric.name
                columns[metric.name] = metric.aggregation.compute(members, metric.name)
    return columns


INTEGER_COLUMNS = frozenset(metric.name for metric in METRICS if metric.format == "count")


def group_rows(tensors: dict[str, list], views: dict[str, dict[str, Any]]) -> list[Row]:
    """Groups by model, tower, block, module, layer and layer x module, in both views; in each grouping by energy.

    Args:
        tensors: Name, layer, module, block and tower of each tensor [tensors].
        views: View -> metric name -> [tensors].
    """
    rows: list[Row] = []
    if not tensors["name"]:
        return rows
    for view, metrics in views.items():
        table = {name: values.astype(float) for name, values in metrics.items() if isinstance(values, np.ndarray)}
        for grouping, keys in GROUPINGS.items():
            group_of = list(zip(*(tensors[key] for key in keys), strict=True)) if keys else [()] * len(tensors["name"])
            members = Members(table, group_of)
            columns = {name: values.tolist() for name, values in group_columns(members, view).items()}
            groups = []
            for g, key in enumerate(members.groups):
                row: Row = {"by": grouping, "view": view, **dict.fromkeys(("tower", "block", "module", "layer"))}
                row |= dict(zip(keys, key, strict=True))
                for name, values in columns.items():
                    row[name] = (
                        int(values[g]) if name in INTEGER_COLUMNS else values[g] if math.isfinite(values[g]) else None
                    )
                groups.append(row)
            rows += sorted(groups, key=lambda row: -row["delta_energy"])
    return rows
