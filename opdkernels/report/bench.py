"""The page of a benchmark, and its chart as a file."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from markupsafe import Markup

from opdkernels.benchmark import text
from opdkernels.benchmark.machine import line as machine_line
from opdkernels.benchmark.result import OURS
from opdkernels.report import charts, svg, typography
from opdkernels.report.figures import Figure, value_rows
from opdkernels.report.svg import Frame

Row = Mapping[str, Any]
STYLES = {"eager": "visible", "compile": "stored"}
DOUBLINGS = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

# The colours of style.css for a drawing that is a file of its own.
FILE_STYLE = """
svg { --paper: #fff; --line: #dedbd3; --muted: #59606b; --ink: #1c2026; --visible: #0a66ad; --stored: #c2620a }
@media (prefers-color-scheme: dark) {
  svg { --paper: #1a1e25; --line: #2e343e; --muted: #a3abb7; --ink: #e5e7eb; --visible: #6db5f5; --stored: #f0a050 }
}
text { font: 13px system-ui, sans-serif; fill: var(--muted) }
.end { text-anchor: end } .middle { text-anchor: middle }
.paper { fill: var(--paper) } .grid { stroke: var(--line) } .baseline { stroke: var(--muted) }
.visible-line, .stored-line { fill: none; stroke-width: 2.5 }
.visible-line { stroke: var(--visible) } .stored-line { stroke: var(--stored) }
.visible-dot { fill: var(--visible) } .stored-dot { fill: var(--stored) }
.probe rect { fill: transparent }
"""


class Mark(NamedTuple):
    """A value in a row of a chart: style class, value, text."""

    style: str
    value: float
    text: str


def page_context(result: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of bench.html; `result` is the content of benchmark.json."""
    machine = result["machine"]
    return {
        "title": "Benchmark",
        "sides": [("device", typography.name(machine["gpu"]["name"] if machine["gpu"] else machine["processor"]))],
        "headline": headline(result),
        "detail": typography.name(machine_line(machine)),
        "interpretation": [],
        "speeds": speed_figures(result),
        "fractions": fraction_figures(result),
        "head": [(heading, "text" if heading in text.LEFT_ALIGNED else "") for heading in text.columns(result)],
        "rows": [[typeset(cell) for cell in text.cells(row, result)] for row in result["rows"]],
        "notes": [typography.name(note) for note in text.notes(result)],
        "run": {"command": "bench"},
        "run_info": [
            ("machine", typography.name(machine_line(machine))),
            ("versions", ", ".join(f"{name} {machine[name]}" for name in ("opdkernels", "torch", "python"))),
            ("started", result["started"].replace("T", " ").replace("+00:00", " UTC")),
            ("duration", typography.duration(result["seconds"])),
            *((name, typography.name(str(value))) for name, value in result["options"].items() if value),
        ],
        "glossary": [],
    }


def typeset(cell: str) -> str:
    """A cell of the table, safe to print, with the sign of ratios that other pages use."""
    return re.sub(r"(?<=\d)x$", "×", typography.name(cell))


def headline(result: Mapping[str, Any]) -> str:
    """How many workloads are faster than plain PyTorch and by how much, or the median fraction of the limits."""
    speeds = [timing["speedup"] for row in result["rows"] for name, timing in row["timings"].items() if name == "eager"]
    speeds = [speed for speed in speeds if speed is not None]
    fractions = [row["timings"][OURS]["fraction_of_limit"] for row in result["rows"] if OURS in row["timings"]]
    if not fractions:
        return "No kernel could be measured"
    if not speeds:
        return f"The kernels reach {typography.percent(statistics.median(fractions), 0)} of their limits in the median"
    faster = sum(speed >= 1 for speed in speeds)
    return (
        f"Faster than plain PyTorch in {faster} of {typography.plural(len(speeds), 'workload')}, "
        f"{typography.times(statistics.median(speeds))} in the median"
    )


def speed_figures(result: Mapping[str, Any]) -> list[Figure]:
    """The speeds over each of what the kernels are compared with; empty without one."""
    drawings = [chart for frame in svg.FRAMES if (chart := speed_chart(result, frame))]
    against, rows = result["options"]["against"], result["rows"]
    speeds = {name: [row["timings"].get(name, {}).get("speedup") for row in rows] for name in against}
    values = value_rows(
        ("workload", None, [row["workload"] for row in rows]),
        *((f"over {text.OTHERS[name]}", typography.times, column) for name, column in speeds.items()),
    )
    note = "Left of the line this package is slower. Medians of rounds in which the implementations took turns."
    keys = [(f"{STYLES[name]}-line-key", f"over {text.OTHERS[name]}") for name in against]
    return [Figure("Speed over PyTorch.", note, keys, drawings, values)] if drawings else []


def fraction_figures(result: Mapping[str, Any]) -> list[Figure]:
    """The rates of the kernels as fractions of the limit; empty without one."""
    drawings = [chart for frame in svg.FRAMES if (chart := fraction_chart(result, frame))]
    measured = [row for row in result["rows"] if OURS in row["timings"]]
    fractions = [row["timings"][OURS]["fraction_of_limit"] for row in measured]
    values = value_rows(
        ("workload", None, [row["workload"] for row in measured]), ("fraction", typography.percent, fractions)
    )
    note = f"Bytes or operations that a call needs at least, over its time; {text.limits_text(result)}."
    return [Figure("Rate over what this machine reaches.", note, [], drawings, values)] if drawings else []


def speed_chart(result: Mapping[str, Any], frame: Frame) -> Markup | None:
    """Speeds over each of what the kernels are compared with, on a logarithmic axis; None without one."""
    rows = []
    for row in result["rows"]:
        speeds = {name: timing["speedup"] for name, timing in row["timings"].items() if timing["speedup"] is not None}
        marks = [Mark(STYLES[name], speed, typography.times(speed)) for name, speed in speeds.items()]
        rows += [(row["workload"], marks)] if marks else []
    if not rows:
        return None
    values = [mark.value for _, marks in rows for mark in marks]
    first = max([tick for tick in DOUBLINGS if tick <= min(0.5, *values)], default=DOUBLINGS[0])
    last = min([tick for tick in DOUBLINGS if tick >= max(2.0, *values)], default=DOUBLINGS[-1])
    ticks = [tick for tick in DOUBLINGS if first <= tick <= last]

    def position(value: float) -> float:
        return (math.log2(min(max(value, first), last)) - math.log2(first)) / (math.log2(last) - math.log2(first))

    return lollipop_chart(
        rows,
        [(position(tick), f"{tick:g}×") for tick in ticks],
        position,
        1.0,
        "speed over PyTorch",
        "Speed over PyTorch:",
        frame,
    )


def fraction_chart(result: Mapping[str, Any], frame: Frame) -> Markup | None:
    """The rate of each kernel as a fraction of its limit; None without one."""
    rows = []
    for row in result["rows"]:
        if OURS in row["timings"]:
            fraction = row["timings"][OURS]["fraction_of_limit"]
            of = "" if frame.kind == "slim" else f" of {row['limit']}"
            rows.append((row["workload"], [Mark("visible", fraction, f"{typography.percent(fraction, 0)}{of}")]))
    if not rows:
        return None
    ticks = charts.axis_ticks(0, max(1.0, *(marks[0].value for _, marks in rows)))

    def position(value: float) -> float:
        return value / ticks[-1]

    return lollipop_chart(
        rows,
        [(position(tick), f"{100 * tick:g} %") for tick in ticks],
        position,
        0.0,
        "fraction of the measured limit",
        "Fraction of the measured limit:",
        frame,
    )


def lollipop_chart(
    rows: Sequence[tuple[str, Sequence[Mark]]],
    ticks: Sequence[tuple[float, str]],
    position: Callable[[float], float],
    origin: float,
    axis: str,
    what: str,
    frame: Frame,
) -> Markup:
    """Values as dots at the end of lines that begin at a common origin, one row per name.

    Args:
        rows: Names and their values.
        ticks: Positions on the axis, 0 to 1, and their labels.
        position: Where a value is on the axis, 0 to 1.
        origin: The value where lines begin.
        axis: Label of the axis.
        what: Text alternative, to which names and values are added.
        frame: Size and margins; the height follows from the number of rows.
    """
    is_slim = frame.kind == "slim"  # names and values are above the lines, not next to them
    row_height = 50 if is_slim else 36
    longest_name = max(len(name) for name, _ in rows)
    longest_text = max(len(mark.text) for _, marks in rows for mark in marks)
    frame = replace(
        frame,
        left=26 if is_slim else 24 + 7 * longest_name,
        right=26 if is_slim else 20 + 7 * longest_text,
        height=frame.top + frame.bottom + row_height * len(rows),
    )

    def x(value: float) -> float:
        return frame.left + position(value) * frame.inner[0]

    parts: list[Markup] = []
    for at, label in ticks[:: frame.stride]:
        tick = frame.left + at * frame.inner[0]
        parts += [svg.line("grid", tick, frame.top, tick, frame.floor)]
        parts += [svg.text_at("tick middle", tick, frame.floor + 22, label)]
    parts.append(svg.line("baseline", x(origin), frame.top, x(origin), frame.floor))
    for i, (name, marks) in enumerate(rows):
        top = frame.top + row_height * i
        middle = top + row_height * (0.7 if is_slim else 0.5)
        texts = [mark.text for mark in marks]
        if is_slim:
            parts += [svg.text_at("tick", 4, top + 16, name)]
            parts += [svg.text_at("tick end", frame.width - 4, top + 16, ", ".join(texts))]
        else:
            parts += [svg.text_at("tick end", frame.left - 10, middle + 4, name)]
        for k, mark in enumerate(marks):
            y = middle + 14 * (k - (len(marks) - 1) / 2)
            parts.append(svg.path(f"{mark.style}-line", [(x(origin), y), (x(mark.value), y)]))
            parts.append(svg.dot(f"{mark.style}-dot", x(mark.value), y, 5))
            if not is_slim:
                parts.append(svg.text_at("tick", max(x(origin), x(mark.value)) + 10, y + 4, mark.text))
        parts.append(
            Markup('<g class="probe"><title>{}</title><rect x="{}" y="{}" width="{}" height="{}"/></g>').format(
                f"{name}: {', '.join(texts)}", frame.left, svg.number(top), frame.inner[0], row_height
            )
        )
    parts.append(svg.x_axis_label(frame, axis))
    label = f"{what} " + ", ".join(f"{name} {' and '.join(mark.text for mark in marks)}" for name, marks in rows)
    return svg.svg(frame.width, frame.height, label, parts, f"chart {frame.kind}")


def chart_file(result: Mapping[str, Any]) -> str:
    """The chart of speeds as an SVG file; of fractions of the limit if nothing was compared; "" without either."""
    frame = svg.FRAMES[0]
    speeds = speed_chart(result, frame)
    drawing = speeds or fraction_chart(result, frame)
    key = Markup('<tspan class="{}-dot">●</tspan> {} · ')
    keys = [key.format(STYLES[name], text.OTHERS[name]) for name in result["options"]["against"]] if speeds else []
    caption = Markup("{}{}").format(svg.join(keys), typography.name(machine_line(result["machine"])))
    return svg.as_file(drawing, FILE_STYLE, caption) if drawing else ""
