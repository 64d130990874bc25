"""Charts as inline SVG: curves, intervals and a histogram."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from markupsafe import Markup

from opdkernels.report.figures import Figure, value_rows
from opdkernels.report.svg import (
    FRAMES,
    HALF_FRAMES,
    NOTHING,
    Frame,
    dot,
    horizontal_grid,
    line,
    number,
    path,
    probe,
    svg,
    text_at,
    x_axis_label,
    x_tick,
)
from opdkernels.report.typography import count, format_range, percent, significant


def sparsity_curve(curve: Mapping[str, Sequence[float | None]], frame: Frame = FRAMES[0]) -> Markup | None:
    """Fraction of coordinates with |Δ| ≤ ε as a function of ε: visible, the stored bounds, the null.

    Returns None without coordinates.
    """
    series = {
        key: [min(1.0, v) for v in curve[key] if v is not None]
        for key in ("visible", "stored_lower", "stored_upper", "null")
    }
    eps = [e for e in curve["eps"] if e]  # ascending, without 0, which a logarithmic axis cannot show
    if not all(len(values) == len(eps) for values in series.values()) or not eps:
        return None
    least = min(min(values) for values in series.values())
    bottom = 0.0 if least < 0.3 or least == 1 else math.floor(least * 10 - 1e-9) / 10
    low, high = math.log10(eps[0]), math.log10(eps[-1])

    def x(e: float) -> float:
        return frame.left + (math.log10(e) - low) / (high - low) * frame.inner[0]

    def y(fraction: float) -> float:
        return frame.top + (1 - fraction) / (1 - bottom) * frame.inner[1]

    parts: list[Markup] = []
    step = 0.2 if bottom == 0 else 0.1 if bottom < 0.85 else 0.05
    for k in range(round((1 - bottom) / step) + 1):
        fraction = bottom + k * step
        parts += horizontal_grid(frame, y(fraction), f"{100 * fraction:.0f} %")
    for exponent in range(round(low), round(high) + 1, frame.stride):
        parts += x_tick(frame, x(10.0**exponent), f"1e{exponent}")
    parts += [line("marker", x(1e-5), frame.top, x(1e-5), frame.floor)]
    points = {key: [(x(e), y(v)) for e, v in zip(eps, values, strict=True)] for key, values in series.items()}
    parts += [
        path("stored-band", points["stored_lower"] + points["stored_upper"][::-1], close=True),
        path("stored-line", points["stored_lower"]),
        path("null-line", points["null"]),
        path("visible-line", points["visible"]),
    ]
    marked = min(range(len(eps)), key=lambda i: abs(math.log10(eps[i]) + 5))
    parts.append(dot("visible-dot", x(1e-5), points["visible"][marked][1], 5))
    width = frame.inner[0] / (len(eps) - 1)
    for i, e in enumerate(eps):
        tooltip = (
            f"ε = {significant(e, 3)}: visible {percent(series['visible'][i])}, "
            f"stored {format_range(series['stored_lower'][i], series['stored_upper'][i])}, "
            f"expected {percent(series['null'][i])}"
        )
        parts.append(probe(tooltip, x(e) - width / 2, width, frame))
    parts.append(x_axis_label(frame, "ε, in the units of the weights"))
    label = (
        f"Fraction of coordinates with |Δ| at most ε. At 1e-5: visible {percent(series['visible'][marked])}, "
        f"expected from bf16 rounding alone {percent(series['null'][marked])}."
    )
    return svg(frame.width, frame.height, label, parts, f"chart {frame.kind}")


def spectrum_curve(
    xs: Sequence[float],
    ticks: Sequence[tuple[float, str]],
    series: Mapping[str, Sequence[float]],
    axis: str,
    label: str,
    tooltips: Sequence[str],
    frame: Frame,
) -> Markup:
    """A fraction as a function of x: mean and middle 80 % over matrices, and the null.

    Args:
        xs: Ascending positions, at least two.
        ticks: Positions on the axis and their labels.
        series: Values at `xs` by name: "mean", "low", "high" and "null".
        axis: Label of the axis.
        label: Text alternative of the drawing.
        tooltips: Text for each x.
        frame: Size of the drawing.
    """
    top = max(max(values) for values in series.values())
    top = 1.0 if top > 0.5 else math.ceil(top * 10 + 1e-9) / 10

    def x(value: float) -> float:
        return frame.left + (value - xs[0]) / (xs[-1] - xs[0]) * frame.inner[0]

    def y(fraction: float) -> float:
        return frame.top + (1 - fraction / top) * frame.inner[1]

    parts: list[Markup] = []
    for k in range(6):
        fraction = top * k / 5
        parts += horizontal_grid(frame, y(fraction), f"{100 * fraction:.0f} %")
    for value, text in ticks:
        parts += x_tick(frame, x(value), text)
    points = {key: [(x(a), y(min(b, top))) for a, b in zip(xs, values, strict=True)] for key, values in series.items()}
    parts += [
        path("visible-band", points["low"] + points["high"][::-1], close=True),
        path("null-line", points["null"]),
        path("visible-line", points["mean"]),
    ]
    width = frame.inner[0] / (len(xs) - 1)
    for value, text in zip(xs, tooltips, strict=True):
        parts.append(probe(text, x(value) - width / 2, width, frame))
    parts.append(x_axis_label(frame, axis))
    return svg(frame.width, frame.height, label, parts, f"chart {frame.kind}")


Line = tuple[str, str, Sequence[float | None]]  # style class (visible, stored, null), name, one value per step


def step_curve(
    steps: Sequence[int],
    lines: Sequence[Line],
    text: Callable[[float | None], str],
    what: str,
    frame: Frame,
    categories: Sequence[str] | None = None,
) -> Markup:
    """Metrics over the steps of a run, two or more.

    Args:
        steps: Ascending step numbers.
        lines: What to draw.
        text: Formatter of the values; with `percent` the axis is in percent.
        what: Text alternative, to which the first and last values are added.
        frame: Size of the drawing.
        categories: Names of the steps, which are then positions on the axis; None: the steps are numbers.
    """
    names = dict(zip(steps, categories or [f"step {step}" for step in steps], strict=True))
    known = [v for _, _, values in lines for v in values if v is not None]
    ticks = axis_ticks(min(known), max(known))
    low, high = ticks[0], ticks[-1]
    scale, unit = (100, " %") if text is percent else (1, "")
    named = [f"{scale * value:.3g}{unit}" for value in ticks]
    frame = replace(frame, left=max(frame.left, 16 + 7 * max(map(len, named))))

    def x(step: float) -> float:
        return frame.left + (step - steps[0]) / (steps[-1] - steps[0]) * frame.inner[0]

    def y(value: float) -> float:
        return frame.top + (high - value) / (high - low) * frame.inner[1]

    parts: list[Markup] = []
    for value, name in zip(ticks, named, strict=True):
        parts += horizontal_grid(frame, y(value), name)
    for step in thin_labels([*steps], x, 8 * max(map(len, names.values())) if categories else 52):
        parts += x_tick(frame, x(step), names[step].removeprefix("step "))
    for kind, _, values in lines:
        points = [(x(step), y(v)) for step, v in zip(steps, values, strict=True) if v is not None]
        if len(points) > 1:
            parts.append(path(f"{kind}-line", points))
        parts += [dot(f"{kind}-dot", px, py, 4) for px, py in points if kind != "null"]
    edges = [x(steps[0]), *((x(a) + x(b)) / 2 for a, b in pairwise(steps)), x(steps[-1])]
    for i, step in enumerate(steps):
        tooltip = f"{names[step]}: " + ", ".join(f"{name} {text(values[i])}" for _, name, values in lines)
        parts.append(probe(tooltip, edges[i], edges[i + 1] - edges[i], frame))
    parts.append(x_axis_label(frame, "checkpoint" if categories else "step"))
    ends = ", ".join(f"{name} from {text(values[0])} to {text(values[-1])}" for _, name, values in lines)
    return svg(frame.width, frame.height, f"{what} {ends}", parts, f"chart {frame.kind}")


def step_figure(
    heading: str,
    note: str,
    steps: Sequence[int],
    lines: Sequence[Line],
    text: Callable[[float | None], str],
    categories: Sequence[str] | None = None,
) -> Figure:
    """A figure with one step curve per frame; arguments as for `step_curve`."""
    return Figure(
        heading,
        note,
        [(f"{style}-line-key", name) for style, name, _ in lines],
        [step_curve(steps, lines, text, heading, frame, categories) for frame in HALF_FRAMES],
        value_rows(
            ("checkpoint", None, categories) if categories else ("step", str, steps),
            *((name, text, values) for _, name, values in lines),
        ),
    )


Interval = tuple[str, float, float, float]  # name, value, lower and upper end


def interval_chart(
    rows: Sequence[Interval], text: Callable[[float | None], str], what: str, axis: str, frame: Frame
) -> Markup:
    """Values with their intervals, one row each, with zero on the axis.

    Args:
        rows: What to draw, at least one.
        text: Formatter of the values; with `percent` the axis is in percent.
        what: Text alternative, to which names and values are added.
        axis: Label of the axis.
        frame: Size and margins; the height follows from the number of rows.
    """
    row_height = 30
    frame = replace(
        frame,
        left=min(frame.width // 2, 24 + 7 * max(len(name) for name, *_ in rows)),
        height=frame.top + frame.bottom + row_height * len(rows),
    )
    least, most = min(0.0, *(low for *_, low, _ in rows)), max(0.0, *(high for *_, high in rows))
    ticks = axis_ticks(least, most if most > least else least + 1.0)

    def x(value):
        return frame.left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * frame.inner[0]

    parts = []
    for tick in ticks[:: frame.stride]:
        parts += [
            line("grid", x(tick), frame.top, x(tick), frame.floor),
            text_at("tick middle", x(tick), frame.floor + 22, f"{100 * tick:g} %" if text is percent else f"{tick:g}"),
        ]
    for i, (name, value, low, high) in enumerate(rows):
        y = frame.top + row_height * (i + 0.5)
        tooltip = f"{name}: {text(value)}, 95 % interval {text(low)} to {text(high)}"
        parts += [
            text_at("tick end", frame.left - 10, y + 4, name),
            path("stored-line", [(x(low), y), (x(high), y)]),
            dot("stored-dot", x(value), y, 5),
            Markup('<g class="probe"><title>{}</title><rect x="{}" y="{}" width="{}" height="{}"/></g>').format(
                tooltip, frame.left, number(y - row_height / 2), frame.inner[0], row_height
            ),
        ]
    parts.append(x_axis_label(frame, axis))
    return svg(
        frame.width,
        frame.height,
        f"{what} " + ", ".join(f"{name} {text(value)}" for name, value, *_ in rows),
        parts,
        f"chart {frame.kind}",
    )


def thin_labels(steps: list[int], x: Callable[[float], float], distance: float) -> list[int]:
    """The last step, and earlier ones whose labels are at least `distance` apart."""
    labelled = [steps[-1]]
    for step in reversed(steps[:-1]):
        if x(labelled[-1]) - x(step) >= distance:
            labelled.append(step)
    return labelled


def axis_ticks(least: float, most: float) -> list[float]:
    """Three to six round values that cover least .. most, from zero unless the values are close together.

    >>> axis_ticks(0.7, 0.73), axis_ticks(3, 146)
    ([0.7, 0.71, 0.72, 0.73], [0.0, 50.0, 100.0, 150.0])
    """
    low = 0.0 if 0 <= least < 0.6 * most else least
    span = (most - low) or abs(most) or 1.0
    scale = 10.0 ** math.floor(math.log10(span))
    step = next(m * scale for m in (0.2, 0.25, 0.5, 1, 2) if span / (m * scale) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(most / step - 1e-9)
    return [float(f"{k * step:.10g}") for k in range(first, max(last, first + 1) + 1)]


STEP_LABELS = {"wide": ("0", "4", "8", "12", "16"), "slim": ("0", "8", "16")}


def ulp_histogram(distance: Sequence[str], counts: Sequence[int], frame: Frame = FRAMES[0]) -> Markup | None:
    """Coordinates by signed bf16 distance, counts on a logarithmic axis. None without coordinates."""
    most = max(counts, default=0)
    if not most:
        return None
    decades = max(1, math.ceil(math.log10(most * 1.02)))
    width = frame.inner[0] / len(counts)

    def y(n: float) -> float:  # a count of 1 is half a decade above the floor
        return frame.floor - (math.log10(n) + 0.5) / (decades + 0.5) * frame.inner[1]

    parts: list[Markup] = []
    stride = 1 if decades <= 6 else 2
    for exponent in range(0, decades + 1, stride):
        parts += horizontal_grid(frame, y(10**exponent), "1" if not exponent else f"1e{exponent}")
    parts.append(line("baseline", frame.left, frame.floor, frame.width - frame.right, frame.floor))
    total = sum(counts)
    for i, (name, n) in enumerate(zip(distance, counts, strict=True)):
        x = frame.left + i * width
        steps = "step" if name in ("1", "-1") else "steps"
        tooltip = f"{name.replace('-', '−')} {steps}: {count(n)} coordinates, {percent(n / total)}"
        bar = NOTHING
        if n:
            bar = Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>').format(
                "bar zero" if name == "0" else "bar",
                number(x + width * 0.12),
                number(y(n)),
                number(width * 0.76),
                number(frame.floor - y(n)),
            )
        parts.append(probe(tooltip, x, width, frame, bar))
        if name.removeprefix("-") in STEP_LABELS[frame.kind]:
            parts.append(text_at("tick middle", x + width / 2, frame.floor + 22, name.replace("-", "−")))
    parts.append(x_axis_label(frame, "bf16 steps, base to trained"))
    return svg(
        frame.width,
        frame.height,
        f"Histogram of bf16 steps on a logarithmic scale; the tallest bar holds {count(most)} coordinates.",
        parts,
        f"chart {frame.kind}",
    )
