"""An analysis in Weights & Biases: summary values, tables, charts and the report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from opdkernels.errors import UsageError

if TYPE_CHECKING:
    from opdkernels.analysis.result import Analysis

TABLES = ("tensors", "groups", "spectra", "geometry")
CHARTS = {"module": "bar", "layer": "line"}  # groups whose changed fraction is drawn, and how


def log_analysis(analysis: Analysis, run: Any, prefix: str) -> None:
    """See `Analysis.to_wandb`."""
    wandb = import_wandb()
    run = wandb.run if run is None else run
    if run is None:
        raise UsageError("there is no active run of wandb; call wandb.init(...) first, or give run")
    run.summary.update({f"{prefix}{name}": value for name, value in summary_values(analysis.summary).items()})
    logged: dict[str, Any] = {}
    for name in TABLES:
        table = getattr(analysis, name)
        if table is not None:
            logged[f"tables/{name}"] = wandb.Table(columns=table.column_names, data=cells(table))
    for group, kind in CHARTS.items():
        points = changed_by(analysis.groups, group)
        if len(points) > 1:
            title = f"Fraction changed, visible in bf16, by {group}"
            data = wandb.Table(columns=[group, "changed"], data=points)
            logged[f"changed_by_{group}"] = getattr(wandb.plot, kind)(data, group, "changed", title=title)
    steps = bf16_steps(analysis.summary)
    if steps:
        data = wandb.Table(columns=["bf16 steps", "coordinates"], data=steps)
        title = "Changed coordinates by their distance in bf16 steps"
        logged["bf16_steps"] = wandb.plot.bar(data, "bf16 steps", "coordinates", title=title)
    report = analysis.path / "report.html" if analysis.path is not None else None
    if report is not None and report.is_file():
        with open(report, encoding="utf-8") as file:  # all versions take an open file; some take a text for a path
            logged["report"] = wandb.Html(file, inject=False)
    run.log({f"{prefix}{name}": value for name, value in logged.items()})


def import_wandb() -> Any:
    """The module wandb. Raises ImportError that says how to install it."""
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError:
        raise ImportError("to_wandb needs wandb; run pip install wandb") from None
    return wandb


def summary_values(summary: dict[str, Any]) -> dict[str, float | int | str]:
    """The values of the whole model: those of each view, medians of the matrices, and the verdict."""
    values: dict[str, Any] = {
        "verdict": summary["verdict"]["text"],
        "base": summary["base"],
        "trained": summary["trained"],
        "tensors": summary["matched"]["tensors"],
        "parameters": summary["matched"]["parameters"],
    }
    for view, metrics in summary["views"].items():
        values |= {f"{view}/{name}": value for name, value in metrics.items()}
    spectra = summary.get("spectra") or {"metrics": {}}
    values |= {f"spectra/{name}": centre["median"] for name, centre in spectra["metrics"].items()}
    return {name: value for name, value in values.items() if is_known(value)}


def is_known(value: Any) -> bool:
    """Whether a value is a text or a finite number."""
    return isinstance(value, str) or (isinstance(value, (int, float)) and math.isfinite(value))


def cells(table: pa.Table) -> list[list[Any]]:
    """The rows of a table, with lists as text: a column of wandb has one type, and lists of one length."""
    columns = [column.to_pylist() for column in table.columns]
    return [[str(cell) if isinstance(cell, list) else cell for cell in row] for row in zip(*columns, strict=True)]


def changed_by(groups: pa.Table, group: str) -> list[list[Any]]:
    """The groups of one kind and the fraction of their coordinates that changed visibly."""
    rows = groups.to_pylist()
    chosen = [row for row in rows if row["by"] == group and row["view"] == "visible" and row["frac_zero"] is not None]
    points = [[row[group], 1 - row["frac_zero"]] for row in chosen if row[group] not in (None, -1)]
    return sorted(points) if group == "layer" else sorted(points, key=lambda point: -point[1])


def bf16_steps(summary: dict[str, Any]) -> list[list[Any]]:
    """Distances in bf16 steps and how many coordinates have them, without those that did not change."""
    histogram = summary["ulp"]
    pairs = zip(histogram["distance"], histogram["count"], strict=True)
    return [[distance, count] for distance, count in pairs if distance != "0"] if any(histogram["count"]) else []
