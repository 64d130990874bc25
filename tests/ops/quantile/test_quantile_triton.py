"""`quantile` in Triton's interpreter: bit-identical to the reference."""

from __future__ import annotations

import pytest

from opdkernels.backends import gpu
from opdkernels.ops.quantile import triton
from tests.ops.conformance import MILLION, MISALIGNED, SIZES, backend_kernel, check_case
from tests.ops.quantile.cases import FAMILY

KERNEL = backend_kernel("triton")


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """The interpreter's time grows with programs and tiles, not with elements."""
    monkeypatch.setattr(triton, "TILE", 16384)


@pytest.mark.parametrize("case", FAMILY.collect(SIZES, special=True), ids=str)
def test_matches_reference(case):
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([3001]), ids=str)
def test_misaligned(case):
    check_case(case, KERNEL, offsets=MISALIGNED)


@pytest.mark.parametrize("case", FAMILY.collect(special=True, only="many zeros"), ids=str)
def test_slices_and_table_copies_change_no_count(monkeypatch, case):
    monkeypatch.setattr(triton, "TILE", 512)
    monkeypatch.setattr(triton, "VALUES_PER_COPY", 512)
    monkeypatch.setattr(gpu, "SLICE", 2048)
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([MILLION], only="float32"), ids=str)
def test_a_million_values(monkeypatch, case):
    monkeypatch.setattr(triton, "TILE", 1 << 17)
    check_case(case, KERNEL)
