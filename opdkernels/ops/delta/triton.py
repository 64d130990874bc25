"""`delta` in Triton: a tile of both tensors is read once and everything that the tally holds is counted.

Tables. A coordinate adds one to the joint table [group, |w|], where its group tells how far it changed: 0 unchanged, 1
changed in the stored view only, 2 visibly changed, and one more for every threshold exceeded. HIST_BASE,
HIST_BASE_CHANGED and HIST_BASE_OVER are sums of it, made by `fold`. Only changed coordinates are counted in HIST_DELTA,
HIST_TRAINED_CHANGED and HIST_DELTA_STORED, and a zero that stayed zero, the one bin that may hold half a tensor, is
counted in registers. So a coordinate costs one atomic increment, and three more if it changed.

Contention. The tables stay in the L2 cache, whose atomic units take one increment per clock and address. 1,667 bins
hold 99.9 % of a weight matrix: no binade of a normal distribution holds more than a third, so the fullest of its 128
bins has 0.4 %. A tile therefore hits a bin some four times at most, too rarely to be worth combining within the tile,
but all multiprocessors hit it at once. Programs therefore count into up to eight copies, in turn, each folded once at
the end. Counts with few bins (flags, limits, ULP distances) are made within the tile, by ballots (tl.histogram), and
kept in registers.

Sums are exact, so the order of programs cannot change them. For a bf16 pair they follow from the tables: W^2 and W'^2
from the counts of their values, |delta| and delta^2 from HIST_DELTA_STORED, whose bins hold the upper 16 bits of a
difference, with the sums of the lower 16 bits and of their squares, which few coordinates have. For other dtypes the
tile is summed by `add_exactly`.

The arithmetic of a coordinate is that of csrc/delta/delta.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from opdkernels.backends import gpu
from opdkernels.backends import layout as common
from opdkernels.backends.triton import launch
from opdkernels.backends.triton.numeric import (
    LIMB_LANES,
    SUM_LIMBS,
    SUM_SHIFT,
    add_exactly,
    add_units,
    bf16_bits_of,
    bits_of,
    from_bf16_bits,
    magnitude_bits,
    propagate_carry,
    widen,
)
from opdkernels.ops.delta import layout
from opdkernels.ops.delta.gpu_common import kernel_params, one_by_one

NUM_WARPS, MAXNREG = 4, 160  # three programs per multiprocessor
EXPONENTS = 2  # per program of `fold`: 128 programs
MAX_COPIES, COORDINATES_PER_COPY = 8, 1 << 22  # zeroing and folding a copy costs as much as counting some millions

BINS, INFINITY_BITS = tl.constexpr(common.BINS), tl.constexpr(common.INFINITY_BITS)
MANTISSAS = tl.constexpr(layout.MANTISSAS)

# Groups of the joint table, and the rows of the work tables after it, which count changed coordinates.
UNCHANGED, STORED_CHANGED, VISIBLE_CHANGED = (tl.constexpr(x) for x in range(3))
GROUPS = tl.constexpr(3 + layout.MAX_VISIBLE_THRESHOLDS)
WORK_DELTA, WORK_TRAINED, WORK_STORED, WORK_ROWS = (tl.constexpr(GROUPS.value + x) for x in range(4))
LOW, LOW_SQUARE, LOW_ROWS = (tl.constexpr(x) for x in range(3))

# Flags of a coordinate, counted together.
FLAG_NONFINITE, FLAG_EQUAL, FLAG_RTOL, FLAG_ZERO, FLAGS = (tl.constexpr(x) for x in (1, 2, 4, 8, 16))

# Parameters (`kernel_params`) are data: another threshold compiles nothing.
PARAM_VISIBLE, PARAM_LIMITS = tl.constexpr(layout.PARAM_VISIBLE), tl.constexpr(layout.PARAM_LIMITS)
PARAM_COUNTS, NUM_LIMITS = tl.constexpr(layout.PARAM_COUNTS), tl.constexpr(layout.NUM_LIMITS)
MAX_VISIBLE_THRESHOLDS, LIMIT_LANES = tl.constexpr(layout.MAX_VISIBLE_THRESHOLDS), tl.constexpr(16)

HIST_BASE, HIST_DELTA = tl.constexpr(layout.HIST_BASE), tl.constexpr(layout.HIST_DELTA)
HIST_TRAINED_CHANGED = tl.constexpr(layout.HIST_TRAINED_CHANGED)
HIST_BASE_CHANGED = tl.constexpr(layout.HIST_BASE_CHANGED)
HIST_DELTA_STORED, HIST_BASE_OVER = tl.constexpr(layout.HIST_DELTA_STORED), tl.constexpr(layout.HIST_BASE_OVER)
COUNT_NUMEL, COUNT_NONFINITE = tl.constexpr(layout.COUNT_NUMEL), tl.constexpr(layout.COUNT_NONFINITE)
COUNT_BIT_EQUAL = tl.constexpr(layout.COUNT_BIT_EQUAL)
COUNT_UNCHANGED_RTOL, COUNT_ULP = tl.constexpr(layout.COUNT_UNCHANGED_RTOL), tl.constexpr(layout.COUNT_ULP)
SUM_BASE_SQ, SUM_TRAINED_SQ = tl.constexpr(layout.SUM_BASE_SQ), tl.constexpr(layout.SUM_TRAINED_SQ)
SUM_DELTA_SQ, SUM_DELTA_ABS = tl.constexpr(layout.SUM_DELTA_SQ), tl.constexpr(layout.SUM_DELTA_ABS)
NUM_SUMS = tl.constexpr(layout.NUM_SUMS)
ULP_CLIP, ULP_BINS, ULP_LANES = (tl.constexpr(x) for x in (layout.ULP_REACH + 1, layout.ULP_BINS, 64))


@triton.jit
def ordered(bits):
    """bf16 bits mapped to the order of their values, +0 and -0 both to 0."""
    magnitude = bits & 0x7FFF
    return tl.where((bits & 0x8000) != 0, -magnitude, magnitude)


@triton.jit
def same_bits(a, b, x, y):
    """Equal bits; two dtypes are compared after widening, where a NaN has no payload and so equals nothing."""
    if a.dtype == b.dtype:
        return bits_of(a) == bits_of(b)
    else:
        return (bits_of(x) == bits_of(y)) & (x == x)


@triton.jit
def within_rtol(x, y, stored):
    """|w - w'| <= 1e-3 max(|w|, |w'|), the factor rounded to the dtype of the comparison."""
    factor = tl.full([1], 1e-3, x.dtype)
    return stored <= factor * tl.maximum(tl.abs(x), tl.abs(y))


@triton.jit
def rank_among(abs_delta, limits_ptr):
    """How many of the NUM_LIMITS ascending limits a magnitude reaches; both as bits."""
    rank = tl.zeros(abs_delta.shape, tl.int32)
    for k in tl.static_range(NUM_LIMITS):
        rank += (abs_delta >= tl.load(limits_ptr + k)).to(tl.int32)
    return rank


@triton.jit
def halves(tile):
    """The even and the odd elements of a tile; they stay in the thread that loaded them."""
    return tl.split(tl.reshape(tile, [tile.shape[0] // 2, 2]))


@triton.jit
def pack_bits(pairs):
    """Bytes of eight bits each, the first lowest, from the two bits of each pair of adjacent coordinates."""
    shifts = 2 * tl.arange(0, 4)[None, :]
    return tl.sum(tl.reshape(pairs, [pairs.shape[0] // 4, 4]) << shifts, 1).to(tl.uint8)


@triton.jit
def count_half(
    a,
    b,
    inside,
    work_ptr,
    low_sums_ptr,
    params_ptr,
    flags,
    ranks,
    ulps,
    largest,
    limbs,
    WIDE: tl.constexpr,
    BF16: tl.constexpr,
):
    """Counts half a tile. Returns its change bits and the updated flags, ranks, ulps, largest and limbs.

    Pointers as in `count`; abs_delta and largest are bits of WIDE magnitudes.
    """
    w, v = bf16_bits_of(a), bf16_bits_of(b)
    abs_w, abs_v = w & 0x7FFF, v & 0x7FFF
    visible = bf16_bits_of(from_bf16_bits(v) - from_bf16_bits(w)) & 0x7FFF
    finite = (abs_w < INFINITY_BITS) & (abs_v < INFINITY_BITS) & (visible < INFINITY_BITS)
    counted = finite & inside
    steps = tl.minimum(tl.maximum(ordered(v) - ordered(w), -ULP_CLIP), ULP_CLIP) + ULP_CLIP
    ulps += tl.histogram(tl.where(counted, steps, ULP_LANES - 1), ULP_LANES)

    x, y = widen(a, WIDE), widen(b, WIDE)
    abs_delta = tl.where(counted, magnitude_bits(y - x), 0)  # bits of the stored |delta|
    stored = abs_delta.to(WIDE, bitcast=True)
    stored_changed, visible_changed = abs_delta > 0, counted & (visible > 0)
    largest = tl.maximum(largest, abs_delta)
    ranks += tl.histogram(
        tl.where(counted, rank_among(abs_delta, params_ptr + PARAM_LIMITS), LIMIT_LANES - 1), LIMIT_LANES
    )

    group = stored_changed.to(tl.int32) + visible_changed.to(tl.int32)
    for k in tl.static_range(MAX_VISIBLE_THRESHOLDS):
        group += (visible_changed & (visible > tl.load(params_ptr + PARAM_VISIBLE + k))).to(tl.int32)
    cell = group * BINS + abs_w
    flag = (inside & (finite == 0)).to(tl.int32) * FLAG_NONFINITE
    flag += (inside & same_bits(a, b, x, y)).to(tl.int32) * FLAG_EQUAL
    flag += (counted & within_rtol(x, y, stored)).to(tl.int32) * FLAG_RTOL
    flag += (counted & (cell == 0)).to(tl.int32) * FLAG_ZERO
    flags += tl.histogram(flag, FLAGS)

    tl.atomic_add(work_ptr + cell, 1, counted & (cell > 0), sem="relaxed")
    tl.atomic_add(work_ptr + WORK_DELTA * BINS + visible, 1, visible_changed, sem="relaxed")
    tl.atomic_add(work_ptr + WORK_TRAINED * BINS + abs_v, 1, visible_changed, sem="relaxed")
    fp32_bits = magnitude_bits(stored.to(tl.float32))
    top = fp32_bits >> 16
    tl.atomic_add(work_ptr + WORK_STORED * BINS + top, 1, stored_changed, sem="relaxed")
    if BF16:
        low = (fp32_bits & 0xFFFF).to(tl.int64)
        tl.atomic_add(low_sums_ptr + LOW * BINS + top, low, low > 0, sem="relaxed")
        tl.atomic_add(low_sums_ptr + LOW_SQUARE * BINS + top, low * low, low > 0, sem="relaxed")
    else:
        x, y, d = tl.where(counted, x, 0).to(tl.float64), tl.where(counted, y, 0).to(tl.float64), stored.to(tl.float64)
        limbs = (
            add_exactly(x * x, limbs[0]),
            add_exactly(y * y, limbs[1]),
            add_exactly(d * d, limbs[2]),
            add_exactly(d, limbs[3]),
        )
    return visible_changed & (visible > tl.load(params_ptr + PARAM_VISIBLE)), flags, ranks, ulps, largest, limbs


@triton.jit
def count_tile(
    base_ptr,
    trained_ptr,
    mask_ptr,
    work_ptr,
    low_sums_ptr,
    params_ptr,
    tile_start,
    n,
    flags,
    ranks,
    ulps,
    largest,
    limbs,
    WIDE: tl.constexpr,
    BF16: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
):
    """Counts one tile in halves: eight bf16 coordinates per thread, as a 16-byte load returns, exceed the registers."""
    i = tile_start + tl.arange(0, TILE)
    if TAIL:
        inside = i < n
        a, b = tl.load(base_ptr + i, inside, 0.0), tl.load(trained_ptr + i, inside, 0.0)
    else:
        inside = tl.full([TILE], 1, tl.int1)
        a, b = tl.load(base_ptr + i), tl.load(trained_ptr + i)
    even_a, odd_a = halves(a)
    even_b, odd_b = halves(b)
    even_inside, odd_inside = halves(inside)
    pairs = tl.zeros([TILE // 2], tl.int32)
    # A loop, not two calls, which the compiler would interleave; loop-carried variables must keep their names.
    for half in range(2):
        changed, flags, ranks, ulps, largest, limbs = count_half(
            tl.where(half == 0, even_a, odd_a),
            tl.where(half == 0, even_b, odd_b),
            tl.where(half == 0, even_inside, odd_inside),
            work_ptr,
            low_sums_ptr,
            params_ptr,
            flags,
            ranks,
            ulps,
            largest,
            limbs,
            WIDE,
            BF16,
        )
        pairs |= changed.to(tl.int32) << half
    if mask_ptr is not None:
        byte = tile_start // 8 + tl.arange(0, TILE // 8)
        if TAIL:
            tl.store(mask_ptr + byte, pack_bits(pairs), byte * 8 < n)
        else:
            tl.store(mask_ptr + byte, pack_bits(pairs))
    return flags, ranks, ulps, largest, limbs


@triton.jit
def flags_with(flags, FLAG: tl.constexpr):
    """Number of coordinates that have a flag."""
    return tl.sum(tl.where((tl.arange(0, FLAGS) & FLAG) != 0, flags, 0))


@triton.jit(do_not_specialize=["n", "copies"])
def count(
    base_ptr,  # [n]
    trained_ptr,  # [n]
    mask_ptr,  # uint8 [ceil(n / 8)] or None
    work_ptr,  # int32 [copies, WORK_ROWS, BINS]
    low_sums_ptr,  # int64 [copies, LOW_ROWS, BINS], or None unless BF16
    params_ptr,  # int32 or, for fp64, int64 [NUM_PARAMS]
    counts_ptr,  # int64 [NUM_COUNTS]
    sums_ptr,  # int64 [NUM_SUMS, SUM_LIMBS]
    maximum_ptr,  # fp64 [1], as int64 bits
    n,
    copies,
    WIDE: tl.constexpr,
    BF16: tl.constexpr,
    TILE: tl.constexpr,
):
    """Counts a pair; programs take tiles in turn. Adds to every output but the mask."""
    program = tl.program_id(0).to(tl.int64)
    copy = program % copies
    work_ptr += copy * WORK_ROWS * BINS
    if BF16:
        low_sums_ptr += copy * LOW_ROWS * BINS
    flags = tl.zeros([FLAGS], tl.int32)
    ranks = tl.zeros([LIMIT_LANES], tl.int32)
    ulps = tl.zeros([ULP_LANES], tl.int32)
    largest = tl.zeros([TILE // 2], tl.int64 if tl.float64 == WIDE else tl.int32)
    zero = tl.zeros([LIMB_LANES], tl.int64)
    limbs = (zero, zero, zero, zero)

    full, step = n.to(tl.int64) // TILE * TILE, tl.num_programs(0).to(tl.int64) * TILE
    for tile_start in range(program * TILE, full, step):
        flags, ranks, ulps, largest, limbs = count_tile(
            base_ptr,
            trained_ptr,
            mask_ptr,
            work_ptr,
            low_sums_ptr,
            params_ptr,
            tile_start,
            n,
            flags,
            ranks,
            ulps,
            largest,
            limbs,
            WIDE,
            BF16,
            False,
            TILE,
        )
    if (full < n) & (full % step == program * TILE):
        flags, ranks, ulps, largest, limbs = count_tile(
            base_ptr,
            trained_ptr,
            mask_ptr,
            work_ptr,
            low_sums_ptr,
            params_ptr,
            full,
            n,
            flags,
            ranks,
            ulps,
            largest,
            limbs,
            WIDE,
            BF16,
            True,
            TILE,
        )

    if program == 0:
        tl.atomic_add(counts_ptr + COUNT_NUMEL, n.to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + COUNT_NONFINITE, flags_with(flags, FLAG_NONFINITE).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + COUNT_BIT_EQUAL, flags_with(flags, FLAG_EQUAL).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + COUNT_UNCHANGED_RTOL, flags_with(flags, FLAG_RTOL).to(tl.int64), sem="relaxed")
    tl.atomic_add(work_ptr, flags_with(flags, FLAG_ZERO), sem="relaxed")
    lane = tl.arange(0, LIMIT_LANES)
    element = tl.load(params_ptr + PARAM_COUNTS + lane, lane < NUM_LIMITS, 0)
    # Magnitudes below a limit are those of its rank and of lower ranks.
    tl.atomic_add(counts_ptr + element, tl.cumsum(ranks).to(tl.int64), lane < NUM_LIMITS, sem="relaxed")
    lane = tl.arange(0, ULP_LANES)
    tl.atomic_add(counts_ptr + COUNT_ULP + lane, ulps.to(tl.int64), lane < ULP_BINS, sem="relaxed")
    abs_delta = tl.max(largest).to(WIDE, bitcast=True).to(tl.float64)
    tl.atomic_max(maximum_ptr, bits_of(abs_delta), sem="relaxed")
    if not BF16:
        lane = tl.arange(0, LIMB_LANES)
        for row in tl.static_range(NUM_SUMS):
            tl.atomic_add(sums_ptr + row * SUM_LIMBS + lane, limbs[row], limbs[row] != 0, sem="relaxed")


@triton.jit
def sum_copies(table_ptr, cells, copies, STRIDE: tl.constexpr):
    """Cells of a table, summed over its copies, int64."""
    total = tl.zeros(cells.shape, tl.int64)
    for copy in range(copies):
        total += tl.load(table_ptr + copy * STRIDE + cells)
    return total


@triton.jit
def add_to(tables_ptr, row, bins, count):
    """Adds counts to bins of one row of the tables."""
    tl.atomic_add(tables_ptr + row * BINS + bins, count, count != 0, sem="relaxed")


@triton.jit(do_not_specialize=["copies", "n_thresholds"])
def fold(
    work_ptr,  # int32 [copies, WORK_ROWS, BINS]
    low_sums_ptr,  # int64 [copies, LOW_ROWS, BINS], or None unless BF16
    tables_ptr,  # int64 [HIST_BASE_OVER + n_thresholds, BINS]
    sums_ptr,  # int64 [NUM_SUMS, SUM_LIMBS]
    copies,
    n_thresholds,
    BF16: tl.constexpr,
    EXPONENTS: tl.constexpr,
):
    """Adds the work tables to the tally's, and the sums of a bf16 pair. A row of a tile has one exponent: one scale."""
    exponent = tl.program_id(0) * EXPONENTS + tl.arange(0, EXPONENTS)
    mantissa = tl.arange(0, MANTISSAS)
    bins = exponent[:, None] * MANTISSAS + mantissa[None, :]
    stride: tl.constexpr = WORK_ROWS * BINS

    base = tl.zeros([EXPONENTS, MANTISSAS], tl.int64)
    base_changed, not_visible = base, base
    for k in tl.static_range(GROUPS):
        group = GROUPS - 1 - k
        count = sum_copies(work_ptr, bins + group * BINS, copies, stride)
        base += count  # of this group and those above it
        if group > VISIBLE_CHANGED:
            if group - VISIBLE_CHANGED <= n_thresholds:
                add_to(tables_ptr, HIST_BASE_OVER + group - VISIBLE_CHANGED - 1, bins, base)
        elif group < VISIBLE_CHANGED:
            not_visible += count
            if group == STORED_CHANGED:
                add_to(tables_ptr, HIST_BASE_CHANGED, bins, base)
                base_changed = base
    trained = sum_copies(work_ptr, bins + WORK_TRAINED * BINS, copies, stride)
    stored = sum_copies(work_ptr, bins + WORK_STORED * BINS, copies, stride)
    add_to(tables_ptr, HIST_BASE, bins, base)
    add_to(tables_ptr, HIST_DELTA, bins, sum_copies(work_ptr, bins + WORK_DELTA * BINS, copies, stride))
    add_to(tables_ptr, HIST_TRAINED_CHANGED, bins, trained)
    add_to(tables_ptr, HIST_DELTA_STORED, bins, stored)
    tl.atomic_add(tables_ptr + HIST_DELTA * BINS, tl.sum(not_visible), sem="relaxed")
    tl.atomic_add(tables_ptr + HIST_DELTA_STORED * BINS, tl.sum(base - base_changed), sem="relaxed")

    if BF16:
        # A bf16 magnitude is t * 2^(e - 134), e at least 1; a stored delta is (t * 2^16 + low) * 2^(e - 150).
        e = tl.maximum(exponent, 1)
        t = (mantissa[None, :] + tl.where(exponent > 0, MANTISSAS, 0)[:, None]).to(tl.int64)
        low = sum_copies(low_sums_ptr, bins + LOW * BINS, copies, LOW_ROWS * BINS)
        low_square = sum_copies(low_sums_ptr, bins + LOW_SQUARE * BINS, copies, LOW_ROWS * BINS)
        square: tl.constexpr = SUM_SHIFT - 2 * 134
        square_low: tl.constexpr = SUM_SHIFT - 2 * 150
        add_units(sums_ptr + SUM_BASE_SQ * SUM_LIMBS, tl.sum(base * t * t, 1), 2 * e + square)
        add_units(
            sums_ptr + SUM_TRAINED_SQ * SUM_LIMBS, tl.sum((base - base_changed + trained) * t * t, 1), 2 * e + square
        )
        add_units(sums_ptr + SUM_DELTA_SQ * SUM_LIMBS, tl.sum(stored * t * t, 1), 2 * e + square_low + 32)
        add_units(sums_ptr + SUM_DELTA_SQ * SUM_LIMBS, tl.sum(low * t, 1), 2 * e + square_low + 17)
        add_units(sums_ptr + SUM_DELTA_SQ * SUM_LIMBS, tl.sum(low_square, 1), 2 * e + square_low)
        add_units(sums_ptr + SUM_DELTA_ABS * SUM_LIMBS, tl.sum(stored * t, 1), e + SUM_SHIFT - 134)
        add_units(sums_ptr + SUM_DELTA_ABS * SUM_LIMBS, tl.sum(low, 1), e + SUM_SHIFT - 150)


