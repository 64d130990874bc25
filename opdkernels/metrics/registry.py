"""What a metric is: name, definition, aggregation over tensors, format and the tables that show it.

Every column of the tables of `analyze`, `overlap` and `trajectory` is registered as one `Metric`, next to its formula.
The aggregation into groups, the JSON schema of summary.json, the columns and the glossary of report pages and the
column tables of docs/outputs.md are generated from these entries (`opdkernels.metrics.catalog` lists them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from opdkernels.metrics.aggregation import NOT_AGGREGATED, Aggregation

PAPER = "arXiv 2606.13657"
THIS_PACKAGE = "this package"
VIEWS = ("stored", "visible")

Format = Literal["count", "percent", "times", "measure", "text"]
FRACTION = "0 to 1"
COUNT = "count"
NON_NEGATIVE = "≥ 0"
WEIGHT_UNITS = "units of the weights"


@dataclass(frozen=True)
class Metric:
    """One column of a table.

    Attributes:
        name: Column name in parquet, CSV and JSON.
        label: Name on pages.
        definition: One line without a final period: the tooltip, the glossary entry and the cell in docs/outputs.md.
        range: Unit or range of the values, as text.
        format: How values are printed, a function of `opdkernels.formatting`; "count" columns are int64.
        aggregation: How groups of tensors combine the values.
        source: Where the metric comes from.
        tables: Tables with this column: tensors, groups, spectra, geometry, overlap, trajectory.
        views: Views that have the metric.
        pages: Table of report pages (overview, groups, tensors, trajectory, overlap) -> views in which it shows the
            metric; ("",) for a metric that is the same in every view.
        section: Heading above the label on pages, instead of the view.
        family: Metrics that differ in a parameter only share one row in docs/outputs.md: "frac_le_1e-8 … frac_le_1e-3".
        family_definition: The definition with the parameter as a symbol.
    """

    name: str
    label: str
    definition: str
    range: str = FRACTION
    format: Format = "percent"
    aggregation: Aggregation = NOT_AGGREGATED
    source: str = THIS_PACKAGE
    tables: tuple[str, ...] = ("tensors",)
    views: tuple[str, ...] = VIEWS
    pages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    section: str = ""
    family: str = ""
    family_definition: str = ""


def family(
    pattern: Metric, values: Sequence[str], symbol: str, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Metric]:
    """Metrics that differ in a parameter only; `{}` in name, label and definition is replaced by its value.

    Args:
        pattern: The metric with `{}` instead of the parameter.
        values: Values of the parameter, as in column names.
        symbol: Name of the parameter in docs/outputs.md.
        overrides: Value of the parameter -> fields of `Metric` that differ from the pattern.

    >>> pattern = Metric(name="energy_{}", label="top {}", definition="fraction of the energy in the top {}")
    >>> [metric.name for metric in family(pattern, ["1", "2"], "k")]
    ['energy_1', 'energy_2']
    """
    names = [pattern.name.format(value) for value in values]
    return [
        replace(
            pattern,
            name=name,
            label=pattern.label.format(readable(value)),
            definition=pattern.definition.format(readable(value)),
            family=f"{names[0]} … {names[-1]}" if len(names) > 1 else names[0],
            family_definition=pattern.definition.format(symbol),
            **(overrides or {}).get(value, {}),
        )
        for name, value in zip(names, values, strict=True)
    ]


def interleave(*families: Sequence[Metric]) -> list[Metric]:
    """The first metric of each family, the second of each, and so on: the order of columns."""
    return [metric for group in zip(*families, strict=True) for metric in group]


def readable(value: str) -> str:
    """A parameter in a column name as readers write it: 10pct -> 10 %."""
    return value.replace("pct", " %")
