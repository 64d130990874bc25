"""Heat maps by module and layer, their colour scales and legends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from opdkernels.report.figures import Values
from opdkernels.report.svg import number, svg, text_at
from opdkernels.report.tables import Cell
from opdkernels.report.typography import MISSING, percent, sort_value, times

SEQUENTIAL_STEPS = 9


REACH = 4.0  # largest ratio of the diverging colours
DIVERGING_STEPS = 11


NARROW_LAYERS = 4  # of a heat map that is drawn next to others
ROW, HEAD, GAP = 26, 24, 2  # of a heat map, in pixels: height of a row, height of the layer numbers, between cells


@dataclass(frozen=True)
class Scale:
    """Maps values to colour classes.

    Attributes:
        classes: The class of a value.
        text: Text of a value in tooltips.
        short: Text of a value in a cell.
        steps: All classes, in the order of the legend.
        stops: Text of the legend's ends and middle, or of its middle only.
    """

    classes: Callable[[float], str]
    text: Callable[[float | None], str]
    short: Callable[[float], str]
    steps: Sequence[str]
    stops: Sequence[str]


def fraction_scale(values: Sequence[float]) -> Scale:
    """Nine steps of one hue from 0 to 1, the same on every page."""
    return Scale(
        lambda value: f"q{max(0, min(SEQUENTIAL_STEPS - 1, int(value * SEQUENTIAL_STEPS)))}",
        percent,
        lambda v: f"{100 * v:.0f}" if 0.005 <= v <= 0.995 or v in (0, 1) else f"{100 * v:.1f}",
        [f"q{k}" for k in range(SEQUENTIAL_STEPS)],
        [percent(0.0), percent(0.5), percent(1.0)],
    )


def ratio_scale(values: Sequence[float]) -> Scale:
    """Eleven steps around 1, logarithmic and symmetric, the middle neutral, the same on every page. Ratios beyond REACH
    have the end colours."""
    reach = math.log(REACH)

    def step(value: float) -> str:
        position = -1.0 if value <= 0 else max(-1.0, min(1.0, math.log(value) / reach))
        return f"d{min(DIVERGING_STEPS - 1, int((position + 1) / 2 * DIVERGING_STEPS))}"

    below, above = any(v < 1 / REACH for v in values), any(v > REACH for v in values)
    return Scale(
        step,
        times,
        short_ratio,
        [f"d{k}" for k in range(DIVERGING_STEPS)],
        [f"{'≤' if below else ''}{1 / REACH:.3g}×", "1×", f"{'≥' if above else ''}{REACH:.3g}×"],
    )


def short_ratio(value: float) -> str:
    return "<0.01" if 0 < value < 0.005 else f"{value:.2f}" if value < 9.95 else f"{value:.0f}"


def heat_map(
    cells: dict[tuple[str, int], float | None], modules: Sequence[str], layers: Sequence[int], scale: Scale, what: str
) -> tuple[Markup, Markup]:
    """A value per module and layer, as colours.

    Args:
        cells: Values by (module, layer), layer -1 for tensors outside the layers. None is drawn grey, a missing cell is
            not drawn.
        modules: Rows, from top to bottom.
        layers: Columns, from left to right.
        scale: Colours and texts of the values.
        what: Text alternative, to which rows and columns are added.

    Returns:
        Row names and cells, as two drawings of one height: the first stays visible while the second scrolls.
    """
    width = max(16, min(72, 880 // max(1, len(layers))))
    every = next(k for k in (1, 2, 5, 10, 20, 50, 100) if k * width >= 26)
    height = HEAD + ROW * len(modules)
    longest = max(map(len, modules), default=0)
    names = [text_at("row end", 8 * longest + 8, HEAD + ROW * i + 17, module) for i, module in enumerate(modules)]
    parts: list[Markup] = [
        text_at("tick middle", (i + 0.5) * width, 15, MISSING if layer < 0 else str(layer))
        for i, layer in enumerate(layers)
        if layer < 0 or layer % every == 0 or len(layers) == 1
    ]
    for j, module in enumerate(modules):
        for i, layer in enumerate(layers):
            if (module, layer) not in cells:
                continue
            value = cells[module, layer]
            location = f"layer {layer}" if layer >= 0 else "no layer"
            inner = Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="2"/>').format(
                i * width, HEAD + ROW * j, width - GAP, ROW - GAP
            )
            if value is not None and width >= 34:
                inner += Markup('<text x="{}" y="{}">{}</text>').format(
                    number((i + 0.5) * width - 1), HEAD + ROW * j + 16, scale.short(value)
                )
            parts.append(
                Markup('<g class="{}"><title>{}</title>{}</g>').format(
                    scale.classes(value) if value is not None else "none",
                    f"{location}, {module}: {scale.text(value)}",
                    inner,
                )
            )
    return (
        svg(8 * longest + 14, height, "modules", names),
        svg(width * len(layers), height, f"{what} by layer (columns) and module (rows)", parts),
    )


class MapDrawing(NamedTuple):
    """A heat map of one view: its row names, its cells and the legend of its colours."""

    view: str
    names: Markup
    drawing: Markup
    legend: Markup


@dataclass(frozen=True)
class MapFigure:
    """Heat maps of a quantity in `macros.html`, one drawing per view.

    Attributes:
        heading: The quantity; also the name of the files that the page saves.
        note: How to read it.
        drawings: One per view with a known value.
        values: What is drawn.
        left_out: Number of layers that are not drawn.
    """

    heading: str
    note: str
    drawings: Sequence[MapDrawing]
    values: Values
    left_out: int = 0

    @property
    def narrow(self) -> bool:
        """Whether several such figures fit side by side."""
        return len(self.values.head) - len(self.drawings) <= NARROW_LAYERS


Cells = dict[tuple[str, int], float | None]


def map_figures(
    heading: str,
    note: str,
    views: Mapping[str, Cells],
    scale_of: Callable[[Sequence[float]], Scale],
    modules: Sequence[str],
    layers: Sequence[int],
    left_out: int = 0,
) -> list[MapFigure]:
    """A figure of heat maps, as a list: empty where no cell of any view has a value.

    Args:
        heading, note, left_out: As for `MapFigure`.
        views: Cells as for `heat_map`, by view; one view may be "".
        scale_of: The scale for the known values of a view.
        modules: Rows, from top to bottom.
        layers: Columns, from left to right.
    """
    drawings, rows = [], []
    known = {view: cells for view, cells in views.items() if any(value is not None for value in cells.values())}
    for view, cells in known.items():
        scale = scale_of([value for value in cells.values() if value is not None])
        drawings.append(MapDrawing(view, *heat_map(cells, modules, layers, scale, heading), legend(scale)))
        label = [Cell(view, None)] if len(known) > 1 else []
        for module in modules:
            values = [cells.get((module, layer)) for layer in layers]
            rows.append([Cell(module, None), *label, *(Cell(scale.text(v), sort_value(v)) for v in values)])
    if not drawings:
        return []
    columns = [f"layer {layer}" if layer >= 0 else "no layer" for layer in layers]
    head = ["module", *(["view"] if len(known) > 1 else []), *columns]
    return [MapFigure(heading, note, drawings, Values(head, rows), left_out)]


def legend(scale: Scale) -> Markup:
    """A strip of the scale's colours with its ends and middle."""
    width, step = 220, 220 / len(scale.steps)
    parts = [
        Markup('<g class="{}"><rect x="{}" y="0" width="{}" height="12"/></g>').format(
            kind, number(k * step), number(step + 0.3)
        )
        for k, kind in enumerate(scale.steps)
    ]
    positions = (
        [("start", 0.0), ("middle", width / 2), ("end", float(width))]
        if len(scale.stops) == 3
        else [("middle", width / 2)]
    )
    parts += [text_at(f"tick {anchor}", x, 28, stop) for (anchor, x), stop in zip(positions, scale.stops, strict=True)]
    return svg(width, 34, "colours from " + " to ".join(scale.stops), parts)
