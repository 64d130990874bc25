"""Printed numbers: any number that a file can hold is printed, or as missing."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from opdkernels import formatting
from opdkernels.report import typography

EXTREMES = (0.0, -0.0, 5e-324, -5e-324, 1e-300, 1e22, 1.7e306, 1e307, -1e307, 1.7e308, -1.7e308)
FORMATTERS = {
    "percent": formatting.percent,
    "percent, no decimals": lambda value: formatting.percent(value, 0),
    "times": formatting.times,
    "measure": formatting.measure,
    "significant": lambda value: formatting.significant(value, 3),
    "byte_size": formatting.byte_size,
    "duration": formatting.duration,
    "range": lambda value: typography.format_range(value, 0.5),
    "sort_value": typography.sort_value,
}


@pytest.mark.parametrize("name", FORMATTERS)
@given(value=st.floats(allow_nan=False, allow_infinity=False))
@example(value=EXTREMES)
def test_every_finite_number_is_printed(name, value):
    for number in value if isinstance(value, tuple) else (value,):
        assert isinstance(FORMATTERS[name](number), str)


@given(value=st.integers(-(10**40), 10**40))
def test_every_integer_is_printed(value):
    for text in (formatting.count, formatting.byte_size, typography.timestamp, typography.sort_value):
        assert isinstance(text(value), str)


def test_a_percentage_that_overflows_is_missing():
    assert formatting.percent(1.7e306) == "1.7e308 %"
    assert formatting.percent(1e307) == formatting.percent(float("inf")) == formatting.MISSING
