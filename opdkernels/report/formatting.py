"""Numbers for people: how shares, ratios, counts, sizes and times are written in a report."""

from __future__ import annotations

import datetime
import math

from markupsafe import Markup, escape

from opdkernels.errors import printable
from opdkernels.progress import amount

MISSING = "–"
THIN = "\N{NARROW NO-BREAK SPACE}"
LONGEST_NAME = 120


def percent(value: float | None) -> str:
    """A share in percent, with digits enough that only 0 reads as 0 and only 1 as 100.

    >>> percent(0.71659), percent(0.99994), percent(4.5e-4), percent(1.0)
    ('71.66\\u202f%', '99.994\\u202f%', '0.0450\\u202f%', '100\\u202f%')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    p = 100 * value
    rest = 100 - p
    if p in (0, 100):
        text = f"{p:.0f}"
    elif 0 < rest < 1:
        decimals = 1 + math.ceil(-math.log10(rest))
        text = f"{p:.{max(2, decimals)}f}" if decimals <= 7 else ">" + THIN + "99.999999"
    elif p >= 100:
        text = _grouped(f"{p:.4g}" if p < 1000 else f"{p:.0f}") if p < 1e7 else _scientific(p)
    elif p >= 1:
        text = f"{p:.2f}"
    else:
        text = significant(p, 3)
    return text + THIN + "%"


def times(value: float | None) -> str:
    """A ratio: 0.981×."""
    return MISSING if value is None or not math.isfinite(value) else significant(value, 3) + "×"


def measure(value: float | None) -> str:
    """A value in the units of the weights, three significant digits."""
    if value is None or not math.isfinite(value):
        return MISSING
    return _scientific(value) if 0 < abs(value) < 1e-3 else significant(value, 3)


def significant(value: float, digits: int) -> str:
    """Fixed notation from 1e-4 to 1e6, scientific beyond.

    >>> significant(0.00123456, 3), significant(3.1e-8, 3), significant(12345.6, 3)
    ('0.00123', '3.1e-8', '12\\u202f346')
    """
    if value == 0:
        return "0"
    size = abs(value)
    if not 1e-4 <= size < 1e6:
        return _scientific(value, digits)
    places = digits - 1 - int(f"{size:.{digits - 1}e}".split("e")[1])
    return _grouped(f"{value:.{max(0, places)}f}")


def _scientific(value: float, digits: int = 3) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _grouped(text: str) -> str:
    whole, point, rest = text.partition(".")
    return f"{int(whole):,}".replace(",", THIN) + point + rest if abs(int(whole)) >= 10_000 else text


def count(value: int | None) -> str:
    """A whole number with thin separators."""
    return MISSING if value is None else f"{value:,}".replace(",", THIN)


def size(value: float) -> str:
    return amount(value).replace(" ", THIN)


def duration(seconds: float | None) -> str:
    """0.42 s, 2 min 05 s, 1 h 03 min."""
    if seconds is None:
        return MISSING
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.2f}{THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{THIN}min {rest:02d}{THIN}s"
    return f"{minutes // 60}{THIN}h {minutes % 60:02d}{THIN}min"


def moment(nanoseconds: int) -> str:
    """A file's time stamp in UTC; files may carry any number."""
    try:
        stamp = datetime.datetime.fromtimestamp(nanoseconds // 10**9, datetime.timezone.utc)
    except (ValueError, OverflowError, OSError):
        return MISSING
    return f"{stamp:%Y-%m-%d %H:%M:%S} UTC"


def name(text: str) -> str:
    """A name from a file: nothing in it acts or hides, and it is no longer than a line or two."""
    shown = printable(text)
    if len(shown) <= LONGEST_NAME:
        return shown
    half = LONGEST_NAME // 2 - 1
    return f"{shown[:half]} … {shown[-half:]}"


def breakable(text: str) -> Markup:
    """Escaped text that may break after the dots of a name."""
    return Markup(str(escape(text)).replace(".", ".<wbr>"))


def exact(value: float | int | None) -> str:
    """The value behind a cell, for sorting."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def plural(number: int, noun: str, nouns: str = "") -> str:
    return f"{count(number)} {noun if number == 1 else nouns or noun + 's'}"
