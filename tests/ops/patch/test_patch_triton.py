"""`patch` in Triton's interpreter: bit-identical to the reference, and rejects the same changes."""

from __future__ import annotations

import pytest

from opdkernels.backends.triton import launch
from opdkernels.ops.patch import triton
from tests.ops.conformance import MILLION, MISALIGNED, SIZES, backend_kernel, check_case
from tests.ops.patch.cases import FAMILY, assert_rejection_writes_nothing, malformed_cases

KERNEL = backend_kernel("triton")
# The interpreter takes one step per unit of a digest, so the widest dtypes are tested at one density.
AT_70_001 = [
    case for case in FAMILY.collect([70_001]) if "uint8" in case.name or "0.01" in case.name or "int16" in case.name
]


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """The interpreter's time grows with programs and tiles, not with elements."""
    for name, size in (("TILE_BYTES", 1 << 16), ("CHUNK", 4096), ("ROWS", 16), ("STEPS", 1)):
        monkeypatch.setattr(triton, name, size)


@pytest.mark.parametrize("case", [*FAMILY.collect(SIZES[:-1], special=True), *AT_70_001], ids=str)
def test_matches_reference(case):
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", malformed_cases(), ids=str)
def test_rejected_changes_write_nothing(case):
    assert_rejection_writes_nothing(KERNEL, case)


@pytest.mark.parametrize("case", FAMILY.collect([5003]), ids=str)
def test_misaligned(case):
    check_case(case, KERNEL, offsets=MISALIGNED)


@pytest.mark.parametrize("case", FAMILY.collect(special=True, only="unchanged tile"), ids=str)
def test_many_tiles_per_block_and_many_programs(monkeypatch, case):
    """As on a GPU: each program handles several tiles, and values and positions begin where earlier tiles end."""
    for name, size in (("TILE_BYTES", 1 << 14), ("CHUNK", 1024), ("ROWS", 2), ("STEPS", 8)):
        monkeypatch.setattr(triton, name, size)
    monkeypatch.setattr(launch, "PROGRAMS_PER_SM", 3)
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect(special=True, only="40 offsets"), ids=str)
def test_offsets_are_compared_across_chunks(monkeypatch, case):
    monkeypatch.setattr(triton, "CHUNK", 16)
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([MILLION], only="int16 1000003 changed 0.17"), ids=str)
def test_a_million_coordinates(case):
    check_case(case, KERNEL)
