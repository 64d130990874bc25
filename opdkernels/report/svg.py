"""Elements of inline SVG drawings. Colours are classes of the style sheet, so one drawing serves light, dark and
print."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Frame:
    """Size and margins of a drawing in pixels; text is 13 pixels high in both frames.

    Attributes:
        kind: Style class, "wide" for desktops or "slim" for phones.
        width: Width with margins.
        height: Height with margins.
        left: Margin for the labels of the vertical axis.
        right: Margin.
        stride: Every `stride`-th tick has a label.
        top: Margin.
        bottom: Margin for the labels of the horizontal axis.
    """

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
        """Width and height without margins."""
        return self.width - self.left - self.right, self.height - self.top - self.bottom

    @property
    def floor(self) -> int:
        """Vertical position of the horizontal axis."""
        return self.height - self.bottom


NOTHING = Markup("")


FRAMES = (Frame("wide", 860, 400, 58, 20, 1), Frame("slim", 330, 300, 48, 20, 2))  # desktop and phone
HALF_FRAMES = (Frame("wide", 500, 270, 58, 20, 1), FRAMES[1])  # two side by side on a desktop


def join(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def number(value: float) -> str:
    """A coordinate with one decimal at most."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def svg(width: float, height: float, label: str, content: Sequence[Markup], kind: str = "map") -> Markup:
    """A drawing of fixed size, or, with the class `chart`, one that fills the available width."""
    scaled = kind.startswith("chart")
    return Markup(
        '<svg viewBox="0 0 {w} {h}"{size} role="img" aria-label="{label}" class="{kind}">{content}</svg>'
    ).format(
        w=number(width),
        h=number(height),
        size=Markup("") if scaled else Markup(' width="{}" height="{}"').format(number(width), number(height)),
        label=label,
        kind=kind,
        content=join(content),
    )


def as_file(drawing: Markup, style: str, caption: Markup) -> str:
    """A drawing of `svg` as a file of its own, with its style and a caption below."""
    width, height = re.findall(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', drawing)[0]
    sized = drawing.replace("<svg ", Markup('<svg width="{}" height="{}" ').format(width, height), 1)
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}"><style>{style}</style>'
        '<rect class="paper" width="{w}" height="{h}"/>{drawing}<text x="16" y="{y}">{caption}</text></svg>\n'
    ).format(
        w=width,
        h=number(float(height) + 28),
        style=Markup(style),
        drawing=sized,
        y=number(float(height) + 12),
        caption=caption,
    )


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
        kind, number(x1), number(y1), number(x2), number(y2)
    )


def text_at(kind: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, number(x), number(y), text)


def path(kind: str, points: Sequence[tuple[float, float]], close: bool = False) -> Markup:
    d = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points) + ("Z" if close else "")
    return Markup('<path class="{}" d="{}"/>').format(kind, d)


def dot(kind: str, x: float, y: float, radius: int) -> Markup:
    return Markup('<circle class="{}" cx="{}" cy="{}" r="{}"/>').format(kind, number(x), number(y), radius)


def probe(tooltip: str, x: float, width: float, frame: Frame, content: Markup = NOTHING) -> Markup:
    """A column of the drawing that shows a tooltip, over its content."""
    return Markup('<g class="probe"><title>{}</title>{}<rect x="{}" y="{}" width="{}" height="{}"/></g>').format(
        tooltip, content, number(x), frame.top, number(width), frame.inner[1]
    )


def horizontal_grid(frame: Frame, y: float, label: str) -> list[Markup]:
    """A grid line at `y` and its label left of the axis."""
    return [
        line("grid", frame.left, y, frame.width - frame.right, y),
        text_at("tick end", frame.left - 8, y + 4, label),
    ]


def x_tick(frame: Frame, x: float, label: str) -> list[Markup]:
    """A tick below the drawing and its label."""
    return [
        line("tickmark", x, frame.floor, x, frame.floor + 5),
        text_at("tick middle", x, frame.floor + 22, label),
    ]


def x_axis_label(frame: Frame, text: str) -> Markup:
    return text_at("axis middle", (frame.left + frame.width - frame.right) / 2, frame.height - 8, text)
