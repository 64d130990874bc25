"""`delta` in Triton's interpreter: the tally and the change bits of the reference, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from opdkernels.backends import gpu
from opdkernels.ops import delta as ops
from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, DTYPES, THRESHOLDS, Tally
from opdkernels.ops.delta import triton as kernels
from tests.ops.conformance import make_pair

ARRAYS = ("tables", "counts", "sums", "maximum")
SIZES = (0, 1, 31, 1023, 1025)
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    """The interpreter takes its time a program and a tile, not an element."""
    monkeypatch.setattr(kernels, "EXPONENTS", 128)
    monkeypatch.setattr(kernels, "launch_shape", lambda *dtypes: (8192, None))


def tally_by(
    function, base, trained, *, threshold_bits=DEFAULT_THRESHOLD_BITS, thresholds=THRESHOLDS, mask=None, out=None
) -> Tally:
    tally = out or Tally.empty(threshold_bits)
    function(base, trained, threshold_bits, thresholds, *(torch.from_numpy(getattr(tally, a)) for a in ARRAYS), mask)
    return tally


def assert_equal(base, trained, **options):
    masks = [torch.full(((base.numel() + 7) // 8,), 255, dtype=torch.uint8) for _ in range(2)]
    found = tally_by(kernels.delta_, base, trained, mask=masks[0], **options)
    assert found == tally_by(ops.reference, base, trained, mask=masks[1], **options)
    assert torch.equal(*masks)


@pytest.mark.parametrize(("base_dtype", "trained_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_pair_of_dtypes(base_dtype, trained_dtype):
    for n in SIZES if base_dtype == trained_dtype else SIZES[-1:]:
        assert_equal(*make_pair(n, base_dtype, trained_dtype, seed=n))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_many_tiles(dtype):
    assert_equal(*make_pair(70_001, dtype))


def test_all_bf16_patterns_against_a_shuffle():
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(BF16)
    assert_equal(every, every[torch.randperm(65536, generator=torch.Generator().manual_seed(0))])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_copies_and_slices_change_no_bit(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "launch_shape", lambda *dtypes: (512, None))
    monkeypatch.setattr(kernels, "COORDINATES_A_COPY", 1024)
    monkeypatch.setattr(gpu, "SLICE", 2048)
    assert_equal(*make_pair(4501, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_views_and_what_lies_beside_them(dtype):
    base, trained = make_pair(5000, dtype)
    bits = torch.full((300,), 42, dtype=torch.uint8)
    w, v, window = base[3:2103], trained[1:2101], bits[5 : 5 + 263]
    expected = torch.empty_like(window)
    assert tally_by(kernels.delta_, w, v, mask=window) == tally_by(ops.reference, w, v, mask=expected)
    assert torch.equal(window, expected)
    assert (bits[:5] == 42).all()
    assert (bits[5 + 263 :] == 42).all()


def test_it_adds_to_what_is_there():
    base, trained = make_pair(3000)
    out = tally_by(kernels.delta_, base[:1000], trained[:1000])
    assert tally_by(kernels.delta_, base[1000:], trained[1000:], out=out) == tally_by(ops.reference, base, trained)


@pytest.mark.parametrize("threshold_bits", [(0,), (5,), (0, 1, 2, 0x7F7F)])
def test_cuts(threshold_bits):
    assert_equal(*make_pair(2000), threshold_bits=threshold_bits)


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_any_threshold(dtype):
    """Exact in fp32 or not, in no order, subnormal, beyond fp32, not a magnitude at all."""
    base, trained = make_pair(2000, dtype)
    for thresholds in ((2.0**-7, 1e-40, 1e300, 0.0, 5e-324), (-1.0, float("nan"), float("inf"))):
        assert_equal(base, trained, thresholds=thresholds)


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-290, 1e-150, 1e38])
def test_sums_of_extreme_doubles_are_exact_and_end(size):
    base, trained = (size * torch.randn(1500, dtype=FP64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    assert_equal(base, trained)


@pytest.mark.parametrize("n_zero", [0, 900])
def test_zeros_that_stay_are_counted_apart(n_zero):
    base, trained = make_pair(1800, hostile=False)
    base[:n_zero] = trained[:n_zero] = 0
    assert_equal(base, trained)


def test_a_million_coordinates(monkeypatch):
    monkeypatch.setattr(kernels, "launch_shape", lambda *dtypes: (1 << 16, None))
    assert_equal(*make_pair(1_000_003))
