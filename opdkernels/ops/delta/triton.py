"""`delta` in Triton: a tile of both tensors is read once and leaves everything that the tally holds.

Tables. A coordinate adds one to the joint table [group, |w|], where its group says how far it changed: 0 still, 1 moved below
what bf16 shows, 2 visible, and one more for every cut exceeded. SOURCE, MOVED and CHANGED are sums of it, made by `fold`.
Only what changed counts in DELTA, TRAINED and STORED, and a zero that stayed zero, the one bin that may hold half a tensor,
is counted in registers. So a coordinate costs one atomic increment, and three more where it changed.

Contention. The tables live in the L2 cache, whose atomic units take one increment a clock and address. 1,667 bins hold 99.9 %
of a weight matrix: no binade of a normal distribution holds more than a third, so the fullest of its 128 bins has 0.4 %. A
tile, then, meets a bin some four times at most, too seldom to be worth combining within the tile, but all multiprocessors
meet it at once. Programs therefore count into up to eight copies, in turn, each folded once at the end. What has few bins
(flags, thresholds, ULP distances) is counted within the tile, by ballots (tl.histogram), and kept in registers.

Sums are exact, so no order of programs can show. Of a bf16 pair they follow from the tables: W^2 and W'^2 from the counts of
their values, |delta| and delta^2 from STORED, whose bins hold the upper 16 bits of a difference, with the sums of the lower
16 bits and of their squares, which few coordinates have. Of other dtypes the tile is summed by `add_exactly`.

The arithmetic of a coordinate is that of csrc/delta/delta.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from opdkernels.backends import gpu
from opdkernels.backends.triton import launch
from opdkernels.backends.triton.numeric import (
    LIMB_LANES,
    LIMBS,
    add_exactly,
    add_units,
    bf16_bits_of,
    bits_of,
    carry,
    from_bf16_bits,
    magnitude_bits,
    widen,
)
from opdkernels.ops.delta.gpu_common import kernel_params

WARPS, REGISTERS = 4, 160  # registers a thread: three programs a multiprocessor
EXPONENTS = 2  # that a program of `fold` takes: 128 programs
MAX_COPIES, COORDINATES_A_COPY = 8, 1 << 22  # zeroing and folding a copy costs as much as counting some millions

BINS, INFINITE = tl.constexpr(1 << 15), tl.constexpr(0x7F80)
MANTISSAS = tl.constexpr(128)  # bins of one exponent, of one scale

# Work tables: the joint ones by group, then those of what changed.
STILL, MOVED, VISIBLE, GROUPS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(7)
WORK_DELTA, WORK_TRAINED, WORK_STORED, WORK = tl.constexpr(7), tl.constexpr(8), tl.constexpr(9), 10
LOW, LOW_SQUARE, LOWS = tl.constexpr(0), tl.constexpr(1), 2

# Flags of a coordinate, counted together.
FLAG_NONFINITE, FLAG_EQUAL, FLAG_ETA, FLAG_ZERO, FLAGS = (tl.constexpr(x) for x in (1, 2, 4, 8, 16))

# Rules (`kernel_params`): another cut or threshold compiles nothing.
CUT, LIMIT, SLOT, LIMITS, LIMIT_LANES = (tl.constexpr(x) for x in (0, 4, 14, 10, 16))

# The tally, as opdkernels/ops/delta/__init__.py lays it out.
T_SOURCE, T_DELTA, T_TRAINED, T_MOVED, T_STORED, T_CHANGED = (tl.constexpr(x) for x in range(6))
C_NUMEL, C_NONFINITE, C_EQUAL, C_ETA, C_LT, C_LE, C_ULP = (tl.constexpr(x) for x in (0, 1, 2, 3, 4, 9, 14))
ULP_REACH, ULP_BINS, ULP_LANES = tl.constexpr(17), tl.constexpr(35), tl.constexpr(64)


@triton.jit
def ordered(pattern):
    """Patterns in the order of their values, +0 and -0 both 0."""
    magnitude = pattern & 0x7FFF
    return tl.where((pattern & 0x8000) != 0, -magnitude, magnitude)


@triton.jit
def same_bits(a, b, x, y):
    """Equal patterns; of two dtypes after widening, where a NaN keeps no payload to compare and so equals nothing."""
    if a.dtype == b.dtype:
        return bits_of(a) == bits_of(b)
    return (bits_of(x) == bits_of(y)) & (x == x)


@triton.jit
def within_rtol(x, y, stored):
    """|w - w'| <= 1e-3 max(|w|, |w'|), the factor rounded to the dtype of the comparison."""
    factor = tl.full([1], 1e-3, x.dtype)
    return stored <= factor * tl.maximum(tl.abs(x), tl.abs(y))


@triton.jit
def rank_among(size, limits):
    """How many of the limits, in order, a magnitude reaches."""
    rank = tl.zeros(size.shape, tl.int32)
    for k in tl.static_range(LIMITS):
        rank += (size >= tl.load(limits + k)).to(tl.int32)
    return rank


@triton.jit
def halves(tile):
    """The even and the odd elements of a tile: a thread that loaded them side by side keeps them."""
    return tl.split(tl.reshape(tile, [tile.shape[0] // 2, 2]))


@triton.jit
def packed(pairs):
    """Bits of eight coordinates in a byte, the first lowest, of two bits of neighbours each."""
    places = 2 * tl.arange(0, 4)[None, :]
    return tl.sum(tl.reshape(pairs, [pairs.shape[0] // 4, 4]) << places, 1).to(tl.uint8)


@triton.jit
def count_half(
    a, b, inside, work, low_sums, params, flags, ranks, ulps, largest, limbs, WIDE: tl.constexpr, BF16: tl.constexpr
):
    """Counts coordinates: tables in memory, the rest in what is returned: their change bits, flags, ranks, ulps, largest, limbs."""
    w, v = bf16_bits_of(a), bf16_bits_of(b)
    abs_w, abs_v = w & 0x7FFF, v & 0x7FFF
    visible = bf16_bits_of(from_bf16_bits(v) - from_bf16_bits(w)) & 0x7FFF
    finite = (abs_w < INFINITE) & (abs_v < INFINITE) & (visible < INFINITE)
    counted = finite & inside
    steps = tl.minimum(tl.maximum(ordered(v) - ordered(w), -ULP_REACH), ULP_REACH) + ULP_REACH
    ulps += tl.histogram(tl.where(counted, steps, ULP_LANES - 1), ULP_LANES)

    x, y = widen(a, WIDE), widen(b, WIDE)
    size = tl.where(counted, magnitude_bits(y - x), 0)  # bits of the stored |delta|
    stored = size.to(WIDE, bitcast=True)
    moved, shown = size > 0, counted & (visible > 0)
    largest = tl.maximum(largest, size)
    ranks += tl.histogram(tl.where(counted, rank_among(size, params + LIMIT), LIMIT_LANES - 1), LIMIT_LANES)

    group = moved.to(tl.int32) + shown.to(tl.int32)
    for k in tl.static_range(4):
        group += (shown & (visible > tl.load(params + CUT + k))).to(tl.int32)
    cell = group * BINS + abs_w
    flag = (inside & (finite == 0)).to(tl.int32) * FLAG_NONFINITE
    flag += (inside & same_bits(a, b, x, y)).to(tl.int32) * FLAG_EQUAL
    flag += (counted & within_rtol(x, y, stored)).to(tl.int32) * FLAG_ETA
    flag += (counted & (cell == 0)).to(tl.int32) * FLAG_ZERO
    flags += tl.histogram(flag, FLAGS)

    tl.atomic_add(work + cell, 1, counted & (cell > 0), sem="relaxed")
    tl.atomic_add(work + WORK_DELTA * BINS + visible, 1, shown, sem="relaxed")
    tl.atomic_add(work + WORK_TRAINED * BINS + abs_v, 1, shown, sem="relaxed")
    narrow = magnitude_bits(stored.to(tl.float32))
    top = narrow >> 16
    tl.atomic_add(work + WORK_STORED * BINS + top, 1, moved, sem="relaxed")
    if BF16:
        low = (narrow & 0xFFFF).to(tl.int64)
        tl.atomic_add(low_sums + LOW * BINS + top, low, low > 0, sem="relaxed")
        tl.atomic_add(low_sums + LOW_SQUARE * BINS + top, low * low, low > 0, sem="relaxed")
    else:
        x, y, d = tl.where(counted, x, 0).to(tl.float64), tl.where(counted, y, 0).to(tl.float64), stored.to(tl.float64)
        limbs = (
            add_exactly(x * x, limbs[0]),
            add_exactly(y * y, limbs[1]),
            add_exactly(d * d, limbs[2]),
            add_exactly(d, limbs[3]),
        )
    return shown & (visible > tl.load(params + CUT)), flags, ranks, ulps, largest, limbs


@triton.jit
def count_tile(
    base,
    trained,
    mask,
    work,
    low_sums,
    params,
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
    """Counts one tile, in halves: eight bf16 coordinates a thread, what a 16-byte load brings, would not fit its registers."""
    i = tile_start + tl.arange(0, TILE)
    if TAIL:
        inside = i < n
        a, b = tl.load(base + i, inside, 0.0), tl.load(trained + i, inside, 0.0)
    else:
        inside = tl.full([TILE], 1, tl.int1)
        a, b = tl.load(base + i), tl.load(trained + i)
    even_a, odd_a = halves(a)
    even_b, odd_b = halves(b)
    even_inside, odd_inside = halves(inside)
    pairs = tl.zeros([TILE // 2], tl.int32)
    for part in range(
        2
    ):  # a loop, not two calls, which the compiler would interleave; what it carries must not change names
        changed, flags, ranks, ulps, largest, limbs = count_half(
            tl.where(part == 0, even_a, odd_a),
            tl.where(part == 0, even_b, odd_b),
            tl.where(part == 0, even_inside, odd_inside),
            work,
            low_sums,
            params,
            flags,
            ranks,
            ulps,
            largest,
            limbs,
            WIDE,
            BF16,
        )
        pairs |= changed.to(tl.int32) << part
    if mask is not None:
        byte = tile_start // 8 + tl.arange(0, TILE // 8)
        if TAIL:
            tl.store(mask + byte, packed(pairs), byte * 8 < n)
        else:
            tl.store(mask + byte, packed(pairs))
    return flags, ranks, ulps, largest, limbs


@triton.jit
def flags_with(flags, FLAG: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, FLAGS) & FLAG) != 0, flags, 0))


@triton.jit(do_not_specialize=["n", "copies"])
def count(
    base,
    trained,
    mask,
    work,
    low_sums,
    params,
    counts,
    sums,
    maximum,
    n,
    copies,
    WIDE: tl.constexpr,
    BF16: tl.constexpr,
    TILE: tl.constexpr,
):
    """Programs take tiles in turn. work int32 [copies, 10, 32768], low_sums int64 [copies, 2, 32768]; the rest as the tally."""
    program = tl.program_id(0).to(tl.int64)
    copy = program % copies
    work += copy * (WORK_STORED + 1) * BINS
    if BF16:
        low_sums += copy * (LOW_SQUARE + 1) * BINS
    flags = tl.zeros([FLAGS], tl.int32)
    ranks = tl.zeros([LIMIT_LANES], tl.int32)
    ulps = tl.zeros([ULP_LANES], tl.int32)
    largest = tl.zeros([TILE // 2], tl.int64 if tl.float64 == WIDE else tl.int32)
    zero = tl.zeros([LIMB_LANES], tl.int64)
    limbs = (zero, zero, zero, zero)

    whole, step = n.to(tl.int64) // TILE * TILE, tl.num_programs(0).to(tl.int64) * TILE
    for tile_start in range(program * TILE, whole, step):
        flags, ranks, ulps, largest, limbs = count_tile(
            base,
            trained,
            mask,
            work,
            low_sums,
            params,
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
    if (whole < n) & (whole % step == program * TILE):
        flags, ranks, ulps, largest, limbs = count_tile(
            base,
            trained,
            mask,
            work,
            low_sums,
            params,
            whole,
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
        tl.atomic_add(counts + C_NUMEL, n.to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + C_NONFINITE, flags_with(flags, FLAG_NONFINITE).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + C_EQUAL, flags_with(flags, FLAG_EQUAL).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + C_ETA, flags_with(flags, FLAG_ETA).to(tl.int64), sem="relaxed")
    tl.atomic_add(work, flags_with(flags, FLAG_ZERO), sem="relaxed")
    lane = tl.arange(0, LIMIT_LANES)
    slot = tl.load(params + SLOT + lane, lane < LIMITS, 0)
    tl.atomic_add(
        counts + slot, tl.cumsum(ranks).to(tl.int64), lane < LIMITS, sem="relaxed"
    )  # below a limit: of lower ranks
    lane = tl.arange(0, ULP_LANES)
    tl.atomic_add(counts + C_ULP + lane, ulps.to(tl.int64), lane < ULP_BINS, sem="relaxed")
    size = tl.max(largest).to(WIDE, bitcast=True).to(tl.float64)
    tl.atomic_max(maximum, bits_of(size), sem="relaxed")
    if not BF16:
        lane = tl.arange(0, LIMB_LANES)
        for row in tl.static_range(4):
            tl.atomic_add(sums + row * LIMBS + lane, limbs[row], limbs[row] != 0, sem="relaxed")


@triton.jit
def copies_sum(table, cells, copies, STRIDE: tl.constexpr):
    """A table's cells, summed over its copies, int64."""
    total = tl.zeros(cells.shape, tl.int64)
    for copy in range(copies):
        total += tl.load(table + copy * STRIDE + cells)
    return total


