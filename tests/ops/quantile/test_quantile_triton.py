"""`quantile` in Triton's interpreter: bit-identical to the reference."""

from __future__ import annotations

import pytest
import torch

from opdkernels.backends import gpu
from opdkernels.backends.triton import tables
from opdkernels.ops.quantile import triton
from tests.ops.conformance import MILLION, MISALIGNED, SIZES, backend_kernel, check_case
from tests.ops.quantile.cases import FAMILY

KERNEL = backend_kernel("triton")


@pytest.mark.parametrize("case", FAMILY.collect(SIZES[:-1], special=True), ids=str)
def test_matches_reference(case):
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect(SIZES[-1:]), ids=str)
def test_many_tiles(monkeypatch, case):
    """Larger tiles than on a device: the interpreter's time grows with programs and tiles, not with elements."""
    monkeypatch.setattr(triton, "TILE_BYTES", 1 << 15)
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([3001]), ids=str)
def test_misaligned(case):
    check_case(case, KERNEL, offsets=MISALIGNED)


@pytest.mark.parametrize("case", FAMILY.collect(special=True, only="many zeros"), ids=str)
def test_slices_and_table_copies_change_no_count(monkeypatch, case):
    monkeypatch.setattr(triton, "TILE_BYTES", 1024)
    monkeypatch.setattr(tables, "COORDINATES_PER_COPY", 512)
    monkeypatch.setattr(gpu, "SLICE", 2048)
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([MILLION], only="float32"), ids=str)
def test_a_million_values(monkeypatch, case):
    monkeypatch.setattr(triton, "TILE_BYTES", 1 << 19)
    check_case(case, KERNEL)


@pytest.mark.parametrize("scale", [1e-20, 0.02, 1e3])
def test_most_of_a_normal_distribution_is_counted_in_registers(monkeypatch, scale):
    values = (scale * torch.randn(1 << 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).bfloat16()
    no_prefix = torch.zeros(1, dtype=torch.int64)
    monkeypatch.setattr(triton, "flush_window", lambda *arguments: None)
    in_memory = triton.digit_table(values, None, no_prefix, 0)
    assert 0 < int(in_memory.sum()) < 0.15 * len(values)
