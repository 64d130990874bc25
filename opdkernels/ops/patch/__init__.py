r"""`patch`: the coordinates whose bits changed, gathered to positions and values, and scattered back.

For W (base) and W' (trained) of one dtype, as unsigned integers of the same bits, in blocks of 65,536 coordinates:

    changed     { i : W_i != W'_i }, by bits: a NaN equals itself, +0 is not -0
    counts      how many changed, a block
    positions   a block's changed coordinates: offsets within it, increasing, 16 bits each, or one bit a coordinate
                (little-endian), whichever is shorter; the mask where both are equal
    stored      W'_i, or W'_i - W_i modulo 2^bits (`difference`), of the changed, in order

Sixteen-bit offsets cost 2 bytes a changed coordinate, a mask 1/8 byte a coordinate: they cross at one in sixteen. Gaps of
variable length would save a third of the positions at a density of 17 %, 2 % of a bf16 tensor, and cannot be read in parallel.

Digests come with every pass: XXH3-128 (seed 0) of each block's bytes, padded with zeros to a multiple of 1,024. They tell
contents apart that differ by accident, not by intent.

Source: Y. Collet, xxHash (XXH3, version 0.8); the layout is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opdkernels.ops import register, to_local

BLOCK = 1 << 16
UNIT = 1024  # bytes of the digest between two scrambles: 16 stripes of 8 words
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What coordinates of a width are seen as; comparing and subtracting modulo the width need no sign."""

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

SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
PRIME64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
START = (PRIME32[2], *PRIME64[:4], PRIME32[1], PRIME64[4], PRIME32[0])
WORD = (1 << 64) - 1


def blocks_of(numel: int) -> int:
    return (numel + BLOCK - 1) // BLOCK


def signed(words: bytes | list[int]) -> torch.Tensor:
    """64-bit words as int64, whose sums and products wrap around as theirs do."""
    found = (
        [int.from_bytes(words[i : i + 8], "little") for i in range(0, len(words), 8)]
        if isinstance(words, bytes)
        else words
    )
    return torch.tensor([word - (1 << 64) if word >> 63 else word for word in found], dtype=torch.int64)


def merge(state: list[int], key: int, start: int) -> int:
    """XXH3's last step: eight words to one."""
    for i in range(4):
        a, b = (state[2 * i + j] ^ int.from_bytes(SECRET[key + 16 * i + 8 * j :][:8], "little") for j in (0, 1))
        start += (a * b & WORD) ^ (a * b >> 64)
    start &= WORD
    start = (start ^ start >> 37) * 0x165667919E3779F9 & WORD
    return start ^ start >> 32


def xxh3(data: torch.Tensor) -> torch.Tensor:
    """int64 [n, 2], the low and the high word: XXH3-128 of the n rows of uint8 [n, a positive multiple of 1,024]."""
    words = (
        data.clone(memory_format=torch.contiguous_format).view(torch.int64).view(len(data), -1, 16, 8)
    )  # a view may begin at any byte
    keys = torch.stack([signed(SECRET[8 * s : 8 * s + 64]) for s in range(16)]).to(data.device)
    last = keys.clone()
    last[15] = signed(SECRET[-71:-7])
    scramble = signed(SECRET[-64:]).to(data.device)
    state = signed(list(START)).to(data.device).repeat(len(data), 1)
    for unit in range(words.shape[1]):
        ends = unit == words.shape[1] - 1
        mixed = words[:, unit] ^ (last if ends else keys)
        products = (mixed & 0xFFFFFFFF) * (mixed >> 32 & 0xFFFFFFFF)
        state = state + products.sum(1) + words[:, unit].sum(1).view(-1, 4, 2).flip(2).view(-1, 8)
        if not ends:
            state = (state ^ (state >> 47 & 0x1FFFF) ^ scramble) * PRIME32[0]
    size = data.shape[1]
    found = [
        word
        for row in state.tolist()
        for word in (
            merge([w & WORD for w in row], 11, size * PRIME64[0] & WORD),
            merge([w & WORD for w in row], 117, ~(size * PRIME64[1]) & WORD),
        )
    ]
    return signed(found).view(-1, 2).to(data.device)


