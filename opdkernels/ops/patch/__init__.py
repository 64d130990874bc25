r"""`patch`: gathers the positions and values of the coordinates whose bits changed, and scatters them back.

W (base) and W' (trained) have one dtype and are compared as unsigned integers, in blocks of 65,536 coordinates:

    changed     { i : W_i != W'_i }, by bits: a NaN equals itself, +0 differs from -0
    counts      number of changed coordinates per block
    positions   changed coordinates of each block: either increasing 16-bit offsets within the block, or one bit per
                coordinate (little-endian), whichever is shorter; the mask if both have the same length
    values      W'_i, or W'_i - W_i modulo 2^bits (`difference`), of the changed coordinates, in order

Offsets take 2 bytes per changed coordinate and a mask 1/8 byte per coordinate: they are equal at a density of 1/16.
Gaps of variable length would save a third of the positions at a density of 17 %, which is 2 % of a bf16 tensor, but
they cannot be read in parallel.

Every pass also computes digests: XXH3-128 (seed 0) of the bytes of each block, padded with zeros to a multiple of
1,024. They detect accidental differences, not deliberate ones.

Source: Y. Collet, xxHash (XXH3, version 0.8); the layout is defined here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opdkernels.ops import register, to_local
from opdkernels.ops.arguments import validate_input, validate_memory, validate_tensor
from opdkernels.ops.patch.layout import (
    BLOCK,
    HASH_AVALANCHE,
    HASH_HIGH,
    HASH_LAST,
    HASH_LOW,
    HASH_PRIME32_1,
    HASH_PRIME64_1,
    HASH_PRIME64_2,
    HASH_SCRAMBLE,
    HASH_SECRET,
    HASH_START,
    HASH_UNIT,
    blocks_of,
)

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype by bytes per coordinate. Comparison, and subtraction modulo 2^bits, do not depend on the sign."""

GATHER = (
    "patch_gather_(Tensor base, Tensor trained, bool difference, Tensor(a!) counts, Tensor(b!) positions, "
    "Tensor(c!) values, Tensor(d!) digests) -> ()"
)
SCATTER = (
    "patch_scatter_(Tensor base, Tensor counts, Tensor positions, Tensor values, bool difference, Tensor(a!) out, "
    "Tensor(b!) digests) -> Tensor"
)
CHECK = "patch_check(Tensor counts, Tensor positions, int numel, int stored) -> Tensor"
DIGEST = "patch_digest(Tensor values) -> Tensor"

WORD = (1 << 64) - 1


def to_int64(words: list[int]) -> torch.Tensor:
    """Returns unsigned 64-bit words as int64 [len(words)]; sums and products wrap around alike."""
    return torch.tensor([word - (1 << 64) if word >> 63 else word for word in words], dtype=torch.int64)


def secret_words(offset: int) -> list[int]:
    """Returns the eight words of the secret that begin at a byte offset."""
    return [int.from_bytes(HASH_SECRET[offset + 8 * i :][:8], "little") for i in range(8)]


def merge(state: list[int], offset: int, start: int) -> int:
    """Returns one word of the digest from the eight words of the state: the last step of XXH3."""
    mixed = [word ^ key for word, key in zip(state, secret_words(offset), strict=True)]
    for a, b in zip(mixed[::2], mixed[1::2], strict=True):
        start += (a * b & WORD) ^ (a * b >> 64)
    start &= WORD
    start = (start ^ start >> 37) * HASH_AVALANCHE & WORD
    return start ^ start >> 32


def xxh3(data: torch.Tensor) -> torch.Tensor:
    """XXH3-128 of each row.

    Args:
        data: uint8 [num_rows, num_bytes]; num_bytes is a positive multiple of 1,024.

    Returns:
        int64 [num_rows, 2], the low and the high word.
    """
    aligned = data.clone(memory_format=torch.contiguous_format)  # a view may begin at any byte
    words = aligned.view(torch.int64).view(len(data), -1, 16, 8)  # [num_rows, num_units, stripes, 8]
    keys = torch.stack([to_int64(secret_words(8 * stripe)) for stripe in range(16)]).to(data.device)
    last_keys = keys.clone()
    last_keys[15] = to_int64(secret_words(HASH_LAST))
    scramble = to_int64(secret_words(HASH_SCRAMBLE)).to(data.device)
    state = to_int64(list(HASH_START)).to(data.device).repeat(len(data), 1)
    for unit in range(words.shape[1]):
        is_last = unit == words.shape[1] - 1
        mixed = words[:, unit] ^ (last_keys if is_last else keys)
        products = (mixed & 0xFFFFFFFF) * (mixed >> 32 & 0xFFFFFFFF)
        state = state + products.sum(1) + words[:, unit].sum(1).view(-1, 4, 2).flip(2).view(-1, 8)
        if not is_last:
            state = (state ^ (state >> 47 & 0x1FFFF) ^ scramble) * HASH_PRIME32_1
    size = data.shape[1]
    digest_words = []
    for row in state.tolist():
        unsigned = [word & WORD for word in row]
        digest_words.append(merge(unsigned, HASH_LOW, size * HASH_PRIME64_1 & WORD))
        digest_words.append(merge(unsigned, HASH_HIGH, ~(size * HASH_PRIME64_2) & WORD))
    return to_int64(digest_words).view(-1, 2).to(data.device)


