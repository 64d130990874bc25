"""`quantile` in CUDA C++ on fibers: the cuts and counts of the reference, exactly, in every order of threads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opdkernels.backends import gpu
from opdkernels.ops import quantile as ops
from opdkernels.ops.delta import DTYPES
from opdkernels.ops.quantile import cuda as quantile
from tests.backends.cuda.host import ORDERS, compiled, needs_compiler, run_on, source_of
from tests.conftest import make_pair
from tests.ops.quantile.test_quantile import hostile_arrays, make_mask, ranks

pytestmark = needs_compiler
SIZES = (1, 31, 1023, 1025, 70_001)
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def fibers(monkeypatch):
    """Blocks of two warps: a fiber costs more than a value."""
    run_on(monkeypatch, compiled("quantile"))
    monkeypatch.setattr(quantile, "THREADS", 64)


def assert_equal(values, k, mask=None):
    for largest in (True, False):
        cuts, counts = quantile.quantile(values, k, largest, mask)
        expected_cuts, expected = ops.reference(values, k, largest, mask)
        assert torch.equal(counts, expected)
        assert torch.equal(cuts.view(torch.int64), expected_cuts.view(torch.int64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_every_dtype_and_size(dtype, n):
    values = make_pair(n, dtype, seed=n)[0]
    assert_equal(values, ranks(n), make_mask(n))
    assert_equal(values, [n // 2 + 1])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_no_order_of_threads_shows(monkeypatch, dtype, order):
    run_on(monkeypatch, compiled("quantile"), order=order, processors=1 + order)
    assert_equal(make_pair(5001, dtype)[0], [3, 2500], make_mask(5001))


def test_a_million_values_in_blocks_as_large_as_on_a_device(monkeypatch):
    monkeypatch.setattr(quantile, "THREADS", 1024)
    assert_equal(make_pair(1_000_003, FP32)[0], [1000, 100_000], make_mask(1_000_003))


@pytest.mark.parametrize("kib", [48, 99, 163])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_parts_of_little_shared_memory_count_the_same(monkeypatch, dtype, kib):
    run_on(monkeypatch, compiled("quantile"), shared_bytes=kib << 10)
    values = make_pair(3000, dtype)[0]
    values[::3] *= 1000  # magnitudes beyond the tables in shared memory
    assert_equal(values, [40, 1200, 2500], make_mask(3000))


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
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


def test_slices_change_no_count(monkeypatch):
    monkeypatch.setattr(gpu, "SLICE", 2048)
    values = make_pair(5001, FP32)[0]
    values[::3] = 0
    assert_equal(values, [40, 2000, 4900], make_mask(5001))
    assert_equal(values, [40])


def test_every_pattern_of_sixteen_bits():
    every = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16))
    for dtype in (BF16, torch.float16):
        assert_equal(every.view(dtype), [1, 300, 40_000, 63_000])


BARRIER = "__syncthreads();"


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_barrier_is_caught(monkeypatch, which):
    parts = source_of("quantile").split(BARRIER)
    assert len(parts) == 3
    kernels = compiled("quantile", BARRIER.join(parts[: which + 1]) + BARRIER.join(parts[which + 1 :]))
    values = make_pair(3000)[0]
    expected = ops.reference(values, [700], True, None)[1]
    found = []
    for order in ORDERS:
        run_on(monkeypatch, kernels, order=order)
        found.append(quantile.quantile(values, [700], True, None)[1])
    assert any(not torch.equal(counts, expected) for counts in found)


def test_a_divergent_shuffle_is_refused(monkeypatch):
    line = "const opd_u32 total = warp_sum(zeros[inside]);"
    assert line in source_of("quantile")
    spoilt = source_of("quantile").replace(
        line, "opd_u32 total = zeros[inside]; if (threadIdx.x & 1) total = warp_sum(total);"
    )
    run_on(monkeypatch, compiled("quantile", spoilt))
    with pytest.raises(
        RuntimeError, match=r"quantile_count_2 did not start on cpu: .*(different places|a lane of the mask)"
    ):
        quantile.quantile(make_pair(3000)[0], [700], True, None)
