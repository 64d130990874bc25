"""`delta` in Triton's interpreter: tally and change bits are bit-identical to the reference."""

from __future__ import annotations

import pytest

from opdkernels.backends import gpu
from opdkernels.backends.triton import tables
from opdkernels.ops.delta import triton
from tests.ops.conformance import MILLION, MISALIGNED, backend_kernel, check_case
from tests.ops.delta.cases import FAMILY

KERNEL = backend_kernel("triton")
BF16_PAIR, FP32_PAIR = "bfloat16, torch.bfloat16", "float32, torch.float32"


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter's time grows with programs and tiles, not with elements."""
    monkeypatch.setattr(triton, "EXPONENTS", 128)
    monkeypatch.setattr(triton, "launch_shape", lambda *dtypes: (1024, None))


@pytest.mark.parametrize("case", FAMILY.collect((0, 1, 31, 1023, 1025), special=True), ids=str)
def test_matches_reference(case):
    check_case(case, KERNEL)


@pytest.mark.parametrize("only", [BF16_PAIR, FP32_PAIR])
def test_many_tiles(only):
    for case in FAMILY.collect([70_001], only=only):
        check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([2100]), ids=str)
def test_misaligned(case):
    check_case(case, KERNEL, offsets=MISALIGNED)


@pytest.mark.parametrize("only", [BF16_PAIR, FP32_PAIR])
def test_slices_and_table_copies_change_no_bit(monkeypatch, only):
    monkeypatch.setattr(triton, "launch_shape", lambda *dtypes: (512, None))
    monkeypatch.setattr(tables, "COORDINATES_PER_COPY", 1024)
    monkeypatch.setattr(gpu, "SLICE", 2048)
    for case in FAMILY.collect([4501], only=only):
        check_case(case, KERNEL)


def test_a_million_coordinates(monkeypatch):
    monkeypatch.setattr(triton, "launch_shape", lambda *dtypes: (1 << 16, None))
    for case in FAMILY.collect([MILLION], only=BF16_PAIR):
        check_case(case, KERNEL)
