"""Segments round-trip, and malformed ones are rejected before they are used."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdkernels.ops.patch import BITS, gather, scatter
from opdkernels.patch import segments
from opdkernels.patch.segments import Damaged, decode, digest_of, encode, find, fold_signs, unfold_signs
from tests.patch.conftest import changed, some


def coded(w: torch.Tensor, v: torch.Tensor, zstd: bool) -> torch.Tensor:
    changes, _ = gather(w, v, difference=zstd)
    return torch.cat(
        [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in encode(changes, zstd) if len(part)]
    )


def decoded(content: torch.Tensor, w: torch.Tensor, zstd: bool) -> torch.Tensor:
    decoded_segments = [
        decode(content[s.start : s.stop], s, w.element_size(), zstd)
        for s in find(lambda a, b: content[a:b], len(content), w.numel(), w.element_size())
    ]
    return scatter(w, decoded_segments[0], difference=zstd)[0]


@pytest.mark.parametrize("width", sorted(BITS))
@pytest.mark.parametrize("n", [1, 31, 1023, 1025, 70_001])
def test_segments_round_trip(width, n, zstd):
    for share in (0.0, 0.01, 0.2, 1.0):
        w = some((n,), BITS[width], 0)
        v = changed(w, share, 1)
        assert torch.equal(decoded(coded(w, v, zstd), w, zstd), v)


@settings(max_examples=60, deadline=None)
@given(width=st.sampled_from(sorted(BITS)), numbers=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50))
def test_folded_signs_round_trip(width, numbers):
    values = torch.tensor(numbers, dtype=torch.int64).to(BITS[width])
    assert torch.equal(unfold_signs(fold_signs(values), width), values)


def test_small_differences_fold_to_small_numbers():
    values = torch.tensor([0, -1, 1, -2, 2, -32768, 32767], dtype=torch.int16)
    planes = fold_signs(values).view(2, -1).int()
    assert (planes[0] + 256 * planes[1]).tolist() == [0, 1, 2, 3, 4, 65535, 65534]


def test_segment_layout_is_as_documented():
    """Byte by byte, for another reader: three of ten bf16 coordinates, at 1, 2 and 9."""
    w = torch.zeros(10, dtype=torch.int16)
    v = w.clone()
    v[torch.tensor([1, 2, 9])] = torch.tensor([258, 3, 4], dtype=torch.int16)
    content = coded(w, v, False).numpy().tobytes()
    parts = [struct.pack("<I4x", 3), bytes([0b110, 0b10]) + bytes(6), struct.pack("<3H2x", 258, 3, 4)]
    expected = digest_of(*(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts))
    assert content == struct.pack("<QQ16s", 24, 24, expected) + b"".join(parts)


def lying(content: torch.Tensor, length: int | None = None, stored: int | None = None) -> torch.Tensor:
    out = content.clone()
    old = struct.unpack_from("<QQ", out.numpy().tobytes())
    out[:16] = torch.frombuffer(
        bytearray(struct.pack("<QQ", old[0] if length is None else length, old[1] if stored is None else stored)),
        dtype=torch.uint8,
    )
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:20], "ends at byte 20, before segment 0"),
        (lambda c: c[:-1], "has a length of .* bytes for segment 0, more than there are"),
        (lambda c: torch.cat([c, c[:8]]), "has 8 bytes beyond its segments"),
        (lambda c: lying(c, stored=1 << 63), "more than there are"),
        (lambda c: lying(c, length=(1 << 64) - 1), "more than|zstd frame"),
        (lambda c: lying(c, length=0), "more than there are"),
        (lambda c: lying(c, length=100_000_000), "more than"),
    ],
    ids=["no header", "cut off", "more", "stored", "length", "no length", "a large length"],
)
def test_inconsistent_lengths_are_rejected(zstd, change: Callable, message):
    w = some((1000,), torch.int16, 0)
    content = coded(w, changed(w, 0.2, 1), zstd)
    with pytest.raises(Damaged, match=message):
        decoded(change(content), w, zstd)


def bytes_of(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("counts", "rest", "message"),
    [
        (2, bytes(300), "bytes in segment 0; its counts give 24"),
        (1_000_000, b"", "counts more changes than coordinates"),
        (0xFFFFFFFF, b"", "counts more changes than coordinates"),
        (2, struct.pack("<HH4xHH4x", 7, 7, 1, 1), "repeated, out of order"),
        (2, struct.pack("<HH4xHH4x", 9, 7, 1, 1), "repeated, out of order"),
        (2, struct.pack("<HH4xHH4x", 7, 1000, 1, 1), "positions out of range"),
    ],
    ids=["long", "many", "negative", "repeated", "unsorted", "beyond"],
)
def test_malformed_contents_are_rejected(counts, rest, message):
    """Counts, positions and values are validated although the digest is correct."""
    content = struct.pack("<I4x", counts) + rest
    expected = digest_of(*(bytes_of(content[at : at + 8]) for at in range(0, len(content), 8)))
    segment = bytes_of(struct.pack("<QQ16s", len(content), len(content), expected) + content)
    with pytest.raises(Damaged, match=message):
        decoded(segment, torch.zeros(1000, dtype=torch.int16), False)


def test_digest_and_content_of_zstd_frames_are_validated():
    content = struct.pack("<I4x", 900) + bytes(128) + bytes(1800)  # a mask without the bits that are counted
    frame = pa.Codec("zstd").compress(content, asbytes=True)
    w = torch.zeros(1000, dtype=torch.int16)
    for expected, message in (
        (digest_of(bytes_of(frame)), "not as many as it counts"),
        (bytes(16), "has a wrong digest in segment 0"),
    ):
        segment = bytes_of(struct.pack("<QQ16s", len(content), len(frame), expected) + frame)
        with pytest.raises(Damaged, match=message):
            decoded(segment, w, True)


def test_invalid_zstd_frame_is_rejected():
    w = torch.zeros(1000, dtype=torch.int16)
    junk = hashlib.sha256(b"").digest()
    segment = torch.frombuffer(bytearray(struct.pack("<QQ16s", 64, len(junk), bytes(16)) + junk), dtype=torch.uint8)
    with pytest.raises(Damaged, match="zstd frame in segment 0 that cannot be read"):
        decoded(segment, w, True)


def test_segments_are_multiples_of_blocks():
    for width in BITS:
        assert segments.size_of(width) % 65536 == 0
    assert list(segments.ranges(0, 2)) == []
    assert list(segments.ranges(segments.size_of(2) + 1, 2))[-1] == (1 << 22, (1 << 22) + 1)
