"""`quantile` in Triton's interpreter: the cuts and counts of the reference, exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opdkernels.backends import gpu
from opdkernels.ops import quantile as ops
from opdkernels.ops.delta import DTYPES
from opdkernels.ops.quantile import triton as kernels
from tests.conftest import make_pair
from tests.ops.quantile.test_quantile import hostile_arrays, make_mask, ranks

SIZES = (1, 31, 1023, 1025, 70_001)


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    """The interpreter takes its time a program and a tile, not an element."""
    monkeypatch.setattr(kernels, "TILE", 16384)


def assert_equal(values, k, mask=None):
    for largest in (True, False):
        cuts, counts = kernels.quantile(values, k, largest, mask)
        expected_cuts, expected = ops.reference(values, k, largest, mask)
        assert torch.equal(counts, expected)
        assert torch.equal(cuts.view(torch.int64), expected_cuts.view(torch.int64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_every_dtype_and_size(dtype, n):
    values = make_pair(n, dtype, seed=n)[0]
    assert_equal(values, ranks(n), make_mask(n))
    assert_equal(values, [n // 2 + 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_hostile_data(dtype):
    for _, values in hostile_arrays(3001):
        assert_equal(torch.from_numpy(values.copy()).to(dtype), [7, 600, 3001], make_mask(3001))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_nothing_and_of_no_numbers(dtype):
    assert_equal(torch.zeros(0, dtype=dtype), [])
    assert_equal(torch.zeros(0, dtype=dtype), [1])
    assert_equal(torch.full((40,), -math.nan, dtype=dtype), [2, 40])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_views(dtype):
    values, masks = make_pair(4000, dtype)[0], torch.cat([make_mask(3001), torch.full((8,), 255, dtype=torch.uint8)])
    assert_equal(values[3:3004], [1, 300], masks[5 : 5 + 376])


def test_copies_and_slices_change_no_count(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 512)
    monkeypatch.setattr(kernels, "VALUES_A_COPY", 512)
    monkeypatch.setattr(gpu, "SLICE", 2048)
    values = make_pair(5001, torch.float32)[0]
    values[::3] = 0
    assert_equal(values, [40, 2000, 4900], make_mask(5001))
    assert_equal(values, [40])


def test_every_pattern_of_sixteen_bits():
    every = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16))
    for dtype in (torch.bfloat16, torch.float16):
        assert_equal(every.view(dtype), [1, 300, 40_000, 63_000])


def test_a_million_values(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 1 << 17)
    assert_equal(make_pair(1_000_003, torch.float32)[0], [1000, 100_000], make_mask(1_000_003))