def reference_digest(values: torch.Tensor) -> torch.Tensor:
    """The definition of the digests, in plain PyTorch: int64 [blocks, 2]."""
    data = values.contiguous().view(torch.uint8)
    size = BLOCK * values.element_size()
    whole = len(data) // size
    found = [xxh3(data[: whole * size].view(whole, size))] if whole else []
    rest = data[whole * size :]
    if len(rest):
        padded = rest.new_zeros((len(rest) + UNIT - 1) // UNIT * UNIT)
        padded[: len(rest)] = rest
        found.append(xxh3(padded[None]))
    return torch.cat(found) if found else data.new_empty((0, 2), dtype=torch.int64)


def position_bytes(count: int, numel: int) -> int:
    """Bytes of the positions of `count` changed among the `numel` coordinates of a block."""
    return min(2 * count, (numel + 7) // 8)


def reference_gather(base, trained, difference, counts, positions, values, digests) -> None:
    """The definition, in plain PyTorch. Writes the first of `positions` and `values`, and all of `counts` and `digests`."""
    at = stored = 0
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
        positions[at : at + len(coded)] = coded
        values[stored : stored + count] = (v - w if difference else v)[differ]
        at, stored = at + len(coded), stored + count
    digests[0], digests[1] = reference_digest(base), reference_digest(trained)


def decode(coded: torch.Tensor, count: int, numel: int) -> torch.Tensor | None:
    """The offsets of a block's positions, int64 [count]; None where they are not valid."""
    if len(coded) < (numel + 7) // 8:
        low, high = coded.view(-1, 2).long().unbind(1)
        offsets = low | high << 8
        valid = bool((offsets[1:] > offsets[:-1]).all()) and bool((offsets < numel).all())
    else:
        bits = coded[:, None] >> torch.arange(8, device=coded.device) & 1
        offsets = bits.flatten().nonzero().flatten()
        valid = len(offsets) == count and bool((offsets < numel).all())
    return offsets if valid else None


def walk(counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int) -> tuple[int, list[torch.Tensor]]:
    """-1 and the offsets of every block; else the first block that is not valid, or the number of blocks where a length is not."""
    listed, blocks = counts.tolist(), blocks_of(numel)
    sizes = [min(BLOCK, numel - block * BLOCK) for block in range(blocks)]
    for block, (count, size) in enumerate(zip(listed, sizes, strict=True)):
        if not 0 <= count <= size:
            return block, []
    lengths = [position_bytes(count, size) for count, size in zip(listed, sizes, strict=True)]
    if sum(lengths) != len(positions) or sum(listed) != stored:
        return blocks, []
    found = []
    for block, coded in enumerate(positions.split(lengths) if blocks else ()):
        offsets = decode(coded, listed[block], sizes[block])
        if offsets is None:
            return block, []
        found.append(offsets)
    return -1, found


def reference_check(counts, positions, numel, stored) -> torch.Tensor:
    """int64 [1]: -1, or the first block that is not valid, or the number of blocks where a length is not."""
    return torch.tensor([walk(counts, positions, numel, stored)[0]], device=counts.device)


def reference_scatter(base, counts, positions, values, difference, out, digests) -> torch.Tensor:
    """The definition, in plain PyTorch. Writes `out` and its digests; returns as `reference_check`."""
    status, blocks = walk(counts, positions, base.numel(), values.numel())
    if status < 0:
        changed = torch.cat([offsets + block * BLOCK for block, offsets in enumerate(blocks)] or [positions.long()])
        new = values + base[changed] if difference else values
        out.copy_(base)
        out[changed] = new
        digests.copy_(reference_digest(out))
    return torch.tensor([status], device=base.device)


def fake_gather(base, trained, difference, counts, positions, values, digests) -> None:
    torch._check(base.numel() == trained.numel(), lambda: f"sizes differ: {base.shape} and {trained.shape}")


def fake_scatter(base, counts, positions, values, difference, out, digests) -> torch.Tensor:
    return base.new_empty(1, dtype=torch.int64)


def fake_check(counts, positions, numel, stored) -> torch.Tensor:
    return counts.new_empty(1, dtype=torch.int64)


def fake_digest(values) -> torch.Tensor:
    return values.new_empty((blocks_of(values.numel()), 2), dtype=torch.int64)


register("patch", GATHER, reference_gather, fake_gather)
register("patch", SCATTER, reference_scatter, fake_scatter)
register("patch", CHECK, reference_check, fake_check)
register("patch", DIGEST, reference_digest, fake_digest)


@dataclass(frozen=True)
class Changes:
    """What `gather` finds: int32 [blocks], uint8 [bytes], and integers [changed] of the width of a coordinate."""

    counts: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor

    @property
    def changed(self) -> int:
        return self.values.numel()


@dataclass(frozen=True)
class GatherBuffers:
    """Memory for the changes of up to `numel` coordinates of `width` bytes, to be used again and again."""

    counts: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, numel: int, width: int, device: torch.device | str = "cpu") -> GatherBuffers:
        blocks = torch.empty(blocks_of(numel), dtype=torch.int32, device=device)
        return cls(
            blocks,
            torch.empty((numel + 7) // 8, dtype=torch.uint8, device=device),
            torch.empty(numel, dtype=BITS[width], device=device),
        )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The flat bits of a tensor of any dtype of 1, 2, 4 or 8 bytes, as integers; raises TypeError for others."""
    tensor = to_local(tensor)
    if tensor.is_quantized or tensor.element_size() not in BITS:
        raise TypeError(f"{tensor.dtype} has no coordinates of 1, 2, 4 or 8 bytes")
    return tensor.flatten().view(BITS[tensor.element_size()])


def gather(
    base: torch.Tensor, trained: torch.Tensor, *, difference: bool = False, buffers: GatherBuffers | None = None
) -> tuple[Changes, torch.Tensor]:
    """What changed from base to trained, and the digests of both, int64 [2, blocks, 2]; from one pass over both.

    base, trained: one dtype of 1, 2, 4 or 8 bytes, one shape, one device; copied only if not contiguous. difference: store
    trained - base modulo 2^bits instead of trained. buffers: memory that the changes are views of, until it is used again.

    Raises TypeError for other dtypes, ValueError for shapes, devices or buffers that do not fit.

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
            f"buffers are for {buffers.values.numel()} of {buffers.values.dtype} on {buffers.values.device}, not {numel} of {w.dtype} on {w.device}"
        )
    counts, digests = buffers.counts[:blocks], w.new_empty((2, blocks, 2), dtype=torch.int64)
    torch.ops.opdkernels.patch_gather_(w, v, difference, counts, buffers.positions, buffers.values, digests)
    listed = counts.tolist()
    used = sum(position_bytes(count, min(BLOCK, numel - block * BLOCK)) for block, count in enumerate(listed))
    return Changes(counts, buffers.positions[:used], buffers.values[: sum(listed)]), digests


def fit(changes: Changes, numel: int) -> None:
    """Raises TypeError or ValueError where the tensors of `changes` are not such as `gather` gives for `numel` coordinates."""
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


def raise_for(status: torch.Tensor, changes: Changes) -> None:
    block = int(status)
    if block >= changes.counts.numel():
        raise ValueError("the lengths of positions and values are not those that the counts give")
    if block >= 0:
        raise ValueError(
            f"block {block} has positions out of range, repeated, out of order or not as many as it counts"
        )


def check(changes: Changes, numel: int) -> None:
    """Raises ValueError unless every position is in range, in order and there once, and all lengths agree.

    >>> changes, _ = gather(torch.zeros(3), torch.ones(3))
    >>> check(changes, 3)
    """
    fit(changes, numel)
    raise_for(
        torch.ops.opdkernels.patch_check(changes.counts, changes.positions, numel, changes.values.numel()), changes
    )


def scatter(
    base: torch.Tensor, changes: Changes, *, difference: bool = False, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The trained tensor from the base and its changes, and its digests, int64 [blocks, 2].

    base: as `gather`. difference: as it was for `gather`. out: a contiguous tensor of the base's dtype, shape and device,
    or the base itself. Nothing beyond the tensors is read or written, whatever `changes` holds.

    Raises TypeError for dtypes, ValueError for shapes, devices and changes that are not valid; `out` then holds nothing of use
    (call `check` first where it is the base).

    >>> w, v = torch.tensor([1.0, 2, 3]), torch.tensor([1.0, -0.0, 3])
    >>> scatter(w, gather(w, v)[0])[0].tolist()
    [1.0, -0.0, 3.0]
    """
    w = bits(base)
    fit(changes, w.numel())
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
    raise_for(status, changes)
    return out, digests


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """The digests of a tensor's blocks, int64 [blocks, 2]: the low and high words of XXH3-128. Raises TypeError as `gather`.

    >>> digest(torch.zeros(3)).shape
    torch.Size([1, 2])
    """
    return torch.ops.opdkernels.patch_digest(bits(tensor))
