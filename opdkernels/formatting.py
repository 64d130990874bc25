"""How numbers are printed: the same digits on the terminal, in Markdown tables and on report pages.

The text is ASCII, so that any terminal shows it; `opdkernels.report.typography` typesets it for pages.
"""

from __future__ import annotations

import math

MISSING = "-"


def percent(fraction: float | None, decimals: int | None = None) -> str:
    """A fraction in percent, with enough digits that only 0 reads as 0 and only 1 reads as 100.

    Args:
        fraction: Value to print; None, NaN and infinities are printed as MISSING.
        decimals: Fixed number of decimals, for columns of noisy values; None chooses them by the value.

    >>> percent(0.71659), percent(0.99994), percent(4.5e-4), percent(1.0)
    ('71.66 %', '99.9940 %', '0.0450 %', '100 %')
    >>> percent(0.1234, 0), percent(-0.004, 0), percent(1, 1)
    ('12 %', '0 %', '100.0 %')
    """
    value = math.nan if fraction is None else 100 * fraction
    if not math.isfinite(value):  # it may also overflow
        return MISSING
    if decimals is not None:
        return f"{round(value, decimals) + 0.0:.{decimals}f} %"  # + 0.0 turns -0.0 into 0.0
    below_100 = 100 - value
    if value in (0, 100):
        text = f"{value:.0f}"
    elif 0 < below_100 < 1:
        digits = 1 + math.ceil(-math.log10(below_100))
        text = f"{value:.{max(2, digits)}f}" if digits <= 7 else "> 99.999999"
    elif value >= 100:
        text = _group(f"{value:.4g}" if value < 1000 else f"{value:.0f}") if value < 1e7 else _scientific(value)
    elif value >= 1:
        text = f"{value:.2f}"
    else:
        text = significant(value, 3)
    return text + " %"


def times(ratio: float | None) -> str:
    """A ratio: 0.981x."""
    return MISSING if ratio is None or not math.isfinite(ratio) else significant(ratio, 3) + "x"


def measure(value: float | None) -> str:
    """A value with a unit or without one, three significant digits; scientific below 0.001."""
    if value is None or not math.isfinite(value):
        return MISSING
    return _scientific(value) if 0 < abs(value) < 1e-3 else significant(value, 3)


def significant(value: float, digits: int) -> str:
    """`digits` significant digits: fixed notation from 1e-4 to 1e6, scientific beyond.

    >>> significant(0.00123456, 3), significant(3.1e-8, 3), significant(12345.6, 3)
    ('0.00123', '3.1e-8', '12,346')
    """
    if value == 0:
        return "0"
    magnitude = abs(value)
    if not 1e-4 <= magnitude < 1e6:
        return _scientific(value, digits)
    decimals = digits - 1 - int(f"{magnitude:.{digits - 1}e}".split("e")[1])
    return _group(f"{value:.{max(0, decimals)}f}")


def _scientific(value: float, digits: int = 3) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _group(text: str) -> str:
    """Thousands separators from 10,000 on."""
    integer, point, decimals = text.partition(".")
    return f"{int(integer):,}" + point + decimals if abs(int(integer)) >= 10_000 else text


def count(value: int | None) -> str:
    """An integer with thousands separators: 1,234,567."""
    return MISSING if value is None else f"{value:,}"


def byte_size(num_bytes: float) -> str:
    """Bytes in decimal units, three significant digits.

    >>> byte_size(988_000_000)
    '988 MB'
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(num_bytes) < 999.5 or unit == "TB":
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float | None) -> str:
    """0.42 s, 2 min 05 s, 1 h 03 min."""
    if seconds is None:
        return MISSING
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
