"""The stored changes of a tensor: segments of 8 MiB of items, each with its length and digest.

A segment is a header of 32 bytes (length of its content, length of the stored bytes, digest of the stored bytes) and
the stored bytes: the content, or a zstd frame of it if that is shorter. The content is counts, positions and values of
`ops.patch`, each padded with zeros to a multiple of 8 bytes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from opdkernels.ops.patch import BITS, Changes, check, digest, position_bytes
from opdkernels.ops.patch.layout import BLOCK, blocks_of

SEGMENT_BYTES = 1 << 23
HEADER = struct.Struct("<QQ16s")
SHIFTS = {torch.int8: 7, torch.int16: 15, torch.int32: 31, torch.int64: 63}


class Damaged(ValueError):
    """The stored bytes are not those of `create`; the message is a verb phrase about the data."""


def size_of(width: int) -> int:
    """Returns the number of items of `width` bytes in a segment, a multiple of the block size."""
    return SEGMENT_BYTES // width


def ranges(items: int, width: int) -> Iterator[tuple[int, int]]:
    """Yields the items [start, stop) of each segment of a tensor."""
    for start in range(0, items, size_of(width)):
        yield start, min(start + size_of(width), items)


def digest_of(*parts: torch.Tensor) -> bytes:
    """Returns blake2b-128 of the XXH3 digests of the parts' blocks, in order."""
    return hashlib.blake2b(b"".join(digest(part).numpy().tobytes() for part in parts), digest_size=16).digest()


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of a tensor, padded with zeros to a multiple of 8; a view if no padding is needed."""
    data = tensor.view(torch.uint8)
    rest = -len(data) % 8
    return torch.cat([data, data.new_zeros(rest)]) if rest else data


def fold_signs(values: torch.Tensor) -> torch.Tensor:
    """Returns differences as zigzag integers (0, -1, 1, -2 … to 0, 1, 2, 3 …) in byte planes, which compress well."""
    width = values.element_size()
    values = values.view(torch.int8) if width == 1 else values
    folded = ((values << 1) ^ (values >> SHIFTS[values.dtype])).view(torch.uint8).view(-1, width).numpy()
    planes = np.empty((width, len(values)), np.uint8)
    for i in range(width):  # ten times faster than transposing such narrow columns
        planes[i] = folded[:, i]
    return torch.from_numpy(planes).flatten()


def unfold_signs(planes: torch.Tensor, width: int) -> torch.Tensor:
    """Returns the differences: the inverse of `fold_signs`."""
    dtype = torch.int8 if width == 1 else BITS[width]
    rows = planes.view(width, -1).numpy()
    columns = np.empty((rows.shape[1], width), np.uint8)
    for i in range(width):
        columns[:, i] = rows[i]
    folded = torch.from_numpy(columns).flatten().view(dtype)
    values = ((folded >> 1) & torch.iinfo(dtype).max) ^ -(folded & 1)
    return values.view(BITS[width])


def encode(changes: Changes, zstd: bool) -> list[memoryview]:
    """Returns the bytes of a segment in parts, views of the changes if possible; with zstd, values are differences."""
    values = fold_signs(changes.values) if zstd else changes.values
    parts = [padded(part) for part in (changes.counts, changes.positions, values)]
    length = stored = sum(map(len, parts))
    if zstd:
        frame = np.frombuffer(pa.Codec("zstd").compress(torch.cat(parts).numpy().data), np.uint8)
        if len(frame) < length:
            parts, stored = [torch.from_numpy(frame.copy())], len(frame)
    header = HEADER.pack(length, stored, digest_of(*parts))
    return [memoryview(header), *(part.numpy().data for part in parts)]


@dataclass(frozen=True)
class Segment:
    """Items [first, last) of a tensor, the stored bytes [start, stop) of its entry, and the fields of its header."""

    first: int
    last: int
    start: int
    stop: int
    length: int
    digest: bytes
    where: str


def find(read: Callable[[int, int], torch.Tensor], size: int, items: int, width: int) -> Iterator[Segment]:
    """Yields the segments of an entry of `size` bytes for `items` items. Raises Damaged unless they fill it."""
    offset = 0
    for index, (first, last) in enumerate(ranges(items, width)):
        if offset + HEADER.size > size:
            raise Damaged(f"ends at byte {size}, before segment {index}")
        length, stored, expected = HEADER.unpack(read(offset, offset + HEADER.size).numpy().tobytes())
        offset += HEADER.size
        if stored > length or stored > size - offset:
            raise Damaged(f"has a length of {stored} bytes for segment {index}, more than there are")
        yield Segment(first, last, offset, offset + stored, length, expected, f"in segment {index}")
        offset += stored
    if offset != size:
        raise Damaged(f"has {size - offset} bytes beyond its segments")


def decode(stored: torch.Tensor, segment: Segment, width: int, difference: bool) -> Changes:
    """Returns the changes of a segment. Raises Damaged unless they are complete and valid."""
    where = segment.where
    content = stored if len(stored) == segment.length else _decompressed(stored, segment, width)
    numel = segment.last - segment.first
    blocks = blocks_of(numel)
    edge = 4 * blocks + 4 * blocks % 8
    if len(content) < edge:
        raise Damaged(f"is too short for its counts {where}")
    counts = content[: 4 * blocks].clone().view(torch.int32)
    sizes = [(count, min(BLOCK, numel - block * BLOCK)) for block, count in enumerate(counts.tolist())]
    if any(not 0 <= count <= size for count, size in sizes):
        raise Damaged(f"counts more changes than coordinates {where}")
    n_positions, n_values = sum(position_bytes(*size) for size in sizes), sum(count for count, _ in sizes) * width
    middle = edge + n_positions + -n_positions % 8
    if len(content) != middle + n_values + -n_values % 8:
        expected = middle + n_values + -n_values % 8
        raise Damaged(f"has {len(content)} bytes {where}; its counts give {expected}")
    parts = content[:edge], content[edge:middle], content[middle:]
    if digest_of(*(parts if content is stored else (stored,))) != segment.digest:
        raise Damaged(f"has a wrong digest {where}")
    values = parts[2][:n_values]
    if difference:
        values = unfold_signs(values, width)
    elif values.storage_offset() % width or values.data_ptr() % width:
        values = values.clone()
    changes = Changes(counts, parts[1][:n_positions], values.view(BITS[width]))
    try:
        check(changes, numel)
    except ValueError as error:
        raise Damaged(f"is not valid {where}: {error}") from None
    return changes


def _decompressed(stored: torch.Tensor, segment: Segment, width: int) -> torch.Tensor:
    numel = segment.last - segment.first
    most = 4 * blocks_of(numel) + (numel + 7) // 8 + numel * width + 24
    if segment.length > most:
        raise Damaged(f"has a length of {segment.length} bytes {segment.where}, more than {most}")
    try:
        content = pa.Codec("zstd").decompress(stored.numpy().data, segment.length)
    except (pa.ArrowException, OSError, ValueError):
        raise Damaged(f"has a zstd frame {segment.where} that cannot be read") from None
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())
