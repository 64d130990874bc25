"""Tables of a page: columns that explain themselves, cells that sort by the value behind the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from opdkernels.report import typography
from opdkernels.report.glossary import FIGURES

FORMATS: dict[str, Callable[[Any], str]] = {
    "count": typography.count,
    "percent": typography.percent,
    "times": typography.times,
    "measure": typography.measure,
}


class Cell(NamedTuple):
    text: str
    sort: str | None  # None: sorted by the text
    detail: str = ""


@dataclass(frozen=True)
class Column:
    """A column: `key` names the figure, `view` the half of a row it comes from ("" for what both share)."""

    key: str
    kind: str = "text"
    view: str = ""
    term: str = ""
    span: str = ""

    @property
    def label(self) -> str:
        return self.term or FIGURES[self.key].term

    @property
    def title(self) -> str:
        return FIGURES[self.key].definition

    @property
    def above(self) -> str:
        """What stands above the label, where several columns share it."""
        return self.span or self.view

    def cell(self, row: Mapping[str, Any]) -> Cell:
        value = row[self.view].get(self.key)
        if isinstance(value, Cell):
            return value
        if self.kind == "text":
            return Cell(typography.name(value) if value is not None else typography.MISSING, None)
        return Cell(FORMATS[self.kind](value), typography.sort_value(value))


@dataclass(frozen=True)
class Table:
    """A table ready to print. `left_out`: rows that the page does not hold."""

    id: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    left_out: int = 0

    @property
    def spans(self) -> list[tuple[str, int]]:
        """The upper header row: runs of columns under one name."""
        runs: list[tuple[str, int]] = []
        for column in self.columns:
            if runs and runs[-1][0] == column.above:
                runs[-1] = (column.above, runs[-1][1] + 1)
            else:
                runs.append((column.above, 1))
        return runs

    @property
    def edges(self) -> frozenset[int]:
        """Columns at which another run begins."""
        return frozenset(i for i in range(1, len(self.columns)) if self.columns[i].above != self.columns[i - 1].above)


def build(
    id: str, caption: str, columns: Sequence[Column], rows: Iterable[Mapping[str, Any]], left_out: int = 0
) -> Table:
    return Table(id, caption, columns, [[c.cell(row) for c in columns] for row in rows], left_out)
