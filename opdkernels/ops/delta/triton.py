"""`delta` in Triton: a tile of both tensors is read once and everything that the tally holds is counted.

Tables. A coordinate adds one to the joint table [group, |w|], where its group tells how far it changed: 0 unchanged, 1
changed in the stored view only, 2 visibly changed, and one more for every threshold exceeded. HIST_BASE,
HIST_BASE_CHANGED and HIST_BASE_OVER are sums of it, made by `fold`. Only changed coordinates are counted in
HIST_TRAINED_CHANGED and HIST_DELTA_STORED.

Most coordinates of the largest group (unchanged in a bf16 pair, changed in the stored view otherwise) are counted in
registers; the others, and the changed ones again in two tables, cost atomic increments in one of several copies of the
tables in memory (opdkernels/backends/triton/tables.py). A zero that stayed zero, the one bin that may hold half a
tensor, and ULP distances are counted in registers. `fold` adds the sum of the copies to the tally.

A bf16 pair. Its visible |delta| is the upper 16 bits of the stored one, unless the lower are not zero, which few
coordinates have: these are counted once more, so that HIST_DELTA and the counts below limits follow from
HIST_DELTA_STORED. So do the exact sums: W^2 and W'^2 from the counts of their values, |delta| and delta^2 from
HIST_DELTA_STORED with the sums of the lower 16 bits and of their squares. For other dtypes the tile is summed by
`add_exactly`. Sums are exact, so the order of programs cannot change them.

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
from opdkernels.backends.triton import tables as work_tables
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
from opdkernels.backends.triton.tables import (
    WINDOW,
    add_to_tables,
    column_sums,
    flush_window,
    rows,
    striped,
    window_around,
)
from opdkernels.ops.delta import layout
from opdkernels.ops.delta.gpu_common import kernel_params, one_by_one

NUM_WARPS, MAXNREG = 4, 160  # three programs per multiprocessor
EXPONENTS = 2  # per program of `fold`: 128 programs

BINS, INFINITY_BITS = tl.constexpr(common.BINS), tl.constexpr(common.INFINITY_BITS)
MANTISSAS = tl.constexpr(layout.MANTISSAS)

# Groups of the joint table, and the rows of the work tables after it, which count changed coordinates: of a bf16 pair
# those with lower bits, and of these the ones that are rounded up, in place of WORK_DELTA.
UNCHANGED, STORED_CHANGED, VISIBLE_CHANGED = (tl.constexpr(x) for x in range(3))
GROUPS = tl.constexpr(3 + layout.MAX_VISIBLE_THRESHOLDS)
WORK_TRAINED, WORK_STORED, WORK_DELTA, WORK_INEXACT, WORK_ROWS = (tl.constexpr(GROUPS.value + x) for x in range(5))
WORK_ROUNDED_UP = WORK_DELTA
LOW, LOW_SQUARE, LOW_ROWS = (tl.constexpr(x) for x in range(3))

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
def pack_bits(bits, ROWS: tl.constexpr):
    """Bytes of eight adjacent bits each, the first lowest, of a striped tile."""
    per_byte: tl.constexpr = 8 // ROWS
    parts = tl.sum(rows(bits.to(tl.int32), ROWS) << tl.arange(0, ROWS)[:, None], 0)
    shifts = ROWS * tl.arange(0, per_byte)[None, :]
    return tl.sum(tl.reshape(parts, [parts.shape[0] // per_byte, per_byte]) << shifts, 1).to(tl.uint8)


@triton.jit
def count_inexact(abs_delta, visible, work_ptr, low_sums_ptr, params_ptr, ranks):
    """Counts those stored |delta| of a bf16 pair that are no bf16 values; returns the updated ranks."""
    top, low = abs_delta >> 16, (abs_delta & 0xFFFF).to(tl.int64)
    inexact = low > 0
    tl.atomic_add(work_ptr + WORK_INEXACT * BINS + top, 1, inexact, sem="relaxed")
    tl.atomic_add(work_ptr + WORK_ROUNDED_UP * BINS + top, 1, inexact & (visible > top), sem="relaxed")
    tl.atomic_add(low_sums_ptr + LOW * BINS + top, low, inexact, sem="relaxed")
    tl.atomic_add(low_sums_ptr + LOW_SQUARE * BINS + top, low * low, inexact, sem="relaxed")
    rank = rank_among(abs_delta, params_ptr + PARAM_LIMITS)
    return ranks + tl.histogram(rank, LIMIT_LANES, mask=inexact)


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
    window_start,
    zeros,
    bit_equal,
    unchanged_rtol,
    ranks,
    ulps,
    largest,
    limbs,
    window,
    WIDE: tl.constexpr,
    BF16: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Counts one tile; returns `zeros` to `window`, which stay in registers, updated.

    Pointers as in `count`; abs_delta and largest are bits of WIDE magnitudes.
    """
    i = tile_start + tl.arange(0, TILE)
    if TAIL:
        inside = striped(i < n, ROWS)
        a, b = tl.load(base_ptr + i, i < n, 0.0), tl.load(trained_ptr + i, i < n, 0.0)
    else:
        inside = tl.full([TILE], 1, tl.int1)
        a, b = tl.load(base_ptr + i), tl.load(trained_ptr + i)
    a, b = striped(a, ROWS), striped(b, ROWS)
    w, v = bf16_bits_of(a), bf16_bits_of(b)
    abs_w, abs_v = w & 0x7FFF, v & 0x7FFF
    difference = magnitude_bits(from_bf16_bits(v) - from_bf16_bits(w))
    visible = (difference + 0x7FFF + ((difference >> 16) & 1)) >> 16  # rounded; a NaN only where w or v is not finite
    finite = (abs_w < INFINITY_BITS) & (abs_v < INFINITY_BITS) & (visible < INFINITY_BITS)
    counted = finite & inside
    steps = tl.minimum(tl.maximum(ordered(v) - ordered(w), -ULP_CLIP), ULP_CLIP) + ULP_CLIP
    ulps += tl.histogram(steps, ULP_LANES, mask=counted)

    x, y = widen(a, WIDE), widen(b, WIDE)
    abs_delta = tl.where(counted, magnitude_bits(y - x), 0)  # bits of the stored |delta|
    stored = abs_delta.to(WIDE, bitcast=True)
    stored_changed, visible_changed = abs_delta > 0, counted & (visible > 0)
    largest = tl.maximum(largest, tl.max(rows(abs_delta, ROWS), 0))
    group = stored_changed.to(tl.int32) + visible_changed.to(tl.int32)
    for k in tl.static_range(MAX_VISIBLE_THRESHOLDS):
        group += (visible_changed & (visible > tl.load(params_ptr + PARAM_VISIBLE + k))).to(tl.int32)
    cell = group * BINS + abs_w
    zeros += column_sums(counted & (cell == 0), ROWS)
    bit_equal += column_sums(inside & same_bits(a, b, x, y), ROWS)
    if not BF16:
        unchanged_rtol += column_sums(counted & within_rtol(x, y, stored), ROWS)

    if mask_ptr is not None:
        changed = pack_bits(visible_changed & (visible > tl.load(params_ptr + PARAM_VISIBLE)), ROWS)
        byte = tile_start // 8 + tl.arange(0, TILE // 8)
        if TAIL:
            tl.store(mask_ptr + byte, changed, byte * 8 < n)
        else:
            tl.store(mask_ptr + byte, changed)

    tl.atomic_add(work_ptr + WORK_TRAINED * BINS + abs_v, 1, visible_changed, sem="relaxed")
    fp32_bits = magnitude_bits(stored.to(tl.float32))
    top = fp32_bits >> 16
    tl.atomic_add(work_ptr + WORK_STORED * BINS + top, 1, stored_changed, sem="relaxed")
    if BF16:
        if tl.max(fp32_bits & 0xFFFF) > 0:
            ranks = count_inexact(fp32_bits, visible, work_ptr, low_sums_ptr, params_ptr, ranks)
    else:
        tl.atomic_add(work_ptr + WORK_DELTA * BINS + visible, 1, visible_changed, sem="relaxed")
        rank = rank_among(abs_delta, params_ptr + PARAM_LIMITS)
        ranks += tl.histogram(rank, LIMIT_LANES, mask=counted)
        wide_w, wide_v = tl.where(counted, x, 0).to(tl.float64), tl.where(counted, y, 0).to(tl.float64)
        d = stored.to(tl.float64)
        limbs = (
            add_exactly(wide_w * wide_w, limbs[0]),
            add_exactly(wide_v * wide_v, limbs[1]),
            add_exactly(d * d, limbs[2]),
            add_exactly(d, limbs[3]),
        )

    in_row = group == (UNCHANGED if BF16 else STORED_CHANGED)
    window = add_to_tables(window, window_start, work_ptr + cell, abs_w, counted & (cell > 0), in_row, TAIL)
    return zeros, bit_equal, unchanged_rtol, ranks, ulps, largest, limbs, window


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
    ROWS: tl.constexpr = 128 // base_ptr.dtype.element_ty.primitive_bitwidth
    program = tl.program_id(0).to(tl.int64)
    copy = program % copies
    work_ptr += copy * WORK_ROWS * BINS
    if BF16:
        low_sums_ptr += copy * LOW_ROWS * BINS
    zeros = tl.zeros([TILE // ROWS], tl.int32)
    bit_equal, unchanged_rtol = zeros, zeros
    ranks = tl.zeros([LIMIT_LANES], tl.int32)
    ulps = tl.zeros([ULP_LANES], tl.int32)
    largest = tl.zeros([TILE // ROWS], tl.int64 if tl.float64 == WIDE else tl.int32)
    zero = tl.zeros([LIMB_LANES], tl.int64)
    limbs = (zero, zero, zero, zero)
    window = tl.zeros([WINDOW], tl.int32)
    i = program * TILE + tl.arange(0, TILE)
    window_start = window_around(bf16_bits_of(tl.load(base_ptr + i, i < n, 0.0)) & 0x7FFF, BINS)

    full, step = n.to(tl.int64) // TILE * TILE, tl.num_programs(0).to(tl.int64) * TILE
    for tile_start in range(program * TILE, full, step):
        zeros, bit_equal, unchanged_rtol, ranks, ulps, largest, limbs, window = count_tile(
            base_ptr,
            trained_ptr,
            mask_ptr,
            work_ptr,
            low_sums_ptr,
            params_ptr,
            tile_start,
            n,
            window_start,
            zeros,
            bit_equal,
            unchanged_rtol,
            ranks,
            ulps,
            largest,
            limbs,
            window,
            WIDE,
            BF16,
            False,
            ROWS,
            TILE,
        )
    if (full < n) & (full % step == program * TILE):
        zeros, bit_equal, unchanged_rtol, ranks, ulps, largest, limbs, window = count_tile(
            base_ptr,
            trained_ptr,
            mask_ptr,
            work_ptr,
            low_sums_ptr,
            params_ptr,
            full,
            n,
            window_start,
            zeros,
            bit_equal,
            unchanged_rtol,
            ranks,
            ulps,
            largest,
            limbs,
            window,
            WIDE,
            BF16,
            True,
            ROWS,
            TILE,
        )

    if program == 0:
        tl.atomic_add(counts_ptr + COUNT_NUMEL, n.to(tl.int64), sem="relaxed")
        tl.atomic_add(counts_ptr + COUNT_NONFINITE, n.to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + COUNT_NONFINITE, -tl.sum(ulps).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + COUNT_BIT_EQUAL, tl.sum(bit_equal).to(tl.int64), sem="relaxed")
    if not BF16:
        tl.atomic_add(counts_ptr + COUNT_UNCHANGED_RTOL, tl.sum(unchanged_rtol).to(tl.int64), sem="relaxed")
    tl.atomic_add(work_ptr, tl.sum(zeros), sem="relaxed")
    flush_window(window, window_start, work_ptr + (UNCHANGED if BF16 else STORED_CHANGED) * BINS)
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
def add_to(tables_ptr, row, bins, count):
    """Adds counts to bins of one row of the tables."""
    tl.atomic_add(tables_ptr + row * BINS + bins, count, count != 0, sem="relaxed")


@triton.jit(do_not_specialize=["n_thresholds"])
def fold(
    work_ptr,  # int64 [WORK_ROWS, BINS]
    low_sums_ptr,  # int64 [LOW_ROWS, BINS], or None unless BF16
    params_ptr,  # int32 or, for fp64, int64 [NUM_PARAMS]
    tables_ptr,  # int64 [HIST_BASE_OVER + n_thresholds, BINS]
    counts_ptr,  # int64 [NUM_COUNTS]
    sums_ptr,  # int64 [NUM_SUMS, SUM_LIMBS]
    n_thresholds,
    BF16: tl.constexpr,
    EXPONENTS: tl.constexpr,
):
    """Adds the work tables to the tally's, and the counts and sums of a bf16 pair that follow from them.

    A row of a tile has one exponent: one scale.
    """
    exponent = tl.program_id(0) * EXPONENTS + tl.arange(0, EXPONENTS)
    mantissa = tl.arange(0, MANTISSAS)
    bins = exponent[:, None] * MANTISSAS + mantissa[None, :]

    base = tl.zeros([EXPONENTS, MANTISSAS], tl.int64)
    base_changed, not_visible = base, base
    for k in tl.static_range(GROUPS):
        group = GROUPS - 1 - k
        count = tl.load(work_ptr + group * BINS + bins)
        base += count  # of this group and those above it
        if group > VISIBLE_CHANGED:
            if group - VISIBLE_CHANGED <= n_thresholds:
                add_to(tables_ptr, HIST_BASE_OVER + group - VISIBLE_CHANGED - 1, bins, base)
        elif group < VISIBLE_CHANGED:
            not_visible += count
            if group == STORED_CHANGED:
                add_to(tables_ptr, HIST_BASE_CHANGED, bins, base)
                base_changed = base
    trained = tl.load(work_ptr + WORK_TRAINED * BINS + bins)
    stored = tl.load(work_ptr + WORK_STORED * BINS + bins)
    n_unchanged = tl.sum(base - base_changed)
    if BF16:  # a stored |delta| is in its bin of the visible one, unless it is rounded up to the next
        rounded_up = tl.load(work_ptr + WORK_ROUNDED_UP * BINS + bins)
        delta = stored - rounded_up + tl.load(work_ptr + WORK_ROUNDED_UP * BINS + bins - 1, bins > 0, 0)
    else:
        delta = tl.load(work_ptr + WORK_DELTA * BINS + bins)
    add_to(tables_ptr, HIST_BASE, bins, base)
    add_to(tables_ptr, HIST_DELTA, bins, delta)
    add_to(tables_ptr, HIST_TRAINED_CHANGED, bins, trained)
    add_to(tables_ptr, HIST_DELTA_STORED, bins, stored)
    tl.atomic_add(tables_ptr + HIST_DELTA * BINS, tl.sum(not_visible), sem="relaxed")
    tl.atomic_add(tables_ptr + HIST_DELTA_STORED * BINS, n_unchanged, sem="relaxed")

    if BF16:
        # Another bf16 value is further away than 1e-3 of both.
        tl.atomic_add(counts_ptr + COUNT_UNCHANGED_RTOL, n_unchanged, sem="relaxed")
        exact = stored - tl.load(work_ptr + WORK_INEXACT * BINS + bins)
        for k in range(NUM_LIMITS):
            limit = tl.load(params_ptr + PARAM_LIMITS + k)
            below = tl.sum(tl.where((bins << 16) < limit, exact, 0)) + tl.where(limit > 0, n_unchanged, 0)
            tl.atomic_add(counts_ptr + tl.load(params_ptr + PARAM_COUNTS + k), below, sem="relaxed")
        # A bf16 magnitude is t * 2^(e - 134), e at least 1; a stored delta is (t * 2^16 + low) * 2^(e - 150).
        e = tl.maximum(exponent, 1)
        t = (mantissa[None, :] + tl.where(exponent > 0, MANTISSAS, 0)[:, None]).to(tl.int64)
        low = tl.load(low_sums_ptr + LOW * BINS + bins)
        low_square = tl.load(low_sums_ptr + LOW_SQUARE * BINS + bins)
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
        return 512, None if torch.float64 in (base, trained) else MAXNREG
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
        copies = work_tables.num_copies(size, BINS.value * (4 * WORK_ROWS.value + 8 * LOW_ROWS.value))
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
            work.sum(0),
            None if low_sums is None else low_sums.sum(0),
            params,
            tables,
            counts,
            sums,
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
