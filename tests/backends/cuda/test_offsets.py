"""Offsets beyond 2^31 elements and 2^32 bytes: the last two blocks of a grid over that many elements.

The memory before them is reserved and never touched.
"""

from __future__ import annotations

import mmap

import pytest
import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda import launch
from opdkernels.ops import quantile as quantile_ops
from opdkernels.ops import step as step_ops
from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, THRESHOLDS
from opdkernels.ops.delta import cuda as delta
from opdkernels.ops.overlap import cuda as overlap
from opdkernels.ops.overlap.layout import COUNT_NUMEL
from opdkernels.ops.patch import cuda as patch
from opdkernels.ops.patch.layout import BLOCK, VALID, blocks_of
from opdkernels.ops.quantile import cuda as quantile
from opdkernels.ops.step import cuda as step
from opdkernels.ops.step.layout import BLOCK as STEP_BLOCK
from tests.backends.cuda.fibers import kernel_source, launch_on_fibers, load_kernels, needs_compiler
from tests.ops.conformance import Allocator, backend_kernel, make_pair, reference
from tests.ops.delta.cases import call_delta, empty_tally
from tests.ops.overlap.cases import call_overlap, make_runs
from tests.ops.patch.cases import make_bits
from tests.ops.patch.test_patch import by_reference as gathered_by_reference
from tests.ops.step.test_step import State, bits

pytestmark = needs_compiler
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
NORESERVE = 0x4000  # Linux's; mmap.MAP_NORESERVE from Python 3.13
N, THREADS = 2**31 + 1000, 64


@pytest.fixture(autouse=True)
def one_launch(monkeypatch):
    """One block per tile, and no slices."""
    for family in (quantile, step):
        monkeypatch.setattr(family, "THREADS", THREADS)
    monkeypatch.setattr(overlap, "BF16_THREADS", THREADS)
    monkeypatch.setattr(overlap, "MIXED_THREADS", THREADS)
    monkeypatch.setattr(delta, "PAIR_THREADS", THREADS)
    monkeypatch.setattr(delta, "WIDE_THREADS", THREADS)
    monkeypatch.setattr(gpu, "SLICE", 1 << 40)
    monkeypatch.setattr(launch, "workspaces", {})


def finish_all_but_two_blocks(family: str, words: int, blocks: int) -> None:
    """Sets the ticket, the last word of a workspace, as the blocks would that do not run."""
    launch.workspace(family, torch.device("cpu"), words)[-1] = blocks - 2