def reference_digest(values: torch.Tensor) -> torch.Tensor:
    """The definition of the digests, in plain PyTorch. Returns int64 [blocks, 2]."""
    data = values.contiguous().view(torch.uint8)
    block_bytes = BLOCK * values.element_size()
    full_blocks = len(data) // block_bytes
    digests = [xxh3(data[: full_blocks * block_bytes].view(full_blocks, block_bytes))] if full_blocks else []
    rest = data[full_blocks * block_bytes :]
    if len(rest):
        padded = rest.new_zeros((len(rest) + HASH_UNIT - 1) // HASH_UNIT * HASH_UNIT)
        padded[: len(rest)] = rest
        digests.append(xxh3(padded[None]))
    return torch.cat(digests) if digests else data.new_empty((0, 2), dtype=torch.int64)


def position_bytes(count: int, numel: int) -> int:
    """Returns the bytes of the positions of a block of `numel` coordinates, `count` of them changed."""
    return min(2 * count, (numel + 7) // 8)


def reference_gather(
    base: torch.Tensor,
    trained: torch.Tensor,
    difference: bool,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    digests: torch.Tensor,
) -> None:
    """The definition, in plain PyTorch.

    Args:
        base: Integers [numel].
        trained: As `base`.
        difference: Whether to store trained - base instead of trained.
        counts: int32 [blocks], output.
        positions: uint8 [at least (numel + 7) // 8]; the first elements are output.
        values: As `base`, at least [numel]; the first elements are output.
        digests: int64 [2, blocks, 2], output: of `base` and of `trained`.
    """
    position = stored = 0
    for block in range(blocks_of(base.numel())):
        w, v = (side[block * BLOCK : (block + 1) * BLOCK] for side in (base, trained))
        differ = w != v
        offsets = differ.nonzero().flatten()
        count = counts[block] = len(offsets)
        if 2 * count < (len(w) + 7) // 8:
            coded = offsets.to(torch.int32).view(torch.uint8).view(-1, 4)[:, :2].flatten()
        else:
            bits = torch.zeros((len(w) + 7) // 8 * 8, dtype=torch.int32, device=w.device)
            bits[: len(w)] = differ
            coded = (bits.view(-1, 8) << torch.arange(8, device=w.device)).sum(1).to(torch.uint8)
        positions[position : position + len(coded)] = coded
        values[stored : stored + count] = (v - w if difference else v)[differ]
        position, stored = position + len(coded), stored + count
    digests[0], digests[1] = reference_digest(base), reference_digest(trained)


def decode(coded: torch.Tensor, count: int, numel: int) -> torch.Tensor | None:
    """Returns the offsets of the positions of a block, int64 [count]; None if they are invalid."""
    if len(coded) < (numel + 7) // 8:
        low, high = coded.view(-1, 2).long().unbind(1)
        offsets = low | high << 8
        valid = bool((offsets[1:] > offsets[:-1]).all()) and bool((offsets < numel).all())
    else:
        bits = coded[:, None] >> torch.arange(8, device=coded.device) & 1
        offsets = bits.flatten().nonzero().flatten()
        valid = len(offsets) == count and bool((offsets < numel).all())
    return offsets if valid else None


def decode_blocks(
    counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int
) -> tuple[int, list[torch.Tensor]]:
    """Decodes and validates the positions of all blocks.

    Returns:
        -1 and the offsets of each block; or the first invalid block and []; or the number of blocks and [] if the
        length of the positions or the number of stored values does not match the counts.
    """
    block_counts, blocks = counts.tolist(), blocks_of(numel)
    sizes = [min(BLOCK, numel - block * BLOCK) for block in range(blocks)]
    for block, (count, size) in enumerate(zip(block_counts, sizes, strict=True)):
        if not 0 <= count <= size:
            return block, []
    lengths = [position_bytes(count, size) for count, size in zip(block_counts, sizes, strict=True)]
    if sum(lengths) != len(positions) or sum(block_counts) != stored:
        return blocks, []
    block_offsets = []
    for block, coded in enumerate(positions.split(lengths) if blocks else ()):
        offsets = decode(coded, block_counts[block], sizes[block])
        if offsets is None:
            return block, []
        block_offsets.append(offsets)
    return -1, block_offsets


def reference_check(counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int) -> torch.Tensor:
    """The definition, in plain PyTorch.

    Returns:
        int64 [1]: -1 if all blocks are valid, else the first invalid block; or the number of blocks if the length of
        the positions or the number of stored values does not match the counts.
    """
    return torch.tensor([decode_blocks(counts, positions, numel, stored)[0]], device=counts.device)


def reference_scatter(
    base: torch.Tensor,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    difference: bool,
    out: torch.Tensor,
    digests: torch.Tensor,
) -> torch.Tensor:
    """The definition, in plain PyTorch.

    Args:
        base: Integers [numel].
        counts: int32 [blocks].
        positions: uint8 [bytes].
        values: As `base`, [changed].
        difference: Whether `values` are trained - base.
        out: As `base`, output; may be `base`.
        digests: int64 [blocks, 2], output: of `out`.

    Returns:
        As `reference_check`; nothing is written unless it is -1.
    """
    status, block_offsets = decode_blocks(counts, positions, base.numel(), values.numel())
    if status < 0:
        changed = torch.cat(
            [offsets + block * BLOCK for block, offsets in enumerate(block_offsets)] or [positions.long()]
        )
        new = values + base[changed] if difference else values
        out.copy_(base)
        out[changed] = new
        digests.copy_(reference_digest(out))
    return torch.tensor([status], device=base.device)


def fake_gather(
    base: torch.Tensor,
    trained: torch.Tensor,
    difference: bool,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    digests: torch.Tensor,
) -> None:
    torch._check(base.numel() == trained.numel(), lambda: f"sizes differ: {base.shape} and {trained.shape}")


def fake_scatter(
    base: torch.Tensor,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    difference: bool,
    out: torch.Tensor,
    digests: torch.Tensor,
) -> torch.Tensor:
    return base.new_empty(1, dtype=torch.int64)


def fake_check(counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int) -> torch.Tensor:
    return counts.new_empty(1, dtype=torch.int64)


def fake_digest(values: torch.Tensor) -> torch.Tensor:
    return values.new_empty((blocks_of(values.numel()), 2), dtype=torch.int64)


def validate_gather(
    base: torch.Tensor,
    trained: torch.Tensor,
    difference: bool,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    digests: torch.Tensor,
) -> None:
    """Raise TypeError or ValueError where the arguments of the operator do not fit."""
    device, n = base.device, base.numel()
    validate_input("base", base, BITS.values(), device)
    validate_input("trained", trained, (base.dtype,), device, n)
    validate_input("positions", positions, (torch.uint8,), device)
    validate_input("values", values, (base.dtype,), device)
    if positions.numel() < (n + 7) // 8 or values.numel() < n:
        raise ValueError(f"{n} coordinates need {(n + 7) // 8} bytes of positions and {n} values")
    validate_tensor("counts", counts, torch.int32, (blocks_of(n),), device)
    validate_tensor("digests", digests, torch.int64, (2, blocks_of(n), 2), device)
    validate_memory([counts, positions, values, digests], [base, trained])


def validate_check(counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int) -> None:
    """Raise TypeError or ValueError where the arguments of the operator do not fit."""
    if numel < 0 or stored < 0:
        raise ValueError(f"numbers of coordinates and values must not be negative, not {numel} and {stored}")
    validate_tensor("counts", counts, torch.int32, (blocks_of(numel),), counts.device)
    validate_input("positions", positions, (torch.uint8,), counts.device)
    validate_memory([], [counts, positions])


def validate_scatter(
    base: torch.Tensor,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    difference: bool,
    out: torch.Tensor,
    digests: torch.Tensor,
) -> None:
    """Raise TypeError or ValueError where the arguments of the operator do not fit."""
    device, n = base.device, base.numel()
    validate_input("base", base, BITS.values(), device)
    validate_input("out", out, (base.dtype,), device, n)
    validate_input("values", values, (base.dtype,), device)
    validate_tensor("counts", counts, torch.int32, (blocks_of(n),), device)
    validate_input("positions", positions, (torch.uint8,), device)
    validate_tensor("digests", digests, torch.int64, (blocks_of(n), 2), device)
    in_place = out.data_ptr() == base.data_ptr()
    validate_memory([out, digests], [counts, positions, values, *([] if in_place else [base])])


def validate_digest(values: torch.Tensor) -> None:
    """Raise TypeError or ValueError where the argument of the operator does not fit."""
    validate_input("values", values, BITS.values(), values.device)
    validate_memory([], [values])


register("patch", GATHER, reference_gather, fake_gather, validate=validate_gather)
register("patch", SCATTER, reference_scatter, fake_scatter, validate=validate_scatter)
register("patch", CHECK, reference_check, fake_check, validate=validate_check)
register("patch", DIGEST, reference_digest, fake_digest, validate=validate_digest)


@dataclass(frozen=True)
class Changes:
    """Changed coordinates of one tensor, as returned by `gather`.

    Attributes:
        counts: int32 [blocks], changed coordinates per block.
        positions: uint8 [bytes], the positions of each block in turn.
        values: Integers [changed] of the width of a coordinate.
    """

    counts: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor

    @property
    def changed(self) -> int:
        """The number of changed coordinates."""
        return self.values.numel()


@dataclass(frozen=True)
class GatherBuffers:
    """Reusable memory for the changes of up to `numel` coordinates of `width` bytes.

    Attributes:
        counts: int32 [blocks].
        positions: uint8 [(numel + 7) // 8].
        values: Integers [numel].
    """

    counts: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, numel: int, width: int, device: torch.device | str = "cpu") -> GatherBuffers:
        """Allocates buffers for tensors of up to `numel` coordinates of `width` bytes (1, 2, 4 or 8)."""
        return cls(
            torch.empty(blocks_of(numel), dtype=torch.int32, device=device),
            torch.empty((numel + 7) // 8, dtype=torch.uint8, device=device),
            torch.empty(numel, dtype=BITS[width], device=device),
        )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the flat bits of a tensor as integers [numel]; a view if the tensor is contiguous.

    Raises:
        TypeError: The dtype is quantized or does not have 1, 2, 4 or 8 bytes.
    """
    tensor = to_local(tensor)
    if tensor.is_quantized or tensor.element_size() not in BITS:
        raise TypeError(f"{tensor.dtype} has no coordinates of 1, 2, 4 or 8 bytes")
    return tensor.flatten().view(BITS[tensor.element_size()])


def gather(
    base: torch.Tensor, trained: torch.Tensor, *, difference: bool = False, buffers: GatherBuffers | None = None
) -> tuple[Changes, torch.Tensor]:
    """Finds the coordinates that changed from base to trained, and digests both, in one pass over both.

    Args:
        base: Tensor of any dtype of 1, 2, 4 or 8 bytes; copied only if it is not contiguous.
        trained: As `base`, of the same dtype, shape and device.
        difference: Whether to store trained - base modulo 2^bits instead of trained.
        buffers: Memory for the result. The changes are views of it, valid until it is used again.

    Returns:
        The changes, and the digests of base and trained, int64 [2, blocks, 2].

    Raises:
        TypeError: The dtypes differ or are not supported.
        ValueError: Shapes or devices differ, or the buffers do not fit.

    >>> changes, digests = gather(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 2, 4]))
    >>> changes.counts.tolist(), changes.positions.tolist(), changes.values.view(torch.float32).tolist()
    ([1], [4], [4.0])
    """
    if base.dtype != trained.dtype:
        raise TypeError(f"base is {base.dtype}, trained {trained.dtype}: their bits do not compare")
    if base.shape != trained.shape:
        raise ValueError(f"shapes differ: base {tuple(base.shape)}, trained {tuple(trained.shape)}")
    if base.device != trained.device:
        raise ValueError(f"base is on {base.device}, trained on {trained.device}; move one of them")
    w, v = bits(base), bits(trained)
    numel, blocks = w.numel(), blocks_of(w.numel())
    if buffers is None:
        buffers = GatherBuffers.of(numel, w.element_size(), w.device)
    if buffers.values.dtype != w.dtype or buffers.values.numel() < numel or buffers.values.device != w.device:
        raise ValueError(
            f"buffers are for {buffers.values.numel()} of {buffers.values.dtype} on {buffers.values.device}, not"
            f" {numel} of {w.dtype} on {w.device}"
        )
    counts, digests = buffers.counts[:blocks], w.new_empty((2, blocks, 2), dtype=torch.int64)
    torch.ops.opdkernels.patch_gather_(w, v, difference, counts, buffers.positions, buffers.values, digests)
    block_counts = counts.tolist()
    used = sum(position_bytes(count, min(BLOCK, numel - block * BLOCK)) for block, count in enumerate(block_counts))
    return Changes(counts, buffers.positions[:used], buffers.values[: sum(block_counts)]), digests


def validate_changes(changes: Changes, numel: int) -> None:
    """Validates dtypes, layout and devices of `changes` for a tensor of `numel` coordinates, but not their contents.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape or device is wrong, or the number of counts is not the number of blocks.
    """
    for name, tensor, dtypes in (
        ("counts", changes.counts, (torch.int32,)),
        ("positions", changes.positions, (torch.uint8,)),
        ("values", changes.values, tuple(BITS.values())),
    ):
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} are {tensor.dtype}; they must be {' or '.join(map(str, dtypes))}")
        if tensor.ndim != 1 or not tensor.is_contiguous() or tensor.device != changes.counts.device:
            raise ValueError(f"{name} must be contiguous, of one dimension, on one device with the others")
    if changes.counts.numel() != blocks_of(numel):
        raise ValueError(
            f"{changes.counts.numel()} counts do not fit {numel} coordinates, which have {blocks_of(numel)} blocks"
        )


def raise_for_status(status: torch.Tensor, changes: Changes) -> None:
    """Raises ValueError if a status of `reference_check`, int64 [1], is not -1."""
    block = int(status)
    if block >= changes.counts.numel():
        raise ValueError("the lengths of positions and values are not those that the counts give")
    if block >= 0:
        raise ValueError(
            f"block {block} has positions out of range, repeated, out of order or not as many as it counts"
        )


def check(changes: Changes, numel: int) -> None:
    """Validates that all positions are in range, in increasing order and unique, and that all lengths match.

    Args:
        changes: Changes of a tensor, from any source.
        numel: Number of coordinates of that tensor.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape, device, length or position is wrong.

    >>> changes, _ = gather(torch.zeros(3), torch.ones(3))
    >>> check(changes, 3)
    """
    validate_changes(changes, numel)
    status = torch.ops.opdkernels.patch_check(changes.counts, changes.positions, numel, changes.values.numel())
    raise_for_status(status, changes)


def scatter(
    base: torch.Tensor, changes: Changes, *, difference: bool = False, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Restores the trained tensor from the base and its changes, and digests it.

    No memory outside the tensors is read or written, whatever `changes` holds.

    Args:
        base: The tensor that `gather` compared, of any dtype of 1, 2, 4 or 8 bytes.
        changes: Changes as returned by `gather`.
        difference: As it was for `gather`.
        out: A contiguous tensor of the dtype, shape and device of `base`, or `base` itself. Default: a new tensor.

    Returns:
        The trained tensor (`out`), and its digests, int64 [blocks, 2].

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape, device, length or position is wrong. The contents of `out` are then undefined; call
            `check` first if `out` is `base`.

    >>> w, v = torch.tensor([1.0, 2, 3]), torch.tensor([1.0, -0.0, 3])
    >>> scatter(w, gather(w, v)[0])[0].tolist()
    [1.0, -0.0, 3.0]
    """
    w = bits(base)
    validate_changes(changes, w.numel())
    if changes.values.dtype != w.dtype or changes.values.device != w.device:
        raise TypeError(
            f"the values are {changes.values.dtype} on {changes.values.device}; base needs {w.dtype} on {w.device}"
        )
    if out is None:
        out = torch.empty_like(to_local(base))
    if out.dtype != base.dtype or out.shape != base.shape or out.device != w.device or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous tensor like the base: {base.dtype}, {tuple(base.shape)} on {w.device}"
        )
    digests = w.new_empty((blocks_of(w.numel()), 2), dtype=torch.int64)
    status = torch.ops.opdkernels.patch_scatter_(
        w, changes.counts, changes.positions, changes.values, difference, bits(out), digests
    )
    raise_for_status(status, changes)
    return out, digests


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """Computes XXH3-128 of each block of a tensor of any dtype of 1, 2, 4 or 8 bytes.

    Returns:
        int64 [blocks, 2], the low and the high word.

    Raises:
        TypeError: The dtype is not supported.

    >>> digest(torch.zeros(3)).shape
    torch.Size([1, 2])
    """
    return torch.ops.opdkernels.patch_digest(bits(tensor))