def launch_shape(base: torch.dtype, trained: torch.dtype) -> tuple[int, int | None]:
    """Coordinates per tile, so many that both tensors are loaded 16 bytes at a time, and registers per thread."""
    if min(base.itemsize, trained.itemsize) > 2:
        return 512, MAXNREG
    return 1024, MAXNREG if base == trained == torch.bfloat16 else None


def delta_(
    base: torch.Tensor,
    trained: torch.Tensor,
    threshold_bits: Sequence[int],
    thresholds: Sequence[float],
    tables: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    maximum: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    """The operator, for contiguous tensors on one device."""
    device, n = base.device, base.numel()
    wide = torch.float64 in (base.dtype, trained.dtype)
    bf16 = base.dtype == trained.dtype == torch.bfloat16
    tile, maxnreg = launch_shape(base.dtype, trained.dtype)
    params = torch.tensor(
        kernel_params(threshold_bits, thresholds, np.float64 if wide else np.float32),
        dtype=torch.int64 if wide else torch.int32,
        device=device,
    )
    base, trained = base.view(-1), trained.view(-1)
    for start, size in gpu.slices(n):
        copies = max(1, min(MAX_COPIES, size // COORDINATES_PER_COPY))
        work = torch.zeros(copies, WORK_ROWS.value, BINS.value, dtype=torch.int32, device=device)
        low_sums = torch.zeros(copies, LOW_ROWS.value, BINS.value, dtype=torch.int64, device=device) if bf16 else None
        launch.run(
            count,
            (launch.num_programs(device, triton.cdiv(size, tile)),),
            base.narrow(0, start, size),
            trained.narrow(0, start, size),
            gpu.mask_from(mask, start),
            work,
            low_sums,
            params,
            counts,
            sums,
            maximum.view(torch.int64),
            size,
            copies,
            num_warps=NUM_WARPS,
            maxnreg=maxnreg,
            WIDE=tl.float64 if wide else tl.float32,
            BF16=bf16,
            TILE=tile,
        )
        launch.run(
            fold,
            (BINS.value // MANTISSAS.value // EXPONENTS,),
            work,
            low_sums,
            tables,
            sums,
            copies,
            len(threshold_bits),
            num_warps=4,
            BF16=bf16,
            EXPONENTS=EXPONENTS,
        )
    if n:
        launch.run(propagate_carry, (1,), sums, num_warps=1, ROWS=layout.NUM_SUMS)


def delta_many_(
    base: Sequence[torch.Tensor], trained: Sequence[torch.Tensor], *arguments: Sequence[float] | torch.Tensor
) -> None:
    """The operator, by one launch per pair."""
    one_by_one(delta_, base, trained, *arguments)  # type: ignore[arg-type]
