"""`quantile` in Triton: the exact threshold by counting digits of magnitudes, 16 bits per pass, most significant first.

The order of the bits of magnitudes is the order of the magnitudes, so the threshold is found digit by digit: a pass
counts the next digit of the values whose upper digits equal the threshold's, inside and outside the mask, and a scan of
its 2^16 bins gives the digit. bf16 and fp16 take one pass, fp32 two, fp64 four, for all k together; counts are
integers, so the result is exact, and nothing is copied to the host between passes. Later passes count the few values
that share a digit with a threshold.

Contention. The first pass hits some 1,600 bins that hold 99.9 % of a weight matrix. A program counts most of the values
outside the mask in registers, and its other values in one of several copies of the table
(opdkernels/backends/triton/tables.py). Zeros, which may be most of a change, are counted in registers. A NaN counts as
the largest magnitude bits, beyond infinity.

Arithmetic: csrc/quantile/quantile.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from opdkernels.backends import gpu
from opdkernels.backends.triton import launch, tables
from opdkernels.backends.triton.numeric import magnitude_bits
from opdkernels.backends.triton.tables import WINDOW, add_to_tables, column_sums, flush_window, striped, window_around
from opdkernels.ops.quantile.gpu_common import select_by_digits
from opdkernels.ops.quantile.layout import DIGIT_BITS, DIGITS

TILE_BYTES, NUM_WARPS, MAXNREG = 4096, 4, 160  # two 16-byte loads per thread; three programs per multiprocessor
TABLE, TABLE_BITS = tl.constexpr(DIGITS), tl.constexpr(DIGIT_BITS)


@triton.jit
def magnitude_keys(x):
    """Bits of |x|; all bits set for a NaN, whose first digit may be that of infinity."""
    key = magnitude_bits(x)
    if x.dtype.primitive_bitwidth == 16:
        return key
    else:
        all_bits: tl.constexpr = (1 << (x.dtype.primitive_bitwidth - 1)) - 1
        return tl.where(x == x, key, all_bits)


@triton.jit
def load_mask_bits(mask_ptr, tile_start, n, TILE: tl.constexpr):
    """The mask bits of a tile, int32: a byte is read once for its eight values."""
    byte = tile_start // 8 + tl.arange(0, TILE // 8)
    eight = tl.load(mask_ptr + byte, byte * 8 < n, 0).to(tl.int32)
    return tl.reshape((eight[:, None] >> tl.arange(0, 8)[None, :]) & 1, [TILE])


@triton.jit
def count_tile(
    values_ptr,
    mask_ptr,
    prefixes_ptr,
    table_ptr,
    tile_start,
    n,
    shift,
    n_prefixes,
    window_start,
    zeros,
    masked_zeros,
    window,
    FIRST: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
):
    """Counts one tile; returns the counts of zeros and of the window, which stay in registers."""
    ROWS: tl.constexpr = 128 // values_ptr.dtype.element_ty.primitive_bitwidth
    i = tile_start + tl.arange(0, TILE)
    if TAIL:
        key = striped(magnitude_keys(tl.load(values_ptr + i, i < n, 0.0)), ROWS)
        inside = striped(i < n, ROWS)
    else:
        key = striped(magnitude_keys(tl.load(values_ptr + i)), ROWS)
        inside = tl.full([TILE], 1, tl.int1)
    zero = inside & (key == 0)
    zeros += column_sums(zero, ROWS)
    digit = (key >> shift).to(tl.int32) & (TABLE - 1)
    cell = digit
    if mask_ptr is not None:
        bit = striped(load_mask_bits(mask_ptr, tile_start, n, TILE), ROWS)
        masked_zeros += column_sums(zero & (bit > 0), ROWS)
        cell += bit << TABLE_BITS
    if FIRST:
        window = add_to_tables(window, window_start, table_ptr + cell, digit, key > 0, cell < TABLE, TAIL)
    else:
        upper = (key >> shift) >> TABLE_BITS
        for p in range(n_prefixes):
            prefix = tl.load(prefixes_ptr + p).to(upper.dtype)
            tl.atomic_add(table_ptr + 2 * p * TABLE + cell, 1, (upper == prefix) & (key > 0), sem="relaxed")
    return zeros, masked_zeros, window


@triton.jit(do_not_specialize=["n", "shift", "n_prefixes", "copies"])
def count_digits(
    values_ptr,  # [n]
    mask_ptr,  # uint8 [ceil(n / 8)] or None
    prefixes_ptr,  # int64 [n_prefixes]
    tables_ptr,  # int32 [copies, n_prefixes, 2, DIGITS], outside and inside the mask; added to
    n,
    shift,
    n_prefixes,
    copies,
    FIRST: tl.constexpr,
    TILE: tl.constexpr,
):
    """Counts, for each prefix, the digit at `shift` of the values whose upper digits equal it.

    FIRST: the uppermost digit, above which there are none, and of which most values outside the mask have one in the
    window.
    """
    program = tl.program_id(0).to(tl.int64)
    table_ptr = tables_ptr + (program % copies) * n_prefixes.to(tl.int64) * 2 * TABLE
    ROWS: tl.constexpr = 128 // values_ptr.dtype.element_ty.primitive_bitwidth
    zeros = tl.zeros([TILE // ROWS], tl.int32)
    masked_zeros = tl.zeros([TILE // ROWS], tl.int32)
    window = tl.zeros([WINDOW], tl.int32)
    window_start = 1
    if FIRST:
        i = program * TILE + tl.arange(0, TILE)
        key = magnitude_keys(tl.load(values_ptr + i, i < n, 0.0))
        window_start = window_around((key >> shift).to(tl.int32), TABLE)
    full, step = n.to(tl.int64) // TILE * TILE, tl.num_programs(0).to(tl.int64) * TILE
    for tile_start in range(program * TILE, full, step):
        zeros, masked_zeros, window = count_tile(
            values_ptr,
            mask_ptr,
            prefixes_ptr,
            table_ptr,
            tile_start,
            n,
            shift,
            n_prefixes,
            window_start,
            zeros,
            masked_zeros,
            window,
            FIRST,
            False,
            TILE,
        )
    if (full < n) & (full % step == program * TILE):
        zeros, masked_zeros, window = count_tile(
            values_ptr,
            mask_ptr,
            prefixes_ptr,
            table_ptr,
            full,
            n,
            shift,
            n_prefixes,
            window_start,
            zeros,
            masked_zeros,
            window,
            FIRST,
            True,
            TILE,
        )
    if FIRST:
        flush_window(window, window_start, table_ptr)
    n_masked = tl.sum(masked_zeros)
    n_others = tl.sum(zeros) - n_masked
    for p in range(n_prefixes):
        prefix = tl.load(prefixes_ptr + p)
        tl.atomic_add(table_ptr + 2 * p * TABLE, n_others, prefix == 0, sem="relaxed")
        tl.atomic_add(table_ptr + (2 * p + 1) * TABLE, n_masked, prefix == 0, sem="relaxed")


def digit_table(values: torch.Tensor, mask: torch.Tensor | None, prefixes: torch.Tensor, shift: int) -> torch.Tensor:
    """Counts of the digit at `shift`, int64 [len(prefixes), 2, DIGITS], outside and inside the mask."""
    n_prefixes, device, tile = len(prefixes), values.device, TILE_BYTES // values.itemsize
    total = torch.zeros(n_prefixes, 2, DIGITS, dtype=torch.int64, device=device)
    for start, size in gpu.slices(values.numel()):
        copies = tables.num_copies(size, n_prefixes * 2 * DIGITS * 4)
        work = torch.zeros(copies, n_prefixes, 2, DIGITS, dtype=torch.int32, device=device)
        launch.run(
            count_digits,
            (launch.num_programs(device, triton.cdiv(size, tile)),),
            values.narrow(0, start, size),
            gpu.mask_from(mask, start),
            prefixes,
            work,
            size,
            shift,
            n_prefixes,
            copies,
            num_warps=NUM_WARPS,
            maxnreg=MAXNREG,
            FIRST=shift == 8 * values.itemsize - DIGIT_BITS,
            TILE=tile,
        )
        total += work.sum(0)
    return total


def quantile(
    values: torch.Tensor, k: Sequence[int], largest: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator, for contiguous tensors on one device."""
    return select_by_digits(digit_table, values, k, largest, mask)