@triton.jit
def add_to(tables, row, bins, count):
    tl.atomic_add(tables + row * BINS + bins, count, count != 0, sem="relaxed")


@triton.jit(do_not_specialize=["copies", "threshold_bits"])
def fold(work, low_sums, tables, sums, copies, threshold_bits, BF16: tl.constexpr, EXPONENTS: tl.constexpr):
    """Adds the work tables to the tally's, and a bf16 pair's sums. A row of its tile is one exponent: one scale."""
    exponent = tl.program_id(0) * EXPONENTS + tl.arange(0, EXPONENTS)
    mantissa = tl.arange(0, MANTISSAS)
    bins = exponent[:, None] * MANTISSAS + mantissa[None, :]
    stride: tl.constexpr = (WORK_STORED + 1) * BINS

    base = tl.zeros([EXPONENTS, MANTISSAS], tl.int64)
    moved, unseen = base, base
    for k in tl.static_range(GROUPS):
        group = GROUPS - 1 - k
        count = copies_sum(work, bins + group * BINS, copies, stride)
        base += count  # of this group and those above
        if group > VISIBLE:
            if group - VISIBLE <= threshold_bits:
                add_to(tables, T_CHANGED + group - VISIBLE - 1, bins, base)
        elif group < VISIBLE:
            unseen += count
            if group == MOVED:
                add_to(tables, T_MOVED, bins, base)
                moved = base
    trained = copies_sum(work, bins + WORK_TRAINED * BINS, copies, stride)
    stored = copies_sum(work, bins + WORK_STORED * BINS, copies, stride)
    add_to(tables, T_SOURCE, bins, base)
    add_to(tables, T_DELTA, bins, copies_sum(work, bins + WORK_DELTA * BINS, copies, stride))
    add_to(tables, T_TRAINED, bins, trained)
    add_to(tables, T_STORED, bins, stored)
    tl.atomic_add(tables + T_DELTA * BINS, tl.sum(unseen), sem="relaxed")
    tl.atomic_add(tables + T_STORED * BINS, tl.sum(base - moved), sem="relaxed")

    if BF16:
        # A bf16 magnitude is t * 2^(e - 134), e at least 1; a stored delta is (t * 2^16 + low) * 2^(e - 150).
        e = tl.maximum(exponent, 1)
        t = (mantissa[None, :] + tl.where(exponent > 0, MANTISSAS, 0)[:, None]).to(tl.int64)
        low = copies_sum(low_sums, bins + LOW * BINS, copies, (LOW_SQUARE + 1) * BINS)
        low_square = copies_sum(low_sums, bins + LOW_SQUARE * BINS, copies, (LOW_SQUARE + 1) * BINS)
        square: tl.constexpr = 1074 - 2 * 134
        square_low: tl.constexpr = 1074 - 2 * 150
        add_units(sums, tl.sum(base * t * t, 1), 2 * e + square)
        add_units(sums + LIMBS, tl.sum((base - moved + trained) * t * t, 1), 2 * e + square)
        add_units(sums + 2 * LIMBS, tl.sum(stored * t * t, 1), 2 * e + square_low + 32)
        add_units(sums + 2 * LIMBS, tl.sum(low * t, 1), 2 * e + square_low + 17)
        add_units(sums + 2 * LIMBS, tl.sum(low_square, 1), 2 * e + square_low)
        add_units(sums + 3 * LIMBS, tl.sum(stored * t, 1), e + 1074 - 134)
        add_units(sums + 3 * LIMBS, tl.sum(low, 1), e + 1074 - 150)


