"""Charts as inline SVG. Colours are classes of the style sheet, so one drawing serves light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from opdkernels.report.typography import MISSING, count, format_range, percent, significant, times

SEQUENTIAL_STEPS = 9
DIVERGING_STEPS = 11


@dataclass(frozen=True)
class Frame:
    """Size and margins of a drawing; every `stride`-th tick has a label. Text is 13 pixels high in both frames."""

    kind: str
    width: int
    height: int
    left: int
    right: int
    stride: int
    top: int = 14
    bottom: int = 56

    @property
    def inner(self) -> tuple[int, int]:
        return self.width - self.left - self.right, self.height - self.top - self.bottom

    @property
    def floor(self) -> int:
        return self.height - self.bottom


FRAMES = (Frame("wide", 860, 400, 58, 20, 1), Frame("slim", 330, 300, 48, 20, 2))  # desktop and phone


def _join(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _svg(width: float, height: float, label: str, content: Sequence[Markup], kind: str = "map") -> Markup:
    """A drawing of fixed size, or, with the class `chart`, one that fills the available width."""
    scaled = kind.startswith("chart")
    return Markup(
        '<svg viewBox="0 0 {w} {h}"{size} role="img" aria-label="{label}" class="{kind}">{content}</svg>'
    ).format(
        w=_n(width),
        h=_n(height),
        size=Markup("") if scaled else Markup(' width="{}" height="{}"').format(_n(width), _n(height)),
        label=label,
        kind=kind,
        content=_join(content),
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(kind, _n(x1), _n(y1), _n(x2), _n(y2))


def _text(kind: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, _n(x), _n(y), text)


def _path(kind: str, points: Sequence[tuple[float, float]], close: bool = False) -> Markup:
    d = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points) + ("Z" if close else "")
    return Markup('<path class="{}" d="{}"/>').format(kind, d)


def sparsity_curve(curve: dict[str, list[float | None]], frame: Frame = FRAMES[0]) -> Markup | None:
    """Fraction of coordinates with |Δ| ≤ ε as a function of ε: visible, the stored bounds, the null.

    Returns None without coordinates.
    """
    series = {
        key: [min(1.0, v) for v in curve[key] if v is not None]
        for key in ("visible", "stored_lower", "stored_upper", "null")
    }
    eps = [e for e in curve["eps"] if e]
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
        parts += [
            _line("grid", frame.left, y(fraction), frame.width - frame.right, y(fraction)),
            _text("tick end", frame.left - 8, y(fraction) + 4, f"{100 * fraction:.0f} %"),
        ]
    for exponent in range(round(low), round(high) + 1, frame.stride):
        parts += [
            _line("tickmark", x(10.0**exponent), frame.floor, x(10.0**exponent), frame.floor + 5),
            _text("tick middle", x(10.0**exponent), frame.floor + 22, f"1e{exponent}"),
        ]
    parts += [_line("marker", x(1e-5), frame.top, x(1e-5), frame.floor)]
    at = {key: [(x(e), y(v)) for e, v in zip(eps, values, strict=True)] for key, values in series.items()}
    parts += [
        _path("stored-band", at["stored_lower"] + at["stored_upper"][::-1], close=True),
        _path("stored-line", at["stored_lower"]),
        _path("null-line", at["null"]),
        _path("visible-line", at["visible"]),
    ]
    marked = min(range(len(eps)), key=lambda i: abs(math.log10(eps[i]) + 5))
    parts.append(
        Markup('<circle class="visible-dot" cx="{}" cy="{}" r="5"/>').format(_n(x(1e-5)), _n(at["visible"][marked][1]))
    )
    width = frame.inner[0] / (len(eps) - 1)
    for i, e in enumerate(eps):
        tooltip = (
            f"ε = {significant(e, 3)}: visible {percent(series['visible'][i])}, "
            f"stored {format_range(series['stored_lower'][i], series['stored_upper'][i])}, "
            f"expected {percent(series['null'][i])}"
        )
        parts.append(
            Markup('<g class="probe"><title>{}</title><rect x="{}" y="{}" width="{}" height="{}"/></g>').format(
                tooltip, _n(x(e) - width / 2), frame.top, _n(width), frame.inner[1]
            )
        )
    parts.append(
        _text(
            "axis middle",
            (frame.left + frame.width - frame.right) / 2,
            frame.height - 8,
            "ε, in the units of the weights",
        )
    )
    label = (
        f"Fraction of coordinates with |Δ| at most ε. At 1e-5: visible {percent(series['visible'][marked])}, "
        f"expected from bf16 rounding alone {percent(series['null'][marked])}."
    )
    return _svg(frame.width, frame.height, label, parts, f"chart {frame.kind}")


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
        parts += [
            _line("grid", frame.left, y(fraction), frame.width - frame.right, y(fraction)),
            _text("tick end", frame.left - 8, y(fraction) + 4, f"{100 * fraction:.0f} %"),
        ]
    for value, text in ticks:
        parts += [
            _line("tickmark", x(value), frame.floor, x(value), frame.floor + 5),
            _text("tick middle", x(value), frame.floor + 22, text),
        ]
    at = {key: [(x(a), y(min(b, top))) for a, b in zip(xs, values, strict=True)] for key, values in series.items()}
    parts += [
        _path("visible-band", at["low"] + at["high"][::-1], close=True),
        _path("null-line", at["null"]),
        _path("visible-line", at["mean"]),
    ]
    width = frame.inner[0] / (len(xs) - 1)
    for value, text in zip(xs, tooltips, strict=True):
        parts.append(
            Markup('<g class="probe"><title>{}</title><rect x="{}" y="{}" width="{}" height="{}"/></g>').format(
                text, _n(x(value) - width / 2), frame.top, _n(width), frame.inner[1]
            )
        )
    parts.append(_text("axis middle", (frame.left + frame.width - frame.right) / 2, frame.height - 8, axis))
    return _svg(frame.width, frame.height, label, parts, f"chart {frame.kind}")


Line = tuple[str, str, Sequence[float | None]]  # style class (visible, stored, null), name, one value per step


def step_curve(
    steps: Sequence[int], lines: Sequence[Line], text: Callable[[float | None], str], what: str, frame: Frame
) -> Markup:
    """Metrics over the steps of a run, two or more.

    Args:
        steps: Ascending step numbers.
        lines: What to draw.
        text: Formatter of the values; with `percent` the axis is in percent.
        what: Text alternative, to which the first and last values are added.
        frame: Size of the drawing.
    """
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
        parts += [
            _line("grid", frame.left, y(value), frame.width - frame.right, y(value)),
            _text("tick end", frame.left - 8, y(value) + 4, name),
        ]
    for step in thin_labels([*steps], x, 52):
        parts += [
            _line("tickmark", x(step), frame.floor, x(step), frame.floor + 5),
            _text("tick middle", x(step), frame.floor + 22, str(step)),
        ]
    for kind, _, values in lines:
        points = [(x(step), y(v)) for step, v in zip(steps, values, strict=True) if v is not None]
        if len(points) > 1:
            parts.append(_path(f"{kind}-line", points))
        parts += [
            Markup('<circle class="{}-dot" cx="{}" cy="{}" r="4"/>').format(kind, _n(a), _n(b))
            for a, b in points
            if kind != "null"
        ]
    edges = [x(steps[0]), *((x(a) + x(b)) / 2 for a, b in pairwise(steps)), x(steps[-1])]
    for i, step in enumerate(steps):
        tooltip = f"step {step}: " + ", ".join(f"{name} {text(values[i])}" for _, name, values in lines)
        parts.append(
            Markup('<g class="probe"><title>{}</title><rect x="{}" y="{}" width="{}" height="{}"/></g>').format(
                tooltip, _n(edges[i]), frame.top, _n(edges[i + 1] - edges[i]), frame.inner[1]
            )
        )
    parts.append(_text("axis middle", (frame.left + frame.width - frame.right) / 2, frame.height - 8, "step"))
    ends = ", ".join(f"{name} from {text(values[0])} to {text(values[-1])}" for _, name, values in lines)
    return _svg(frame.width, frame.height, f"{what} {ends}", parts, f"chart {frame.kind}")


def step_figure(
    heading: str, note: str, steps: Sequence[int], lines: Sequence[Line], text: Callable[[float | None], str]
) -> dict[str, Any]:
    """A figure of `macros.html` with one step curve per frame; arguments as for `step_curve`."""
    return {
        "heading": heading,
        "note": note,
        "keys": [(f"{style}-line-key", name) for style, name, _ in lines],
        "drawings": [step_curve(steps, lines, text, heading, frame) for frame in FRAMES],
    }


Interval = tuple[str, float, float, float]  # name, value, lower and upper end


def interval_chart(
    rows: Sequence[Interval], text: Callable[[float | None], str], what: str, axis: str, frame: Frame
) -> Markup:
    """Values with their intervals, one row each, with zero on the axis."""
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
            _line("grid", x(tick), frame.top, x(tick), frame.floor),
            _text("tick middle", x(tick), frame.floor + 22, f"{100 * tick:g} %" if text is percent else f"{tick:g}"),
        ]
    for i, (name, value, low, high) in enumerate(rows):
        y = frame.top + row_height * (i + 0.5)
        tooltip = f"{name}: {text(value)}, 95 % interval {text(low)} to {text(high)}"
        parts += [
            _text("tick end", frame.left - 10, y + 4, name),
            _path("stored-line", [(x(low), y), (x(high), y)]),
            Markup('<circle class="stored-dot" cx="{}" cy="{}" r="5"/>').format(_n(x(value)), _n(y)),
            Markup('<g class="probe"><title>{}</title><rect x="{}" y="{}" width="{}" height="{}"/></g>').format(
                tooltip, frame.left, _n(y - row_height / 2), frame.inner[0], row_height
            ),
        ]
    parts.append(_text("axis middle", (frame.left + frame.width - frame.right) / 2, frame.height - 8, axis))
    return _svg(
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
        parts += [
            _line("grid", frame.left, y(10**exponent), frame.width - frame.right, y(10**exponent)),
            _text("tick end", frame.left - 8, y(10**exponent) + 4, "1" if not exponent else f"1e{exponent}"),
        ]
    parts.append(_line("baseline", frame.left, frame.floor, frame.width - frame.right, frame.floor))
    total = sum(counts)
    for i, (name, n) in enumerate(zip(distance, counts, strict=True)):
        x = frame.left + i * width
        steps = "step" if name in ("1", "-1") else "steps"
        tooltip = f"{name.replace('-', '−')} {steps}: {count(n)} coordinates, {percent(n / total)}"
        bar = Markup("")
        if n:
            bar = Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>').format(
                "bar zero" if name == "0" else "bar",
                _n(x + width * 0.12),
                _n(y(n)),
                _n(width * 0.76),
                _n(frame.floor - y(n)),
            )
        parts.append(
            Markup('<g class="probe"><title>{}</title>{}<rect x="{}" y="{}" width="{}" height="{}"/></g>').format(
                tooltip, bar, _n(x), frame.top, _n(width), frame.inner[1]
            )
        )
        if name.removeprefix("-") in STEP_LABELS[frame.kind]:
            parts.append(_text("tick middle", x + width / 2, frame.floor + 22, name.replace("-", "−")))
    parts.append(
        _text(
            "axis middle",
            (frame.left + frame.width - frame.right) / 2,
            frame.height - 8,
            "bf16 steps, base to trained",
        )
    )
    return _svg(
        frame.width,
        frame.height,
        f"Histogram of bf16 steps on a logarithmic scale; the tallest bar holds {count(most)} coordinates.",
        parts,
        f"chart {frame.kind}",
    )


@dataclass(frozen=True)
class Scale:
    """Maps values to colour classes. `stops`: text of the legend's ends and middle."""

    classes: Callable[[float], str]
    text: Callable[[float | None], str]
    short: Callable[[float], str]
    steps: Sequence[str]
    stops: Sequence[str]


