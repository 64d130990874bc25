"""`patch` in Triton: one pass over both tensors finds the changes, a second compresses them; one pass scatters them.

`compare` reads a tile of both tensors and writes its change bits, their number, and the sums of its bytes for the
digests. Prefix sums over the tiles then give, on the device, where the values of each tile and the positions of each
block begin: nothing is copied to the host. `compress` reads the change bits, and the values of tiles with changes, and
writes positions and values consecutively.

In the other direction, `decode` validates the positions of a block and converts either form to change bits; `restore`
reads these, the base and the values, and writes the trained tensor and the sums for its digests. Both do nothing if a
length is wrong, and `restore` does nothing if a block is invalid, so no address is computed from unchecked data.

Digests. XXH3 adds the 16 stripes of a unit of 1,024 bytes in any order, and scrambles its state between units. The
tiles are reduced to one sum per unit (64 bytes for each 1,024), and `finish` combines the units of a block in order,
for many blocks in parallel.

The arithmetic per coordinate and per word is that of csrc/patch/patch.h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from opdkernels.backends import gpu
from opdkernels.backends.triton import launch
from opdkernels.backends.triton.numeric import bits_set
from opdkernels.ops.patch import layout
from opdkernels.ops.patch.gpu_common import first_unfit, position_bytes, starts_of, status_of
from opdkernels.ops.patch.layout import blocks_of
from opdkernels.ops.quantile.triton import load_mask_bits

TILE_BYTES = 1 << 12  # of each tensor per tile
CHUNK = 1024  # offsets that are checked at a time
ROWS = 4  # blocks per program of `finish`, eight words each per lane
STEPS = 8  # units that `finish` loads per iteration

BLOCK, VALID = tl.constexpr(layout.BLOCK), tl.constexpr(layout.VALID)
HASH_UNIT, UNIT_WORDS, STRIPES = tl.constexpr(layout.HASH_UNIT), tl.constexpr(128), tl.constexpr(16)
HASH_PRIME32_1, HASH_PRIME64_1 = tl.constexpr(layout.HASH_PRIME32_1), tl.constexpr(layout.HASH_PRIME64_1)
HASH_PRIME64_2, HASH_AVALANCHE = tl.constexpr(layout.HASH_PRIME64_2), tl.constexpr(layout.HASH_AVALANCHE)
ALL_ONES = tl.constexpr((1 << 64) - 1)

# Rows of the key table, eight words each: the keys of the 16 stripes, of the last stripe of a block, of the scramble,
# of the low and the high word of the digest, and the initial state.
SECRET_OFFSETS = (*range(0, 128, 8), layout.HASH_LAST, layout.HASH_SCRAMBLE, layout.HASH_LOW, layout.HASH_HIGH)
LAST_STRIPE, SCRAMBLE, LOW, HIGH, INITIAL_STATE = (tl.constexpr(x) for x in range(16, 21))


@triton.jit
def words_of(tile):
    """Returns the bytes of a tile as little-endian uint64 words; each stays in the thread that loaded its bytes."""
    width: tl.constexpr = tile.dtype.primitive_bitwidth
    if width == 64:
        return tile.to(tl.uint64, bitcast=True)
    else:
        per_word: tl.constexpr = 64 // width
        values = (tile.to(tl.int64) & ((1 << width) - 1)).to(tl.uint64, bitcast=True)
        shifts = (width * tl.arange(0, per_word)).to(tl.uint64)
        return tl.sum(tl.reshape(values, [values.shape[0] // per_word, per_word]) << shifts[None, :], 1)


@triton.jit
def load_words(table_ptr, index):
    """Loads words of the key table, int64 [21, 8], as uint64."""
    return tl.load(table_ptr + index).to(tl.uint64, bitcast=True)


@triton.jit
def load_keys(table_ptr):
    """Loads the keys of the even and of the odd words of a unit, then those of the last unit of a block.

    Returns four uint64 [STRIPES, 4]. table_ptr: int64 [21, 8].
    """
    stripe, pair = tl.arange(0, STRIPES)[:, None], tl.arange(0, 4)[None, :]
    even = stripe * 8 + 2 * pair
    even_last = tl.where(stripe == STRIPES - 1, LAST_STRIPE, stripe) * 8 + 2 * pair
    return (
        load_words(table_ptr, even),
        load_words(table_ptr, even + 1),
        load_words(table_ptr, even_last),
        load_words(table_ptr, even_last + 1),
    )


@triton.jit
def mixed(word, key):
    """The product of XXH3: the low and the high half of word ^ key, multiplied."""
    keyed = word ^ key
    return (keyed & 0xFFFFFFFF) * (keyed >> 32)


@triton.jit
def sum_units(
    tile,
    keys,  # of `load_keys`
    sums_ptr,  # int64 [n_units, 8], output
    start,  # first coordinate of the tile
    n_units,
):
    """Stores what each unit of a tile adds to the state of its block."""
    width: tl.constexpr = tile.dtype.primitive_bitwidth // 8
    tile_words = words_of(tile)
    units: tl.constexpr = tile_words.shape[0] // UNIT_WORDS
    even, odd = tl.split(tl.reshape(tile_words, [units, STRIPES, 4, 2]))
    unit = start * width // HASH_UNIT + tl.arange(0, units)
    is_last = ((unit + 1) % (BLOCK * width // HASH_UNIT) == 0) | (unit == n_units - 1)
    is_last = is_last[:, None, None]
    even_key = tl.where(is_last, keys[2][None, :, :], keys[0][None, :, :])
    odd_key = tl.where(is_last, keys[3][None, :, :], keys[1][None, :, :])
    at = unit[:, None] * 8 + 2 * tl.arange(0, 4)[None, :]
    inside = unit[:, None] < n_units
    tl.store(sums_ptr + at, tl.sum(mixed(even, even_key) + odd, 1).to(tl.int64, bitcast=True), inside)
    tl.store(sums_ptr + at + 1, tl.sum(mixed(odd, odd_key) + even, 1).to(tl.int64, bitcast=True), inside)


@triton.jit
def load_tile(data_ptr, start, n, TAIL: tl.constexpr, TILE: tl.constexpr):
    """Loads the tile that begins at coordinate `start`; zeros from coordinate n."""
    i = start + tl.arange(0, TILE)
    if TAIL:
        return tl.load(data_ptr + i, i < n, 0)
    else:
        return tl.load(data_ptr + i)


@triton.jit
def compare_tile(
    base_ptr,
    trained_ptr,
    keys,
    mask_ptr,
    counts_ptr,
    sums_ptr,
    start,
    n,
    n_units,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the change bits of one tile, their number, and its sums. Pointers as in `compare`."""
    w, v = load_tile(base_ptr, start, n, TAIL, TILE), load_tile(trained_ptr, start, n, TAIL, TILE)
    differ = (w != v).to(tl.int32)
    bytes_of_bits = tl.sum(tl.reshape(differ, [TILE // 8, 8]) << tl.arange(0, 8)[None, :], 1)
    tl.store(mask_ptr + start // 8 + tl.arange(0, TILE // 8), bytes_of_bits.to(tl.uint8))
    tl.store(counts_ptr + start // TILE, tl.sum(differ))
    sum_units(w, keys, sums_ptr, start, n_units)
    sum_units(v, keys, sums_ptr + 8 * n_units, start, n_units)


@triton.jit(do_not_specialize=["n", "n_units"])
def compare(
    base_ptr,  # integers [n]
    trained_ptr,  # as base
    table_ptr,  # int64 [21, 8]
    mask_ptr,  # uint8 [blocks * BLOCK / 8], output
    counts_ptr,  # int32 [tiles], output
    sums_ptr,  # int64 [2, n_units, 8], output
    n,
    n_units,
    TILE: tl.constexpr,
):
    """Compares both tensors. Each program takes every num_programs-th tile."""
    keys = load_keys(table_ptr)
    n, n_units = n.to(tl.int64), n_units.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * TILE
    tail_start, step = n // TILE * TILE, tl.num_programs(0).to(tl.int64) * TILE
    for start in range(first, tail_start, step):
        compare_tile(base_ptr, trained_ptr, keys, mask_ptr, counts_ptr, sums_ptr, start, n, n_units, False, TILE)
    if (tail_start < n) & (tail_start % step == first):
        compare_tile(base_ptr, trained_ptr, keys, mask_ptr, counts_ptr, sums_ptr, tail_start, n, n_units, True, TILE)


@triton.jit(do_not_specialize=["n", "n_units"])
def digest(
    values_ptr,  # integers [n]
    table_ptr,  # int64 [21, 8]
    sums_ptr,  # int64 [n_units, 8], output
    n,
    n_units,
    TILE: tl.constexpr,
):
    """Sums the units of one tensor. Each program takes every num_programs-th tile."""
    keys = load_keys(table_ptr)
    n, n_units = n.to(tl.int64), n_units.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * TILE
    tail_start, step = n // TILE * TILE, tl.num_programs(0).to(tl.int64) * TILE
    for start in range(first, tail_start, step):
        sum_units(load_tile(values_ptr, start, n, False, TILE), keys, sums_ptr, start, n_units)
    if (tail_start < n) & (tail_start % step == first):
        sum_units(load_tile(values_ptr, tail_start, n, True, TILE), keys, sums_ptr, tail_start, n_units)


@triton.jit
def block_size(block, n):
    """Returns the number of coordinates of a block."""
    return tl.minimum(n - block * BLOCK, BLOCK).to(tl.int32)


@triton.jit
def compress_tile(
    base_ptr,
    trained_ptr,
    mask_ptr,
    tile_starts_ptr,
    counts_ptr,
    starts_ptr,
    positions_ptr,
    values_ptr,
    start,
    n,
    DIFFERENCE: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the positions and values of one tile. Pointers as in `compress`."""
    block, tile = start // BLOCK, start // TILE
    before, after = tl.load(tile_starts_ptr + tile), tl.load(tile_starts_ptr + tile + 1)
    mask_bytes = (block_size(block, n) + 7) // 8
    listed = 2 * tl.load(counts_ptr + block) < mask_bytes
    positions_ptr += tl.load(starts_ptr + block)
    if listed == 0:
        byte = (start - block * BLOCK) // 8 + tl.arange(0, TILE // 8)
        tl.store(positions_ptr + byte, tl.load(mask_ptr + block * (BLOCK // 8) + byte), byte < mask_bytes)
    if after > before:
        bits = load_mask_bits(mask_ptr, start, n, TILE)
        rank = tl.cumsum(bits) - bits
        stored = load_tile(trained_ptr, start, n, TAIL, TILE)
        if DIFFERENCE:
            stored -= load_tile(base_ptr, start, n, TAIL, TILE)
        tl.store((values_ptr + before) + rank, stored, bits > 0)
        if listed:
            offset = start - block * BLOCK + tl.arange(0, TILE)
            at = positions_ptr + 2 * (before - tl.load(tile_starts_ptr + block * (BLOCK // TILE))) + 2 * rank
            tl.store(at, (offset & 0xFF).to(tl.uint8), bits > 0)
            tl.store(at + 1, (offset >> 8).to(tl.uint8), bits > 0)


@triton.jit(do_not_specialize=["n"])
def compress(
    base_ptr,  # integers [n]
    trained_ptr,  # as base
    mask_ptr,  # uint8 [blocks * BLOCK / 8], change bits
    tile_starts_ptr,  # int64 [tiles + 1], first value of each tile
    counts_ptr,  # int32 [blocks]
    starts_ptr,  # int64 [blocks + 1], first byte of the positions of each block
    positions_ptr,  # uint8 [bytes], output
    values_ptr,  # as base, output
    n,
    DIFFERENCE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes positions and values of all changes. Each program takes every num_programs-th tile."""
    n = n.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * TILE
    tail_start, step = n // TILE * TILE, tl.num_programs(0).to(tl.int64) * TILE
    for start in range(first, tail_start, step):
        compress_tile(
            base_ptr,
            trained_ptr,
            mask_ptr,
            tile_starts_ptr,
            counts_ptr,
            starts_ptr,
            positions_ptr,
            values_ptr,
            start,
            n,
            DIFFERENCE,
            False,
            TILE,
        )
    if (tail_start < n) & (tail_start % step == first):
        compress_tile(
            base_ptr,
            trained_ptr,
            mask_ptr,
            tile_starts_ptr,
            counts_ptr,
            starts_ptr,
            positions_ptr,
            values_ptr,
            tail_start,
            n,
            DIFFERENCE,
            True,
            TILE,
        )


@triton.jit
def merged(state, key, start):
    """Returns one word of the digest per row of the state, uint64 [rows, 8]: the last step of XXH3."""
    a, b = tl.split(tl.reshape(state ^ key[None, :], [state.shape[0], 4, 2]))
    total = tl.sum((a * b) ^ tl.umulhi(a, b), 1) + start
    total = (total ^ (total >> 37)) * HASH_AVALANCHE
    return (total ^ (total >> 32)).to(tl.int64, bitcast=True)


@triton.jit(do_not_specialize=["rows", "n_blocks", "n_units"])
def finish(
    sums_ptr,  # int64 [tensors, n_units, 8]
    table_ptr,  # int64 [21, 8]
    digests_ptr,  # int64 [tensors, n_blocks, 2], output
    rows,  # tensors * n_blocks
    n_blocks,
    n_units,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Computes the digests of the blocks of one or two tensors from their sums; UNITS is the units per full block."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    side, block = row // n_blocks, row % n_blocks
    units = tl.where(inside, tl.minimum(n_units - block * UNITS, UNITS), 0)
    word = tl.arange(0, 8)
    sums_ptr += ((side * n_units + block * UNITS) * 8)[:, None] + word[None, :]
    scramble = load_words(table_ptr, SCRAMBLE * 8 + word)[None, :]
    state = tl.broadcast_to(load_words(table_ptr, INITIAL_STATE * 8 + word)[None, :], [ROWS, 8])
    for first in range(0, tl.minimum(n_units, UNITS), STEPS):
        for step in tl.static_range(STEPS):
            unit = first + step
            state += tl.load(sums_ptr + unit * 8, (unit < units)[:, None], 0).to(tl.uint64, bitcast=True)
            state = tl.where((unit < units - 1)[:, None], (state ^ (state >> 47) ^ scramble) * HASH_PRIME32_1, state)
    size = (units * HASH_UNIT).to(tl.uint64)
    low = merged(state, load_words(table_ptr, LOW * 8 + word), size * HASH_PRIME64_1)
    high = merged(state, load_words(table_ptr, HIGH * 8 + word), (size * HASH_PRIME64_2) ^ ALL_ONES)
    tl.store(digests_ptr + 2 * row, low, inside)
    tl.store(digests_ptr + 2 * row + 1, high, inside)


@triton.jit
def load_offsets(positions_ptr, k, some):
    """Loads the k-th offsets of a block, two bytes each, where `some`; others are 0."""
    low, high = tl.load(positions_ptr + 2 * k, some, 0), tl.load(positions_ptr + 2 * k + 1, some, 0)
    return low.to(tl.int32) | (high.to(tl.int32) << 8)


@triton.jit
def decode_offsets(positions_ptr, words_ptr, tile_counts_ptr, size, count, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """Converts the offsets of a block to change bits and counts them per tile. Returns whether they are valid.

    positions_ptr: uint8 [2 * count]; words_ptr: int32 [BLOCK / 32], zeros; tile_counts_ptr: int32 [BLOCK / TILE].
    """
    tiles: tl.constexpr = BLOCK // TILE
    totals = tl.zeros([2 * tiles], tl.int32)
    wrong = tl.zeros([CHUNK], tl.int32)
    for first in range(0, count, CHUNK):
        k = first + tl.arange(0, CHUNK)
        offset = load_offsets(positions_ptr, k, k < count)
        previous = tl.where(k > 0, load_offsets(positions_ptr, k - 1, (k > 0) & (k < count)), -1)
        inside = (k < count) & (offset < size)
        wrong |= ((k < count) & ((offset <= previous) | (offset >= size))).to(tl.int32)
        tl.atomic_or(words_ptr + (offset >> 5), 1 << (offset & 31), inside, sem="relaxed")
        totals += tl.histogram(tl.where(inside, offset // TILE, tiles), 2 * tiles)
    lane = tl.arange(0, 2 * tiles)
    tl.store(tile_counts_ptr + lane, totals, lane < tiles)
    return tl.max(wrong) == 0


@triton.jit
def decode_mask(positions_ptr, mask_ptr, tile_counts_ptr, size, count, TILE: tl.constexpr):
    """Copies the mask of a block and counts its bits per tile. Returns whether it is valid.

    positions_ptr: uint8 [(size + 7) / 8]; mask_ptr: uint8 [BLOCK / 8]; tile_counts_ptr: int32 [BLOCK / TILE].
    """
    total = 0
    wrong = tl.zeros([TILE // 8], tl.int32)
    for tile in range(BLOCK // TILE):
        byte = tile * (TILE // 8) + tl.arange(0, TILE // 8)
        eight = tl.load(positions_ptr + byte, 8 * byte < size, 0)
        tl.store(mask_ptr + byte, eight)
        bits = eight.to(tl.int32)
        wrong |= bits >> tl.minimum(tl.maximum(size - 8 * byte, 0), 8)
        tile_total = tl.sum(bits_set(bits))
        tl.store(tile_counts_ptr + tile, tile_total)
        total += tile_total
    return (total == count) & (tl.max(wrong) == 0)


@triton.jit(do_not_specialize=["n"])
def decode(
    counts_ptr,  # int32 [blocks]
    starts_ptr,  # int64 [blocks + 1], first byte of the positions of each block
    positions_ptr,  # uint8 [bytes]
    fits_ptr,  # int64 [1], VALID if all counts and lengths are possible
    mask_ptr,  # uint8 [blocks * BLOCK / 8], output; zeros before
    words_ptr,  # int32 [blocks * BLOCK / 32], the same memory as the mask
    tile_counts_ptr,  # int32 [tiles], output
    bad_ptr,  # int64 [1], lowered to the first invalid block
    n,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Validates the positions of one block per program; writes its change bits and their number per tile."""
    block = tl.program_id(0).to(tl.int64)
    if tl.load(fits_ptr) == VALID:
        size, count = block_size(block, n.to(tl.int64)), tl.load(counts_ptr + block)
        positions_ptr += tl.load(starts_ptr + block)
        tile_counts_ptr += block * (BLOCK // TILE)
        if 2 * count < (size + 7) // 8:
            valid = decode_offsets(
                positions_ptr, words_ptr + block * (BLOCK // 32), tile_counts_ptr, size, count, TILE, CHUNK
            )
        else:
            valid = decode_mask(positions_ptr, mask_ptr + block * (BLOCK // 8), tile_counts_ptr, size, count, TILE)
        tl.atomic_min(bad_ptr, block, valid == 0, sem="relaxed")


@triton.jit
def restore_tile(
    base_ptr,
    mask_ptr,
    tile_starts_ptr,
    values_ptr,
    out_ptr,
    keys,
    sums_ptr,
    start,
    n,
    n_units,
    DIFFERENCE: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes one tile of the trained tensor, and its sums. Pointers as in `restore`."""
    new = load_tile(base_ptr, start, n, TAIL, TILE)
    before, after = tl.load(tile_starts_ptr + start // TILE), tl.load(tile_starts_ptr + start // TILE + 1)
    if after > before:
        bits = load_mask_bits(mask_ptr, start, n, TILE)
        stored = tl.load((values_ptr + before) + (tl.cumsum(bits) - bits), bits > 0, 0)
        if DIFFERENCE:
            new += stored
        else:
            new = tl.where(bits > 0, stored, new)
    i = start + tl.arange(0, TILE)
    if TAIL:
        tl.store(out_ptr + i, new, i < n)
    else:
        tl.store(out_ptr + i, new)
    sum_units(new, keys, sums_ptr, start, n_units)


@triton.jit(do_not_specialize=["n", "n_units"])
def restore(
    base_ptr,  # integers [n]
    mask_ptr,  # uint8 [blocks * BLOCK / 8], change bits
    tile_starts_ptr,  # int64 [tiles + 1], first value of each tile
    values_ptr,  # as base, [changed]
    bad_ptr,  # int64 [1], VALID if all blocks are valid
    out_ptr,  # as base, output; may be base
    table_ptr,  # int64 [21, 8]
    sums_ptr,  # int64 [n_units, 8], output
    n,
    n_units,
    DIFFERENCE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the trained tensor unless a block is invalid. Each program takes every num_programs-th tile."""
    keys = load_keys(table_ptr)
    n, n_units = n.to(tl.int64), n_units.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * TILE
    tail_start, step = n // TILE * TILE, tl.num_programs(0).to(tl.int64) * TILE
    valid = tl.load(bad_ptr) == VALID
    for start in range(first, tl.where(valid, tail_start, 0), step):
        restore_tile(
            base_ptr,
            mask_ptr,
            tile_starts_ptr,
            values_ptr,
            out_ptr,
            keys,
            sums_ptr,
            start,
            n,
            n_units,
            DIFFERENCE,
            False,
            TILE,
        )
    if valid & (tail_start < n) & (tail_start % step == first):
        restore_tile(
            base_ptr,
            mask_ptr,
            tile_starts_ptr,
            values_ptr,
            out_ptr,
            keys,
            sums_ptr,
            tail_start,
            n,
            n_units,
            DIFFERENCE,
            True,
            TILE,
        )


def tile_of(values: torch.Tensor) -> int:
    """Returns the coordinates per tile: a multiple of a unit of the digest and a divisor of BLOCK."""
    return TILE_BYTES // values.itemsize


def units_of(values: torch.Tensor) -> int:
    """Returns the number of digest units of a tensor, the last one padded."""
    return triton.cdiv(values.numel() * values.itemsize, layout.HASH_UNIT)


def key_table(device: torch.device) -> torch.Tensor:
    """Returns the keys and the initial state of the digest, int64 [21, 8] (see SECRET_OFFSETS)."""
    words = [
        int.from_bytes(layout.HASH_SECRET[offset + 8 * i :][:8], "little", signed=True)
        for offset in SECRET_OFFSETS
        for i in range(8)
    ]
    start = [word - (1 << 64) if word >> 63 else word for word in layout.HASH_START]
    return gpu.on_device(words + start, device)


def finish_digests(sums: torch.Tensor, table: torch.Tensor, values: torch.Tensor, digests: torch.Tensor) -> None:
    """Writes the digests, int64 [(tensors,) blocks, 2], of tensors like `values` from the sums of their units."""
    rows = digests.numel() // 2
    launch.run(
        finish,
        (triton.cdiv(rows, ROWS),),
        sums,
        table,
        digests,
        rows,
        blocks_of(values.numel()),
        units_of(values),
        num_warps=1,
        UNITS=layout.BLOCK * values.itemsize // layout.HASH_UNIT,
        ROWS=ROWS,
        STEPS=STEPS,
    )


def patch_gather_(
    base: torch.Tensor,
    trained: torch.Tensor,
    difference: bool,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    digests: torch.Tensor,
) -> None:
    """The operator, for contiguous integers on one device."""
    n, units, tile, device = base.numel(), units_of(base), tile_of(base), base.device
    if not n:
        return
    blocks, table = blocks_of(n), key_table(device)
    mask = torch.empty(blocks * layout.BLOCK // 8, dtype=torch.uint8, device=device)
    tile_counts = torch.zeros(blocks, layout.BLOCK // tile, dtype=torch.int32, device=device)
    sums = torch.empty(2, units, 8, dtype=torch.int64, device=device)
    grid = (launch.num_programs(device, triton.cdiv(n, tile)),)
    launch.run(compare, grid, base, trained, table, mask, tile_counts, sums, n, units, TILE=tile)
    torch.sum(tile_counts, 1, dtype=torch.int32, out=counts)
    starts = starts_of(position_bytes(counts, n))
    launch.run(
        compress,
        grid,
        base,
        trained,
        mask,
        starts_of(tile_counts.flatten()),
        counts,
        starts,
        positions,
        values,
        n,
        DIFFERENCE=difference,
        TILE=tile,
    )
    finish_digests(sums, table, base, digests)


def decode_positions(
    counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int, tile: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Validates and decodes the positions.

    Returns:
        int64 [1]: the first invalid block, the number of blocks if a length is wrong, or VALID.
        uint8 [blocks * BLOCK / 8]: the change bits.
        int32 [tiles]: the number of change bits per tile.
    """
    blocks, device = blocks_of(numel), counts.device
    fits = first_unfit(counts, positions, numel, stored)
    bad = fits.clone()
    words = torch.zeros(blocks * layout.BLOCK // 32, dtype=torch.int32, device=device)
    mask = words.view(torch.uint8)
    tile_counts = torch.zeros(blocks * (layout.BLOCK // tile), dtype=torch.int32, device=device)
    if blocks:
        launch.run(
            decode,
            (blocks,),
            counts,
            starts_of(position_bytes(counts, numel)),
            positions,
            fits,
            mask,
            words,
            tile_counts,
            bad,
            numel,
            num_warps=4,
            TILE=tile,
            CHUNK=CHUNK,
        )
    return bad, mask, tile_counts


def patch_check(counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int) -> torch.Tensor:
    """The operator, for contiguous tensors on one device."""
    return status_of(decode_positions(counts, positions, numel, stored, TILE_BYTES)[0])


def patch_scatter_(
    base: torch.Tensor,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    difference: bool,
    out: torch.Tensor,
    digests: torch.Tensor,
) -> torch.Tensor:
    """The operator, for contiguous integers on one device."""
    n, units, tile, device = base.numel(), units_of(base), tile_of(base), base.device
    bad, mask, tile_counts = decode_positions(counts, positions, n, values.numel(), tile)
    if n:
        table, sums = key_table(device), torch.empty(units, 8, dtype=torch.int64, device=device)
        launch.run(
            restore,
            (launch.num_programs(device, triton.cdiv(n, tile)),),
            base,
            mask,
            starts_of(tile_counts),
            values,
            bad,
            out,
            table,
            sums,
            n,
            units,
            DIFFERENCE=difference,
            TILE=tile,
        )
        finish_digests(sums, table, base, digests)
    return status_of(bad)


def patch_digest(values: torch.Tensor) -> torch.Tensor:
    """The operator, for contiguous integers on one device."""
    n, units, tile, device = values.numel(), units_of(values), tile_of(values), values.device
    digests = torch.empty(blocks_of(n), 2, dtype=torch.int64, device=device)
    if n:
        table, sums = key_table(device), torch.empty(units, 8, dtype=torch.int64, device=device)
        launch.run(
            digest, (launch.num_programs(device, triton.cdiv(n, tile)),), values, table, sums, n, units, TILE=tile
        )
        finish_digests(sums, table, values, digests)
    return digests
