"""`quantile` in Triton: the exact cut by counting digits of magnitudes, sixteen bits a pass, most significant first.

Bits of magnitudes are in the order of magnitudes, so the cut is found digit by digit: a pass counts the next digit of those
values whose upper digits are the cut's, inside and outside the mask, and a scan of its 2^16 bins names the digit. bfloat16 and
fp16 take one pass, fp32 two, fp64 four, for all k together; counts are integers, so every figure is exact, and nothing comes
back to the host in between. Later passes count the few values that share a digit with a cut.

Contention. The first pass meets the 1,667 bins that hold 99.9 % of a weight matrix: programs count into up to eight copies of
the table in turn (see `delta`). Zeros, which may be most of a change, are counted in registers. A NaN is taken for the largest
pattern, beyond infinity.

Arithmetic: csrc/quantile/quantile.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from opdkernels.backends import gpu
from opdkernels.backends.triton import launch
from opdkernels.backends.triton.numeric import magnitude_bits
from opdkernels.ops.quantile.gpu_common import select_by_digits
from opdkernels.ops.quantile.layout import DIGITS

TILE = 2048
TABLE = tl.constexpr(DIGITS)
MAX_COPIES, VALUES_A_COPY = 8, 1 << 22


@triton.jit
def keys_of(x):
    """Bits of |x|; of a NaN, whose first digit may be infinity's, all of them."""
    key = magnitude_bits(x)
    if x.dtype.primitive_bitwidth == 16:
        return key
    everything: tl.constexpr = (1 << (x.dtype.primitive_bitwidth - 1)) - 1
    return tl.where(x == x, key, everything)


@triton.jit
def bits_of_mask(mask, tile_start, n, TILE: tl.constexpr):
    """The mask's bits of a tile, int32: a byte is read once for its eight values."""
    byte = tile_start // 8 + tl.arange(0, TILE // 8)
    eight = tl.load(mask + byte, byte * 8 < n, 0).to(tl.int32)
    return tl.reshape((eight[:, None] >> tl.arange(0, 8)[None, :]) & 1, [TILE])


@triton.jit
def count_tile(
    values,
    mask,
    prefixes,
    table,
    tile_start,
    n,
    shift,
    ranks,
    zeros,
    masked_zeros,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
):
    """Counts one tile; returns the counts of zeros, which stay in registers."""
    i = tile_start + tl.arange(0, TILE)
    if TAIL:
        inside = i < n
        key = keys_of(tl.load(values + i, inside, 0.0))
    else:
        inside = tl.full([TILE], 1, tl.int1)
        key = keys_of(tl.load(values + i))
    zero = inside & (key == 0)
    zeros += zero.to(tl.int32)
    digit = (key >> shift).to(tl.int32) & 0xFFFF
    if mask is not None:
        bit = bits_of_mask(mask, tile_start, n, TILE)
        masked_zeros += zero.to(tl.int32) * bit
        digit += bit << 16
    upper = (key >> shift) >> 16
    for rank in range(ranks):
        wanted = tl.load(prefixes + rank).to(upper.dtype)
        tl.atomic_add(table + 2 * rank * TABLE + digit, 1, (upper == wanted) & (key > 0), sem="relaxed")
    return zeros, masked_zeros


@triton.jit(do_not_specialize=["n", "shift", "ranks", "copies"])
def count_digits(values, mask, prefixes, tables, n, shift, ranks, copies, TILE: tl.constexpr):
    """Counts, for each rank, the digit at `shift` of the values whose upper digits are its prefix.

    prefixes int64 [ranks]; tables int32 [copies, ranks, 2, 2^16], outside and inside the mask. Programs take tiles in turn.
    """
    program = tl.program_id(0).to(tl.int64)
    table = tables + (program % copies) * ranks.to(tl.int64) * 2 * TABLE
    zeros = tl.zeros([TILE], tl.int32)
    masked_zeros = tl.zeros([TILE], tl.int32)
    whole, step = n.to(tl.int64) // TILE * TILE, tl.num_programs(0).to(tl.int64) * TILE
    for tile_start in range(program * TILE, whole, step):
        zeros, masked_zeros = count_tile(
            values, mask, prefixes, table, tile_start, n, shift, ranks, zeros, masked_zeros, False, TILE
        )
    if (whole < n) & (whole % step == program * TILE):
        zeros, masked_zeros = count_tile(
            values, mask, prefixes, table, whole, n, shift, ranks, zeros, masked_zeros, True, TILE
        )
    n_masked = tl.sum(masked_zeros)
    n_others = tl.sum(zeros) - n_masked
    for rank in range(ranks):
        wanted = tl.load(prefixes + rank)
        tl.atomic_add(table + 2 * rank * TABLE, n_others, wanted == 0, sem="relaxed")
        tl.atomic_add(table + (2 * rank + 1) * TABLE, n_masked, wanted == 0, sem="relaxed")


def digit_table(values: torch.Tensor, mask: torch.Tensor | None, prefixes: torch.Tensor, shift: int) -> torch.Tensor:
    """Counts of the digit at `shift`, int64 [ranks, 2, 2^16]."""
    ranks, device = len(prefixes), values.device
    total = torch.zeros(ranks, 2, DIGITS, dtype=torch.int64, device=device)
    for start, size in gpu.slices(values.numel()):
        copies = max(1, min(MAX_COPIES // ranks, size // VALUES_A_COPY))
        tables = torch.zeros(copies, ranks, 2, DIGITS, dtype=torch.int32, device=device)
        launch.run(
            count_digits,
            (launch.num_programs(device, triton.cdiv(size, TILE)),),
            values.narrow(0, start, size),
            gpu.mask_from(mask, start),
            prefixes,
            tables,
            size,
            shift,
            ranks,
            copies,
            TILE=TILE,
        )
        total += tables.sum(0)
    return total


def quantile(
    values: torch.Tensor, k: Sequence[int], largest: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator, for contiguous tensors of one device."""
    return select_by_digits(digit_table, values, k, largest, mask)
