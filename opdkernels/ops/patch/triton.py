"""`patch` in Triton: what changed is found in one pass over both tensors and compressed in a second; scattered back in one.

`compare` reads a tile of both sides and leaves its change bits, their number, and what its bytes add to the digests. Prefix
sums over the tiles then say where each tile's values and each block's positions begin, on the device: nothing comes back to
the host. `compress` reads the change bits, and the values of tiles that have some, and writes both behind each other.

Back again, `decode` checks the positions of a block and makes change bits of either form of them; `restore` reads these, the
base and the values, and writes the tensor and what its digest needs. Both do nothing where lengths do not fit, and `restore`
nothing where a block is not valid, so that no address is made of what was not checked.

Digests. XXH3 adds up 16 stripes of a unit of 1,024 bytes in any order, and scrambles its state between units: sums of units are
made with the tiles, 64 bytes for each 1,024, and `finish` goes through a block's units one by one, many blocks at once.

The arithmetic of a coordinate and of a word is that of csrc/patch/patch.h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from opdkernels.backends import gpu
from opdkernels.backends.triton import launch
from opdkernels.backends.triton.numeric import bits_set
from opdkernels.ops.patch.gpu_common import (
    PATCH_BLOCK,
    VALID,
    blocks_of,
    first_unfit,
    position_bytes,
    starts_of,
    status_of,
)
from opdkernels.ops.quantile.triton import load_mask_bits

TILE_BYTES = 1 << 12  # of either side of a tile
CHUNK = 1024  # offsets that are checked at a time
ROWS, STEPS = 4, 8  # blocks that a program of `finish` takes, eight words of each a lane; units that are loaded ahead

BLOCK = tl.constexpr(PATCH_BLOCK)
UNIT = tl.constexpr(1024)
UNIT_WORDS, STRIPES = tl.constexpr(128), tl.constexpr(16)
VALID = tl.constexpr(VALID)

SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
START = (
    0x00000000C2B2AE3D,
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x0000000085EBCA77,
    0x27D4EB2F165667C5,
    0x000000009E3779B1,
)
PRIME32_1, PRIME64_1, PRIME64_2 = (tl.constexpr(x) for x in (0x9E3779B1, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F))
AVALANCHE, ONES = tl.constexpr(0x165667919E3779F9), tl.constexpr((1 << 64) - 1)

# Rows of eight words: the keys of the stripes, of a block's last stripe, of the scramble, of either half of the digest, the start.
KEY_OFFSETS = (*range(0, 128, 8), len(SECRET) - 71, len(SECRET) - 64, 11, len(SECRET) - 75)
LAST_STRIPE, SCRAMBLE, LOW, HIGH, BEGIN = (tl.constexpr(x) for x in range(16, 21))


@triton.jit
def words_of(tile):
    """A tile's bytes as words of eight, little-endian: a thread that loaded them side by side keeps them."""
    width: tl.constexpr = tile.dtype.primitive_bitwidth
    if width == 64:
        return tile.to(tl.uint64, bitcast=True)
    ahead: tl.constexpr = 64 // width
    parts = (tile.to(tl.int64) & ((1 << width) - 1)).to(tl.uint64, bitcast=True)
    places = (width * tl.arange(0, ahead)).to(tl.uint64)
    return tl.sum(tl.reshape(parts, [parts.shape[0] // ahead, ahead]) << places[None, :], 1)


@triton.jit
def load_words(table, at):
    return tl.load(table + at).to(tl.uint64, bitcast=True)


@triton.jit
def load_keys(table):
    """Keys of the even and of the odd words of a unit, then those of a block's last."""
    stripe, pair = tl.arange(0, STRIPES)[:, None], tl.arange(0, 4)[None, :]
    at = stripe * 8 + 2 * pair
    last = tl.where(stripe == STRIPES - 1, LAST_STRIPE, stripe) * 8 + 2 * pair
    return load_words(table, at), load_words(table, at + 1), load_words(table, last), load_words(table, last + 1)


@triton.jit
def mixed(word, key):
    both = word ^ key
    return (both & 0xFFFFFFFF) * (both >> 32)


@triton.jit
def sum_units(tile, keys, sums, start, n_units):
    """Stores what each unit of a tile adds to its block's state. sums: int64 [units, 8]; start: the tile's first coordinate."""
    width: tl.constexpr = tile.dtype.primitive_bitwidth // 8
    words = words_of(tile)
    units: tl.constexpr = words.shape[0] // UNIT_WORDS
    even, odd = tl.split(tl.reshape(words, [units, STRIPES, 4, 2]))
    unit = start * width // UNIT + tl.arange(0, units)
    last = ((unit + 1) % (BLOCK * width // UNIT) == 0) | (unit == n_units - 1)
    last = last[:, None, None]
    even_key = tl.where(last, keys[2][None, :, :], keys[0][None, :, :])
    odd_key = tl.where(last, keys[3][None, :, :], keys[1][None, :, :])
    at = unit[:, None] * 8 + 2 * tl.arange(0, 4)[None, :]
    inside = unit[:, None] < n_units
    tl.store(sums + at, tl.sum(mixed(even, even_key) + odd, 1).to(tl.int64, bitcast=True), inside)
    tl.store(sums + at + 1, tl.sum(mixed(odd, odd_key) + even, 1).to(tl.int64, bitcast=True), inside)


@triton.jit
def load_tile(data, start, n, TAIL: tl.constexpr, TILE: tl.constexpr):
    i = start + tl.arange(0, TILE)
    if TAIL:
        return tl.load(data + i, i < n, 0)
    return tl.load(data + i)


@triton.jit
def compare_tile(base, trained, keys, mask, counts, sums, start, n, n_units, TAIL: tl.constexpr, TILE: tl.constexpr):
    w, v = load_tile(base, start, n, TAIL, TILE), load_tile(trained, start, n, TAIL, TILE)
    differ = (w != v).to(tl.int32)
    bytes_of_bits = tl.sum(tl.reshape(differ, [TILE // 8, 8]) << tl.arange(0, 8)[None, :], 1)
    tl.store(mask + start // 8 + tl.arange(0, TILE // 8), bytes_of_bits.to(tl.uint8))
    tl.store(counts + start // TILE, tl.sum(differ))
    sum_units(w, keys, sums, start, n_units)
    sum_units(v, keys, sums + 8 * n_units, start, n_units)


@triton.jit(do_not_specialize=["n", "n_units"])
def compare(base, trained, table, mask, counts, sums, n, n_units, TILE: tl.constexpr):
    """mask: uint8, of whole blocks; counts: int32 [tiles]; sums: int64 [2, units, 8]. Programs take tiles in turn."""
    keys = load_keys(table)
    n, n_units = n.to(tl.int64), n_units.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * TILE
    whole, step = n // TILE * TILE, tl.num_programs(0).to(tl.int64) * TILE
    for start in range(first, whole, step):
        compare_tile(base, trained, keys, mask, counts, sums, start, n, n_units, False, TILE)
    if (whole < n) & (whole % step == first):
        compare_tile(base, trained, keys, mask, counts, sums, whole, n, n_units, True, TILE)


@triton.jit(do_not_specialize=["n", "n_units"])
def digest(values, table, sums, n, n_units, TILE: tl.constexpr):
    """sums: int64 [units, 8]. Programs take tiles in turn."""
    keys = load_keys(table)
    n, n_units = n.to(tl.int64), n_units.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * TILE
    whole, step = n // TILE * TILE, tl.num_programs(0).to(tl.int64) * TILE
    for start in range(first, whole, step):
        sum_units(load_tile(values, start, n, False, TILE), keys, sums, start, n_units)
    if (whole < n) & (whole % step == first):
        sum_units(load_tile(values, whole, n, True, TILE), keys, sums, whole, n_units)


@triton.jit
def block_size(block, n):
    return tl.minimum(n - block * BLOCK, BLOCK).to(tl.int32)


@triton.jit
def compress_tile(
    base,
    trained,
    mask,
    tile_starts,
    counts,
    starts,
    positions,
    values,
    start,
    n,
    DIFFERENCE: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
):
    block, tile = start // BLOCK, start // TILE
    before, after = tl.load(tile_starts + tile), tl.load(tile_starts + tile + 1)
    mask_bytes = (block_size(block, n) + 7) // 8
    listed = 2 * tl.load(counts + block) < mask_bytes
    positions += tl.load(starts + block)
    if listed == 0:
        byte = (start - block * BLOCK) // 8 + tl.arange(0, TILE // 8)
        tl.store(positions + byte, tl.load(mask + block * (BLOCK // 8) + byte), byte < mask_bytes)
    if after > before:
        bits = load_mask_bits(mask, start, n, TILE)
        rank = tl.cumsum(bits) - bits
        stored = load_tile(trained, start, n, TAIL, TILE)
        if DIFFERENCE:
            stored -= load_tile(base, start, n, TAIL, TILE)
        tl.store((values + before) + rank, stored, bits > 0)
        if listed:
            offset = start - block * BLOCK + tl.arange(0, TILE)
            at = positions + 2 * (before - tl.load(tile_starts + block * (BLOCK // TILE))) + 2 * rank
            tl.store(at, (offset & 0xFF).to(tl.uint8), bits > 0)
            tl.store(at + 1, (offset >> 8).to(tl.uint8), bits > 0)


@triton.jit(do_not_specialize=["n"])
def compress(
    base,
    trained,
    mask,
    tile_starts,
    counts,
    starts,
    positions,
    values,
    n,
    DIFFERENCE: tl.constexpr,
    TILE: tl.constexpr,
):
    """tile_starts: int64 [tiles + 1], of values; counts: int32 [blocks]; starts: int64 [blocks], of positions."""
    n = n.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * TILE
    whole, step = n // TILE * TILE, tl.num_programs(0).to(tl.int64) * TILE
    for start in range(first, whole, step):
        compress_tile(
            base, trained, mask, tile_starts, counts, starts, positions, values, start, n, DIFFERENCE, False, TILE
        )
    if (whole < n) & (whole % step == first):
        compress_tile(
            base, trained, mask, tile_starts, counts, starts, positions, values, whole, n, DIFFERENCE, True, TILE
        )


@triton.jit
def merged(state, key, start):
    """XXH3's last step: eight words a row to one."""
    a, b = tl.split(tl.reshape(state ^ key[None, :], [state.shape[0], 4, 2]))
    found = tl.sum((a * b) ^ tl.umulhi(a, b), 1) + start
    found = (found ^ (found >> 37)) * AVALANCHE
    return (found ^ (found >> 32)).to(tl.int64, bitcast=True)


@triton.jit(do_not_specialize=["rows", "n_blocks", "n_units"])
def finish(sums, table, digests, rows, n_blocks, n_units, UNITS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """Digests of the blocks of one or two sides, int64 [sides, blocks, 2], from sums, int64 [sides, units, 8]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    side, block = row // n_blocks, row % n_blocks
    units = tl.where(inside, tl.minimum(n_units - block * UNITS, UNITS), 0)
    word = tl.arange(0, 8)
    sums += ((side * n_units + block * UNITS) * 8)[:, None] + word[None, :]
    scramble = load_words(table, SCRAMBLE * 8 + word)[None, :]
    state = tl.broadcast_to(load_words(table, BEGIN * 8 + word)[None, :], [ROWS, 8])
    for first in range(0, tl.minimum(n_units, UNITS), STEPS):
        for step in tl.static_range(STEPS):
            unit = first + step
            state += tl.load(sums + unit * 8, (unit < units)[:, None], 0).to(tl.uint64, bitcast=True)
            state = tl.where((unit < units - 1)[:, None], (state ^ (state >> 47) ^ scramble) * PRIME32_1, state)
    size = (units * UNIT).to(tl.uint64)
    low = merged(state, load_words(table, LOW * 8 + word), size * PRIME64_1)
    high = merged(state, load_words(table, HIGH * 8 + word), (size * PRIME64_2) ^ ONES)
    tl.store(digests + 2 * row, low, inside)
    tl.store(digests + 2 * row + 1, high, inside)


@triton.jit
def load_offsets(positions, k, some):
    low, high = tl.load(positions + 2 * k, some, 0), tl.load(positions + 2 * k + 1, some, 0)
    return low.to(tl.int32) | (high.to(tl.int32) << 8)


@triton.jit
def decode_offsets(positions, words, tile_counts, size, count, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """A block's offsets to change bits, and their number, tile by tile; whether they are valid."""
    tiles: tl.constexpr = BLOCK // TILE
    found = tl.zeros([2 * tiles], tl.int32)
    wrong = tl.zeros([CHUNK], tl.int32)
    for first in range(0, count, CHUNK):
        k = first + tl.arange(0, CHUNK)
        offset = load_offsets(positions, k, k < count)
        previous = tl.where(k > 0, load_offsets(positions, k - 1, (k > 0) & (k < count)), -1)
        inside = (k < count) & (offset < size)
        wrong |= ((k < count) & ((offset <= previous) | (offset >= size))).to(tl.int32)
        tl.atomic_or(words + (offset >> 5), 1 << (offset & 31), inside, sem="relaxed")
        found += tl.histogram(tl.where(inside, offset // TILE, tiles), 2 * tiles)
    lane = tl.arange(0, 2 * tiles)
    tl.store(tile_counts + lane, found, lane < tiles)
    return tl.max(wrong) == 0


@triton.jit
def decode_mask(positions, mask, tile_counts, size, count, TILE: tl.constexpr):
    """A block's mask to change bits, and their number, tile by tile; whether it is valid."""
    total = 0
    wrong = tl.zeros([TILE // 8], tl.int32)
    for tile in range(BLOCK // TILE):
        byte = tile * (TILE // 8) + tl.arange(0, TILE // 8)
        eight = tl.load(positions + byte, 8 * byte < size, 0)
        tl.store(mask + byte, eight)
        bits = eight.to(tl.int32)
        wrong |= bits >> tl.minimum(tl.maximum(size - 8 * byte, 0), 8)
        found = tl.sum(bits_set(bits))
        tl.store(tile_counts + tile, found)
        total += found
    return (total == count) & (tl.max(wrong) == 0)


@triton.jit(do_not_specialize=["n"])
def decode(counts, starts, positions, fits, mask, words, tile_counts, bad, n, TILE: tl.constexpr, CHUNK: tl.constexpr):
    """A block's positions to change bits, and their number, tile by tile, if they are valid; else `bad` is at most the block.

    starts: int64 [blocks], of positions; fits: int64 [1], VALID where all of them lie within; mask: zeros, of whole blocks, and
    words, the same memory as int32; tile_counts: int32 [tiles]; bad: int64 [1].
    """
    block = tl.program_id(0).to(tl.int64)
    if tl.load(fits) == VALID:
        size, count = block_size(block, n.to(tl.int64)), tl.load(counts + block)
        positions += tl.load(starts + block)
        tile_counts += block * (BLOCK // TILE)
        if 2 * count < (size + 7) // 8:
            valid = decode_offsets(positions, words + block * (BLOCK // 32), tile_counts, size, count, TILE, CHUNK)
        else:
            valid = decode_mask(positions, mask + block * (BLOCK // 8), tile_counts, size, count, TILE)
        tl.atomic_min(bad, block, valid == 0, sem="relaxed")


@triton.jit
def restore_tile(
    base,
    mask,
    tile_starts,
    values,
    out,
    keys,
    sums,
    start,
    n,
    n_units,
    DIFFERENCE: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
):
    new = load_tile(base, start, n, TAIL, TILE)
    before, after = tl.load(tile_starts + start // TILE), tl.load(tile_starts + start // TILE + 1)
    if after > before:
        bits = load_mask_bits(mask, start, n, TILE)
        stored = tl.load((values + before) + (tl.cumsum(bits) - bits), bits > 0, 0)
        if DIFFERENCE:
            new += stored
        else:
            new = tl.where(bits > 0, stored, new)
    i = start + tl.arange(0, TILE)
    if TAIL:
        tl.store(out + i, new, i < n)
    else:
        tl.store(out + i, new)
    sum_units(new, keys, sums, start, n_units)


@triton.jit(do_not_specialize=["n", "n_units"])
def restore(
    base, mask, tile_starts, values, bad, out, table, sums, n, n_units, DIFFERENCE: tl.constexpr, TILE: tl.constexpr
):
    """tile_starts: int64 [tiles + 1], of values; sums: int64 [units, 8]. Does nothing where a block is bad."""
    keys = load_keys(table)
    n, n_units = n.to(tl.int64), n_units.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * TILE
    whole, step = n // TILE * TILE, tl.num_programs(0).to(tl.int64) * TILE
    valid = tl.load(bad) == VALID
    for start in range(first, tl.where(valid, whole, 0), step):
        restore_tile(base, mask, tile_starts, values, out, keys, sums, start, n, n_units, DIFFERENCE, False, TILE)
    if valid & (whole < n) & (whole % step == first):
        restore_tile(base, mask, tile_starts, values, out, keys, sums, whole, n, n_units, DIFFERENCE, True, TILE)


def tile_of(values: torch.Tensor) -> int:
    """Coordinates of a tile: whole units, and a share of a block."""
    return TILE_BYTES // values.itemsize


def units_of(values: torch.Tensor) -> int:
    return triton.cdiv(values.numel() * values.itemsize, UNIT.value)


def key_table(device: torch.device) -> torch.Tensor:
    """Words of the digest, int64 [21, 8]."""
    words = [int.from_bytes(SECRET[at + 8 * i :][:8], "little", signed=True) for at in KEY_OFFSETS for i in range(8)]
    start = [word - (1 << 64) if word >> 63 else word for word in START]
    return gpu.on_device(words + start, device)


def finish_digests(sums: torch.Tensor, table: torch.Tensor, values: torch.Tensor, digests: torch.Tensor) -> None:
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
        UNITS=BLOCK.value * values.itemsize // UNIT.value,
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
    """The operator, for contiguous integers of one device."""
    n, units, tile, device = base.numel(), units_of(base), tile_of(base), base.device
    if not n:
        return
    blocks, table = blocks_of(n), key_table(device)
    mask = torch.empty(blocks * BLOCK.value // 8, dtype=torch.uint8, device=device)
    tile_counts = torch.zeros(blocks, BLOCK.value // tile, dtype=torch.int32, device=device)
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


def decoded(
    counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int, tile: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first bad block, or their number where lengths do not fit, or VALID, int64 [1]; change bits; their number a tile."""
    blocks, device = blocks_of(numel), counts.device
    fits = first_unfit(counts, positions, numel, stored)
    bad = fits.clone()
    words = torch.zeros(blocks * BLOCK.value // 32, dtype=torch.int32, device=device)
    mask = words.view(torch.uint8)
    tile_counts = torch.zeros(blocks * (BLOCK.value // tile), dtype=torch.int32, device=device)
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
    """The operator, for contiguous tensors of one device."""
    return status_of(decoded(counts, positions, numel, stored, TILE_BYTES)[0])


def patch_scatter_(
    base: torch.Tensor,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    difference: bool,
    out: torch.Tensor,
    digests: torch.Tensor,
) -> torch.Tensor:
    """The operator, for contiguous integers of one device."""
    n, units, tile, device = base.numel(), units_of(base), tile_of(base), base.device
    bad, mask, tile_counts = decoded(counts, positions, n, values.numel(), tile)
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
    """The operator, for contiguous integers of one device."""
    n, units, tile, device = values.numel(), units_of(values), tile_of(values), values.device
    digests = torch.empty(blocks_of(n), 2, dtype=torch.int64, device=device)
    if n:
        table, sums = key_table(device), torch.empty(units, 8, dtype=torch.int64, device=device)
        launch.run(
            digest, (launch.num_programs(device, triton.cdiv(n, tile)),), values, table, sums, n, units, TILE=tile
        )
        finish_digests(sums, table, values, digests)
    return digests