def reserved(n: int, dtype: torch.dtype, end: torch.Tensor) -> torch.Tensor:
    """A tensor [n] of which only the end uses memory."""
    memory = mmap.mmap(-1, n * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    tensor = torch.frombuffer(memory, dtype=dtype)
    tensor[n - len(end) :] = end
    return tensor


def last_two_tiles(each: int) -> int:
    tile = THREADS * each
    return N - (-(-N // tile) - 2) * tile


def use(monkeypatch, family: str, broken: str | None = None) -> None:
    launch_on_fibers(monkeypatch, load_kernels(family, broken), num_sms=1 << 40)


@pytest.mark.parametrize(
    ("dtype", "each", "shared_bytes"),
    [(BF16, 16, 227 << 10), (BF16, 8, 99 << 10), (FP32, 4, 227 << 10), (FP64, 2, 227 << 10)],
    ids=str,
)
def test_delta(monkeypatch, dtype, each, shared_bytes):
    launch_on_fibers(monkeypatch, load_kernels("delta"), num_sms=1 << 40, shared_bytes=shared_bytes)
    size = last_two_tiles(each)
    base, trained = make_pair(size, dtype)
    *expected, expected_bits = call_delta(reference, Allocator(), base, trained)
    outputs, bits = empty_tally(Allocator()), reserved((N + 7) // 8, torch.uint8, torch.zeros(1, dtype=torch.uint8))
    finish_all_but_two_blocks("delta", delta.WORKSPACE_WORDS, -(-N // (THREADS * each)))
    delta.delta_(
        reserved(N, dtype, base), reserved(N, dtype, trained), DEFAULT_THRESHOLD_BITS, THRESHOLDS, *outputs, bits
    )
    assert all(map(torch.equal, outputs, expected))
    assert torch.equal(bits[-len(expected_bits) :], expected_bits)


def quantiles_of_the_end(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The results of the kernel for the whole tensor, and of the reference for its end."""
    end = make_pair(last_two_tiles(16 // dtype.itemsize), dtype)[0]
    bits = torch.full(((len(end) + 7) // 8,), 0b01101001, dtype=torch.uint8)
    outputs = quantile.quantile(reserved(N, dtype, end), [3, 50], True, reserved((N + 7) // 8, torch.uint8, bits))
    return list(outputs), list(quantile_ops.reference(end, [3, 50], True, bits))


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_quantile(monkeypatch, dtype):
    use(monkeypatch, "quantile")
    outputs, expected = quantiles_of_the_end(dtype)
    assert all(map(torch.equal, outputs, expected))


def test_32_bit_offset_is_detected(monkeypatch):
    offset = "(const char*)values + at * BYTES"
    assert offset in kernel_source("quantile")
    use(
        monkeypatch,
        "quantile",
        kernel_source("quantile").replace(offset, "(const char*)values + (opd_u32)(at * BYTES)"),
    )
    outputs, expected = quantiles_of_the_end(BF16)
    assert not torch.equal(outputs[1], expected[1])


@pytest.mark.parametrize(
    ("dtypes", "each"), [((BF16, BF16, BF16), overlap.BF16_STEP), ((BF16, FP32, FP64), overlap.MIXED_STEP)], ids=str
)
def test_overlap(monkeypatch, dtypes, each):
    use(monkeypatch, "overlap")
    size = last_two_tiles(each)
    base, runs = make_runs(size, dtypes)
    outputs = call_overlap(
        backend_kernel("cuda"), Allocator(), reserved(N, BF16, base), [reserved(N, run.dtype, run) for run in runs]
    )
    expected = call_overlap(reference, Allocator(), base, runs)
    expected[-1][COUNT_NUMEL] = 0  # the first block adds it
    expected[-2][0] -= size  # and here, from which the others subtract
    assert all(map(torch.equal, outputs, expected))


def stepped_at_the_end() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and moments by the kernel, and by the reference from the end of the tensor.

    Only the last two tiles have active coordinates, and more than 2^32 moments come before theirs. Stochastic rounding
    depends on the index of a coordinate.
    """
    tiles, before = -(-N // STEP_BLOCK), 2**32 + 7
    size = N - (tiles - 2) * STEP_BLOCK
    small, (grad,) = State((size,), dtype=BF16, precision="stochastic"), State((size,)).grads(BF16)
    mask, (offsets,), active = small.payloads[0], small.block_counts, small.masks[0].num_active
    param, m, v = (
        reserved(N, BF16, small.params[0]),
        reserved(before + active, FP32, small.m[0]),
        reserved(before + active, FP32, small.v[0]),
    )
    scalars = step_ops.adamw_scalars([3], 1e-3, (0.9, 0.99), 1e-8, 0.1)
    common = (scalars, [0], None, None, None, False, step_ops.PRECISIONS.index("stochastic"), 5)

    def by(run, params, grads, masks, offsets, m, v, start):
        return run(
            params, grads, masks, offsets, m, v, [], [], [], [], [], common[0], common[1], [start], [9], *common[2:]
        )

    by(
        step.masked_adamw_,
        [param],
        [reserved(N, BF16, grad)],
        [reserved((N + 7) // 8, torch.uint8, mask)],
        [reserved(tiles + 1, torch.int64, offsets + before)],
        [m],
        [v],
        0,
    )
    by(step_ops.reference_adamw, small.params, [grad], [mask], [offsets], small.m, small.v, N - size)
    return [param[-size:], m[-active:], v[-active:]], [small.params[0], small.m[0], small.v[0]]


def test_step(monkeypatch):
    use(monkeypatch, "step")
    outputs, expected = stepped_at_the_end()
    assert expected[1].any()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(outputs, expected, strict=True))


def test_32_bit_moment_offset_is_detected(monkeypatch):
    slot = "const opd_i64 slot = first_slot + k;"
    assert slot in kernel_source("step")
    use(monkeypatch, "step", kernel_source("step").replace(slot, "const opd_i64 slot = (opd_u32)(first_slot + k);"))
    outputs, expected = stepped_at_the_end()
    assert not torch.equal(outputs[1], expected[1])


def test_indices_of_step(monkeypatch):
    use(monkeypatch, "step")
    places = torch.tensor([5, 2**31 - 1, 2**31, N - 1])
    values, taken = reserved(N, BF16, torch.zeros(2000, dtype=BF16)), torch.empty(4)
    values[places] = torch.tensor([1.0, 2, 3, 4], dtype=BF16)
    none = torch.zeros(0, dtype=torch.int64)
    step.masked_gather_(values, places, none, taken, False)
    assert taken.tolist() == [1, 2, 3, 4]
    step.masked_scatter_(values, places, none, taken + 4)
    assert values[places].tolist() == [5, 6, 7, 8]


SHIFT = 2**32 + 8  # of positions and values, whose bytes before are reserved too


def pair_of_two_blocks() -> tuple[torch.Tensor, torch.Tensor]:
    """A pair that differs only in the last two launched tiles of `compress`."""
    w, v = make_bits(BLOCK + N % BLOCK, torch.int16, 0.02)
    v[: BLOCK - 4096] = w[: BLOCK - 4096]
    return w, v


def gathered_at_the_end(monkeypatch) -> tuple:
    """Positions, values, counts and digests of the last two blocks, stored behind 2^32 others; and what they are."""
    planned = patch.plan

    def plan_beyond(*arguments):
        starts = planned(*arguments)
        for bad in arguments[4:]:
            bad.fill_(VALID)  # the lengths do not match
        return tuple(start + SHIFT for start in starts)

    monkeypatch.setattr(patch, "plan", plan_beyond)
    monkeypatch.setattr(patch, "THREADS", THREADS)
    monkeypatch.setattr(patch, "QUEUE_THREADS", THREADS)
    w, v = pair_of_two_blocks()
    blocks, size = blocks_of(N), 10_000
    source, trained = reserved(N, torch.int16, w), reserved(N, torch.int16, v)
    positions, values = (
        reserved(SHIFT + size, dtype, torch.zeros(size, dtype=dtype)) for dtype in (torch.uint8, torch.int16)
    )
    counts, digests = torch.zeros(blocks, dtype=torch.int32), torch.zeros(2, blocks, 2, dtype=torch.int64)
    patch.patch_gather_(source, trained, False, counts, positions, values, digests)
    expected, expected_digests = gathered_by_reference(w, v, False)
    used, changed = len(expected.positions), expected.changed
    outputs = positions[SHIFT : SHIFT + used], values[SHIFT : SHIFT + changed], counts[-2:], digests[:, -2:]
    return (
        outputs,
        (expected.positions, expected.values, expected.counts, expected_digests),
        (source, counts, positions, values, v),
    )


def test_patch(monkeypatch):
    use(monkeypatch, "patch")
    outputs, expected, (source, counts, positions, values, v) = gathered_at_the_end(monkeypatch)
    assert all(map(torch.equal, outputs, expected))
    out, digests = reserved(N, torch.int16, torch.zeros_like(v)), torch.zeros(len(counts), 2, dtype=torch.int64)
    finish_all_but_two_blocks("patch", 1, len(counts))
    assert int(patch.patch_scatter_(source, counts, positions, values, False, out, digests)) == -1
    assert torch.equal(out[-len(v) :], v)
    assert torch.equal(digests[-2:], expected[3][1])
    assert torch.equal(patch.patch_digest(out)[-2:], expected[3][1])


def test_32_bit_position_offset_is_detected(monkeypatch):
    start = "opd_u8* to = positions + starts[block];"
    assert start in kernel_source("patch")
    use(monkeypatch, "patch", kernel_source("patch").replace(start, "opd_u8* to = positions + (opd_u32)starts[block];"))
    outputs, expected, _ = gathered_at_the_end(monkeypatch)
    assert torch.equal(outputs[1], expected[1])
    assert not torch.equal(outputs[0], expected[0])
