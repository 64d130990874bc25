"""How kernels count into tables of many bins: most of a tile in registers, the rest by atomics in global memory.

Triton has no atomics on shared memory, and an atomic increment of a scattered bin in global memory is an access to the
L2 cache. `tl.histogram` stays in registers and shared memory, but its instructions grow with the number of bins. So a
program counts a window of WINDOW adjacent bins with it: around the mean of its first tile, 512 bins of bf16 hold 86 %
of a normal distribution. The rest is counted in tables in memory, of which there are as many copies as fit TABLE_BYTES,
since one copy would fill few of the cache's slices. Programs take the copies in turn; the launcher sums them.
"""

from __future__ import annotations

import triton
import triton.language as tl

TABLE_BYTES = 64 << 20  # of all copies, unless one alone is larger
COORDINATES_PER_COPY = 1 << 20  # at least: each copy is zeroed and summed
WINDOW = tl.constexpr(512)


def num_copies(size: int, bytes_per_copy: int) -> int:
    """Copies of the tables for a number of coordinates.

    >>> num_copies(1 << 28, 2 << 20), num_copies(1 << 22, 2 << 20), num_copies(100, 256 << 20)
    (32, 4, 1)
    """
    return max(1, min(TABLE_BYTES // bytes_per_copy, size // COORDINATES_PER_COPY))


@triton.jit
def striped(tile, ROWS: tl.constexpr):
    """A tile in another order: element i of each ROWS adjacent ones is among the i-th TILE // ROWS.

    With the elements of a 16-byte load as ROWS, an atomic operation on the result takes each element from the thread
    that loaded it. In the tile's own order it would redistribute them through shared memory, one per thread.
    """
    return tl.reshape(tl.trans(tl.reshape(tile, [tile.shape[0] // ROWS, ROWS])), [tile.shape[0]])


@triton.jit
def rows(tile, ROWS: tl.constexpr):
    """A striped tile as [ROWS, TILE // ROWS]: adjacent elements are a column."""
    return tl.reshape(tile, [ROWS, tile.shape[0] // ROWS])


@triton.jit
def column_sums(flags, ROWS: tl.constexpr):
    """How many flags of each column of a striped tile are set, int32 [TILE // ROWS]."""
    return tl.sum(rows(flags.to(tl.int32), ROWS), 0)


@triton.jit
def window_around(bins, BINS: tl.constexpr):
    """First bin of the window around the mean bin of a tile. Bin 0 is never in the window, and does not count here."""
    bins = bins.to(tl.int64)
    mean = tl.sum(bins) // tl.maximum(tl.sum((bins > 0).to(tl.int64)), 1)
    return tl.minimum(tl.maximum(mean - WINDOW // 2, 1), BINS - WINDOW).to(tl.int32)


@triton.jit
def add_to_tables(window, window_start, cell_ptr, bins, counted, in_row, TAIL: tl.constexpr):
    """The window's counts, int32 [WINDOW], after one is added for each counted element of a tile.

    Args:
        window: Counts of the bins from window_start on, of the row that most elements belong to.
        window_start: Its first bin.
        cell_ptr: Where each element is counted that is outside the window.
        bins: Bin of each element, int32.
        counted: Whether an element is counted.
        in_row: Whether it belongs to the window's row.
        TAIL: Less than a tile, for which a window would only cost registers: all are counted in memory.
    """
    if TAIL:
        tl.atomic_add(cell_ptr, 1, counted, sem="relaxed")
    else:
        place = bins - window_start
        inside = counted & in_row & (place.to(tl.uint32, bitcast=True) < WINDOW)
        tl.atomic_add(cell_ptr, 1, counted & (inside == 0), sem="relaxed")
        window += tl.histogram(place, WINDOW, mask=inside)
    return window


@triton.jit
def flush_window(window, window_start, row_ptr):
    """Adds the window's counts to its row in memory."""
    tl.atomic_add(row_ptr + window_start + tl.arange(0, WINDOW), window, window > 0, sem="relaxed")
