"""Figures of a page: drawings with a heading, and the values behind them, which the page shows as a table and saves as
CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from opdkernels.report.tables import Cell
from opdkernels.report.typography import sort_value


@dataclass(frozen=True)
class Values:
    """The values of a drawing.

    Attributes:
        head: Names of the columns.
        rows: Cells, one list per row.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


Formatter = Callable[[Any], str]
ValueColumn = tuple[str, Formatter | None, Sequence[Any]]  # name, formatter of numbers (None: texts), one value per row


def value_rows(*columns: ValueColumn) -> Values:
    """The values of a drawing from its columns, which have the same length.

    >>> value_rows(("arm", None, ["start"]), ("score", str, [0.5])).rows
    [[Cell(text='start', sort=None, detail=''), Cell(text='0.5', sort='0.5', detail='')]]
    """
    cells = [
        [Cell(str(value), None) if text is None else Cell(text(value), sort_value(value)) for value in values]
        for _, text, values in columns
    ]
    return Values([name for name, _, _ in columns], [list(row) for row in zip(*cells, strict=True)])


@dataclass(frozen=True)
class Figure:
    """A chart of `macros.html`.

    Attributes:
        heading: What the drawing shows; also the name of the files that the page saves.
        note: How to read it.
        keys: Style class and name of each line.
        drawings: One per frame of `svg.FRAMES`.
        values: What is drawn.
    """

    heading: str
    note: str
    keys: Sequence[tuple[str, str]]
    drawings: Sequence[Markup]
    values: Values
