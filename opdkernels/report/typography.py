"""Numbers and names as pages show them: the digits of `opdkernels.formatting`, with thin spaces that do not break."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from functools import wraps
from typing import Any

from markupsafe import Markup, escape

from opdkernels import formatting
from opdkernels.errors import printable

MISSING = "–"
THIN = "\N{NARROW NO-BREAK SPACE}"
LONGEST_NAME = 120
_TYPESET = str.maketrans({" ": THIN, ",": THIN, "x": "×"})


def _typeset(text_of: Callable[..., str]) -> Callable[..., str]:
    """A number formatter whose ASCII text is typeset for a page."""

    @wraps(text_of)
    def typeset(value: Any, *arguments: Any) -> str:
        text = text_of(value, *arguments)
        return MISSING if text == formatting.MISSING else text.translate(_TYPESET)

    return typeset


percent = _typeset(formatting.percent)
times = _typeset(formatting.times)
measure = _typeset(formatting.measure)
significant = _typeset(formatting.significant)
count = _typeset(formatting.count)
byte_size = _typeset(formatting.byte_size)
duration = _typeset(formatting.duration)


def format_range(lower: float | None, upper: float | None) -> str:
    """Two fractions as a range in percent; a single number where both ends read the same."""
    low, high = percent(lower), percent(upper)
    return low if low == high else f"{low} to {high}"


def plural(number: int, noun: str, plural_noun: str = "") -> str:
    """A count with its noun: 1 tensor, 2 tensors."""
    return f"{count(number)} {noun if number == 1 else plural_noun or noun + 's'}"


def timestamp(nanoseconds: int) -> str:
    """A file's modification time in UTC; a file may carry a number that is no time."""
    try:
        time = datetime.datetime.fromtimestamp(nanoseconds // 10**9, datetime.timezone.utc)
    except (ValueError, OverflowError, OSError):
        return MISSING
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


def name(text: str) -> str:
    """A name from a file, without control characters, shortened in the middle to about 120 characters."""
    shown = printable(text)
    if len(shown) <= LONGEST_NAME:
        return shown
    half = LONGEST_NAME // 2 - 1
    return f"{shown[:half]} … {shown[-half:]}"


def location(path: str) -> str:
    """Where a checkpoint is, for a page that may be sent to others: the last two parts of an absolute path.

    >>> location("/home/someone/runs/masks/step-60"), location("org/name@main"), location("/base")
    ('…/masks/step-60', 'org/name@main', '/base')
    """
    parts = path.rstrip("/").split("/")
    return name(f"…/{'/'.join(parts[-2:])}" if path.startswith("/") and len(parts) > 3 else path)


def breakable(text: str) -> Markup:
    """Escaped text that may break after the dots of a name."""
    return Markup(str(escape(text)).replace(".", ".<wbr>"))


def sort_value(value: float | int | None) -> str:
    """The number behind a cell, by which the page sorts it; empty where there is none."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"
