"""`overlap` in Triton's interpreter: bit-identical to the reference."""

from __future__ import annotations

import pytest

from opdkernels.backends import gpu
from opdkernels.backends.triton import tables
from opdkernels.ops.overlap import triton
from tests.ops.conformance import MILLION, MISALIGNED, backend_kernel, check_case
from tests.ops.overlap.cases import FAMILY, many_runs

KERNEL = backend_kernel("triton")


@pytest.mark.parametrize("case", FAMILY.collect([2049], special=True), ids=str)
def test_matches_reference(case):
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", [*FAMILY.collect([70_001]), *many_runs(70_001)], ids=str)
def test_many_tiles(monkeypatch, case):
    """Larger tiles than on a device: the interpreter's time grows with programs and tiles, not with elements."""
    monkeypatch.setattr(triton, "TILE", 16384)
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([2501]), ids=str)
def test_misaligned(case):
    check_case(case, KERNEL, offsets=MISALIGNED)


@pytest.mark.parametrize("case", FAMILY.collect([5001]), ids=str)
def test_slices_and_table_copies_change_no_count(monkeypatch, case):
    monkeypatch.setattr(triton, "TILE", 512)
    monkeypatch.setattr(tables, "COORDINATES_PER_COPY", 512)
    monkeypatch.setattr(gpu, "SLICE", 2048)
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([MILLION], only="bfloat16, torch.bfloat16"), ids=str)
def test_a_million_coordinates(monkeypatch, case):
    monkeypatch.setattr(triton, "TILE", 1 << 17)
    check_case(case, KERNEL)