def fraction_scale(values: Sequence[float]) -> Scale:
    """Nine steps of one hue over the range of the values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    reach = high - low

    def step(value: float) -> str:
        if reach <= 1e-12:
            return f"q{SEQUENTIAL_STEPS // 2}"
        return f"q{min(SEQUENTIAL_STEPS - 1, int((value - low) / reach * SEQUENTIAL_STEPS))}"

    single = reach <= 1e-12
    return Scale(
        step,
        percent,
        lambda v: f"{100 * v:.0f}" if 0.005 <= v <= 0.995 or v in (0, 1) else f"{100 * v:.1f}",
        [f"q{SEQUENTIAL_STEPS // 2}"] if single else [f"q{k}" for k in range(SEQUENTIAL_STEPS)],
        [percent(low)] if single else [percent(low), percent((low + high) / 2), percent(high)],
    )


def ratio_scale(values: Sequence[float], least_reach: float = 1.25, most_reach: float = 16.0) -> Scale:
    """Eleven steps around 1, logarithmic and symmetric, the middle neutral. Larger ratios get the end colours."""
    most = max([v for v in values if v > 0] + [1 / v for v in values if v > 0] + [least_reach])
    reach = math.log(min(most_reach, most) * (1 + 1e-9))

    def step(value: float) -> str:
        position = -1.0 if value <= 0 else max(-1.0, min(1.0, math.log(value) / reach))
        return f"d{min(DIVERGING_STEPS - 1, int((position + 1) / 2 * DIVERGING_STEPS))}"

    end = math.exp(reach)
    beyond = any(v <= 0 or v < 1 / end for v in values), any(v > end for v in values)
    return Scale(
        step,
        times,
        _short_ratio,
        [f"d{k}" for k in range(DIVERGING_STEPS)],
        [f"{'≤' if beyond[0] else ''}{1 / end:.3g}×", "1×", f"{'≥' if beyond[1] else ''}{end:.3g}×"],
    )


def _short_ratio(value: float) -> str:
    return "<0.01" if 0 < value < 0.005 else f"{value:.2f}" if value < 9.95 else f"{value:.0f}"


ROW, HEAD, GAP = 26, 24, 2


def heat_map(
    cells: dict[tuple[str, int], float | None], modules: Sequence[str], layers: Sequence[int], scale: Scale, what: str
) -> tuple[Markup, Markup]:
    """Row names and cells, as two drawings of one height: the first stays visible while the second scrolls."""
    width = max(16, min(72, 880 // max(1, len(layers))))
    every = next(k for k in (1, 2, 5, 10, 20, 50, 100) if k * width >= 26)
    height = HEAD + ROW * len(modules)
    longest = max(map(len, modules), default=0)
    names = [_text("row end", 8 * longest + 8, HEAD + ROW * i + 17, module) for i, module in enumerate(modules)]
    parts: list[Markup] = [
        _text("tick middle", (i + 0.5) * width, 15, MISSING if layer < 0 else str(layer))
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
                    _n((i + 0.5) * width - 1), HEAD + ROW * j + 16, scale.short(value)
                )
            parts.append(
                Markup('<g class="{}"><title>{}</title>{}</g>').format(
                    scale.classes(value) if value is not None else "none",
                    f"{location}, {module}: {scale.text(value)}",
                    inner,
                )
            )
    return (
        _svg(8 * longest + 14, height, "modules", names),
        _svg(width * len(layers), height, f"{what} by layer (columns) and module (rows)", parts),
    )


def legend(scale: Scale) -> Markup:
    """A strip of the scale's colours with its ends and middle."""
    width, step = 220, 220 / len(scale.steps)
    parts = [
        Markup('<g class="{}"><rect x="{}" y="0" width="{}" height="12"/></g>').format(
            kind, _n(k * step), _n(step + 0.3)
        )
        for k, kind in enumerate(scale.steps)
    ]
    positions = (
        [("start", 0.0), ("middle", width / 2), ("end", float(width))]
        if len(scale.stops) == 3
        else [("middle", width / 2)]
    )
    parts += [_text(f"tick {anchor}", x, 28, stop) for (anchor, x), stop in zip(positions, scale.stops, strict=True)]
    return _svg(width, 34, "colours from " + " to ".join(scale.stops), parts)


def gauge(value: float, tolerance: float, what: str) -> Markup:
    """A ratio on a logarithmic axis around 1; the shaded band is 1 within the tolerance."""
    width, middle, reach = 300, 22, math.log(4)

    def x(ratio: float) -> float:
        return 12 + (max(-1.0, min(1.0, math.log(max(ratio, 1e-9)) / reach)) + 1) / 2 * (width - 24)

    left, right = x(1 / (1 + tolerance)), x(1 + tolerance)
    parts = [
        _line("rail", x(0.25), middle, x(4), middle),
        Markup('<rect class="fit" x="{}" y="{}" width="{}" height="18" rx="3"/>').format(
            _n(left), middle - 9, _n(right - left)
        ),
    ]
    for ratio, text in ((0.25, "¼×"), (0.5, "½×"), (1, "1×"), (2, "2×"), (4, "4×")):
        parts += [
            _line("tickmark", x(ratio), middle - 4, x(ratio), middle + 4),
            _text("tick middle", x(ratio), middle + 26, text),
        ]
    parts.append(Markup('<circle class="visible-dot" cx="{}" cy="{}" r="7"/>').format(_n(x(value)), middle))
    return _svg(width, 54, f"{what}: {times(value)} of what is expected from bf16 rounding alone", parts)
