"""Tables of a page: columns with tooltips, and cells that sort by the value behind the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from opdkernels.metrics.catalog import metrics_on_page
from opdkernels.metrics.registry import VIEWS
from opdkernels.report import typography
from opdkernels.report.glossary import term

FORMATTERS: dict[str, Callable[[Any], str]] = {
    "count": typography.count,
    "percent": typography.percent,
    "times": typography.times,
    "measure": typography.measure,
}

# In the order of a layer's forward pass.
MODULES = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w3", "w2", "fc1", "fc2"),
    *("router", "experts", "bias", "norm", "embed_tokens", "lm_head", "other"),
)
MODULE_ORDER = {name: i for i, name in enumerate(MODULES)}


def sorted_modules(modules: Iterable[str]) -> list[str]:
    """Module names in the order of the forward pass; unknown ones last, by name."""
    return sorted(set(modules), key=lambda module: (MODULE_ORDER.get(module, len(MODULES)), module))


class Cell(NamedTuple):
    text: str
    sort: str | None  # None: sorted by the text
    detail: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a page's table.

    Attributes:
        key: Name of the metric or term.
        kind: How values are printed: count, percent, times, measure or text.
        view: The view of the row that has the value; "" for what both views share.
        section: Heading above the label, where several columns share it; the view if empty.
    """

    key: str
    kind: str = "text"
    view: str = ""
    section: str = ""

    @property
    def label(self) -> str:
        return term(self.key).label

    @property
    def tooltip(self) -> str:
        return term(self.key).definition

    @property
    def heading(self) -> str:
        """The heading above the label."""
        return self.section or self.view

    def cell(self, row: Mapping[str, Any]) -> Cell:
        value = row[self.view].get(self.key)
        if isinstance(value, Cell):
            return value
        if self.kind == "text":
            return Cell(typography.name(value) if value is not None else typography.MISSING, None)
        return Cell(FORMATTERS[self.kind](value), typography.sort_value(value))


def columns_of(page: str, *, one_view: bool = False) -> list[Column]:
    """The registered metrics of a page's table: those of both views first, then by view, then by section.

    Args:
        page: Name of the table.
        one_view: Whether both views agree, so that metrics of both are shown in the visible view only.
    """
    columns = [
        Column(metric.name, metric.format, view, metric.section)
        for metric in metrics_on_page(page)
        for view in metric.pages[page]
        if not (one_view and view == "stored" and "visible" in metric.pages[page])
    ]
    headings = ["", *VIEWS, *dict.fromkeys(column.section for column in columns if column.section)]
    return sorted(columns, key=lambda column: headings.index(column.heading))


@dataclass(frozen=True)
class Table:
    """A table ready to print. `left_out`: number of rows that the page leaves out."""

    id: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    left_out: int = 0

    @property
    def spans(self) -> list[tuple[str, int]]:
        """The upper header row: headings and the number of columns below each."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.heading:
                spans[-1] = (column.heading, spans[-1][1] + 1)
            else:
                spans.append((column.heading, 1))
        return spans

    @property
    def edges(self) -> frozenset[int]:
        """Columns at which another heading begins."""
        headings = [column.heading for column in self.columns]
        return frozenset(i for i in range(1, len(headings)) if headings[i] != headings[i - 1])


def build(
    id: str, caption: str, columns: Sequence[Column], rows: Iterable[Mapping[str, Any]], left_out: int = 0
) -> Table:
    """A table from rows: view ("" for what both share) -> metric -> value."""
    return Table(id, caption, columns, [[c.cell(row) for c in columns] for row in rows], left_out)


def layer_cell(layer: int) -> Cell:
    """A layer number; tensors outside the layers have -1."""
    return Cell(str(layer) if layer >= 0 else typography.MISSING, str(layer))
