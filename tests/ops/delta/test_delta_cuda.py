"""`delta` in CUDA C++ on fibers: the tally and the change bits of the reference, bit for bit, in every order of threads."""

from __future__ import annotations

import itertools

import pytest
import torch

from opdkernels.backends import gpu
from opdkernels.ops import delta as ops
from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, DTYPES, THRESHOLDS, Tally
from opdkernels.ops.delta import cuda as delta
from tests.backends.cuda.host import ORDERS, compiled, needs_compiler, run_on, source_of
from tests.ops.conformance import make_pair

pytestmark = needs_compiler
ARRAYS = ("tables", "counts", "sums", "maximum")
SIZES = (0, 1, 31, 1023, 1025)
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def fibers(monkeypatch):
    """Blocks of two warps: a fiber costs more than a coordinate."""
    run_on(monkeypatch, compiled("delta"))
    shape = delta.launch_shape
    monkeypatch.setattr(delta, "launch_shape", lambda *dtypes: (shape(*dtypes)[0], 64, shape(*dtypes)[2]))


def tally_of(
    base, trained, *, threshold_bits=DEFAULT_THRESHOLD_BITS, thresholds=THRESHOLDS, mask=None, out=None, by=delta.delta_
) -> Tally:
    tally = out or Tally.empty(threshold_bits)
    by(base, trained, threshold_bits, thresholds, *(torch.from_numpy(getattr(tally, a)) for a in ARRAYS), mask)
    return tally


def assert_equal(base, trained, **options):
    masks = [torch.full(((base.numel() + 7) // 8,), 255, dtype=torch.uint8) for _ in range(2)]
    found = tally_of(base, trained, mask=masks[0], **options)
    assert found == tally_of(base, trained, mask=masks[1], by=ops.reference, **options)
    assert torch.equal(*masks)


@pytest.mark.parametrize(("base_dtype", "trained_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_pair_of_dtypes(base_dtype, trained_dtype):
    for n in SIZES if base_dtype == trained_dtype else SIZES[-1:]:
        assert_equal(*make_pair(n, base_dtype, trained_dtype, seed=n))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_no_order_of_threads_shows(monkeypatch, dtype, order):
    run_on(monkeypatch, compiled("delta"), order=order, processors=1 + order)
    assert_equal(*make_pair(5001, dtype))


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_blocks_as_large_as_on_a_device(monkeypatch, dtype):
    monkeypatch.undo()
    run_on(monkeypatch, compiled("delta"), order=2)
    assert_equal(*make_pair(70_001, dtype))


def test_a_million_coordinates():
    assert_equal(*make_pair(1_000_003))


@pytest.mark.parametrize("kib", [48, 99, 163, 227])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_parts_of_little_shared_memory_count_the_same(monkeypatch, dtype, kib):
    run_on(monkeypatch, compiled("delta"), shared_bytes=kib << 10)
    base, trained = make_pair(3000, dtype)
    base[::3] *= 1000  # magnitudes beyond the tables in shared memory
    assert_equal(base, trained)


def test_all_bf16_patterns_against_a_shuffle():
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(BF16)
    assert_equal(every, every[torch.randperm(65536, generator=torch.Generator().manual_seed(0))])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_slices_change_no_bit(dtype, monkeypatch):
    monkeypatch.setattr(gpu, "SLICE", 2048)
    assert_equal(*make_pair(4501, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_views_and_what_lies_beside_them(dtype):
    base, trained = make_pair(5000, dtype)
    bits = torch.full((300,), 42, dtype=torch.uint8)
    w, v, window = base[3:2103], trained[1:2101], bits[5 : 5 + 263]
    expected = torch.empty_like(window)
    assert tally_of(w, v, mask=window) == tally_of(w, v, mask=expected, by=ops.reference)
    assert torch.equal(window, expected)
    assert (bits[:5] == 42).all()
    assert (bits[5 + 263 :] == 42).all()


def test_it_adds_to_what_is_there():
    base, trained = make_pair(3000)
    out = tally_of(base[:1000], trained[:1000])
    assert tally_of(base[1000:], trained[1000:], out=out) == tally_of(base, trained, by=ops.reference)


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
def test_sums_of_extreme_doubles_are_exact(size):
    base, trained = (size * torch.randn(1500, dtype=FP64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    assert_equal(base, trained)


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
def test_one_outlier_among_small_values_costs_no_bit(dtype):
    """Windows hold 128 bits; what lies below them, here beside 1e30, is added on its own."""
    base, trained = (
        1e-20 * torch.randn(60_000, dtype=dtype, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    )
    base[[5, 30_000]] = 1e30
    trained[700] = -3e38
    assert_equal(base, trained)


def bf16_only() -> str:
    """The base without the kernels of other dtypes, which a spoilt one need not compile."""
    others = ("OPD_DELTA_COUNT(delta_count_float", "OPD_DELTA_COUNT(delta_count_double")
    return "\n".join(line for line in source_of("delta").splitlines() if not line.startswith(others))


BARRIER, MEETING = "__syncthreads();", "__syncwarp();"
SHUFFLE = """const int before = __shfl_up_sync(OPD_ALL_LANES, place, d);
      place += lane >= d ? before : 0;"""


@pytest.mark.parametrize(
    ("text", "which", "of"),
    [(BARRIER, 0, 3), (BARRIER, 1, 3), (BARRIER, 2, 3), (MEETING, 0, 2)],
    ids=["0", "1", "2", "warp"],
)
def test_a_missing_barrier_is_caught(monkeypatch, text, which, of):
    """Without it some order of threads gives another tally. (The second meeting of a warp only orders memory.)"""
    parts = bf16_only().split(text)
    assert len(parts) == of + 1
    kernels = compiled("delta", text.join(parts[: which + 1]) + text.join(parts[which + 1 :]))
    pair = make_pair(3000)
    expected = tally_of(*pair, by=ops.reference)
    found = []
    for order in ORDERS:
        run_on(monkeypatch, kernels, order=order)
        found.append(tally_of(*pair))
    assert any(tally != expected for tally in found)


@pytest.mark.parametrize(
    ("text", "spoilt", "said"),
    [
        (
            SHUFFLE,
            "if (lane >= d) place += __shfl_up_sync(OPD_ALL_LANES, place, d);",
            "lanes of a warp meet at different places|a lane of the mask",
        ),
        (SHUFFLE, "place += __shfl_up_sync(OPD_ALL_LANES << d, place, d);", "not in the mask"),
        (BARRIER, "if (threadIdx.x >= 32) __syncthreads();", "barrier"),
    ],
    ids=["shuffle", "mask", "barrier"],
)
def test_divergent_threads_are_refused(monkeypatch, text, spoilt, said):
    assert text in bf16_only()
    run_on(monkeypatch, compiled("delta", bf16_only().replace(text, spoilt, 1)), order=2)
    with pytest.raises(
        RuntimeError, match=rf"delta_count_bf16 did not start on cpu: block \d+, thread \d+, line \d+: .*({said})"
    ):
        tally_of(*make_pair(3000))