def launch_shape(base: torch.dtype, trained: torch.dtype) -> tuple[int, int | None]:
    """Coordinates of a tile, so many that either side is loaded 16 bytes wide, and the bound of registers a thread."""
    if min(base.itemsize, trained.itemsize) > 2:
        return 512, REGISTERS
    return 1024, REGISTERS if base == trained == torch.bfloat16 else None


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
    """The operator, for contiguous tensors of one device."""
    device, n = base.device, base.numel()
    wide = torch.float64 in (base.dtype, trained.dtype)
    bf16 = base.dtype == trained.dtype == torch.bfloat16
    tile, registers = launch_shape(base.dtype, trained.dtype)
    params = torch.tensor(
        kernel_params(threshold_bits, thresholds, np.float64 if wide else np.float32),
        dtype=torch.int64 if wide else torch.int32,
        device=device,
    )
    base, trained = base.view(-1), trained.view(-1)
    for start, size in gpu.slices(n):
        copies = max(1, min(MAX_COPIES, size // COORDINATES_A_COPY))
        work = torch.zeros(copies, WORK, BINS.value, dtype=torch.int32, device=device)
        low_sums = torch.zeros(copies, LOWS, BINS.value, dtype=torch.int64, device=device) if bf16 else None
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
            num_warps=WARPS,
            maxnreg=registers,
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
        launch.run(carry, (1,), sums, num_warps=1, ROWS=4)
