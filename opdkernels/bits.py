"""Counts of set bits in arrays of bytes, one bit a coordinate, little-endian."""

from __future__ import annotations

import numpy as np

BYTE_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def bit_counts(bits: np.ndarray) -> np.ndarray:
    """Set bits of each byte, uint8.

    >>> bit_counts(np.array([0, 7, 255], np.uint8)).tolist()
    [0, 3, 8]
    """
    return np.bitwise_count(bits) if hasattr(np, "bitwise_count") else BYTE_COUNTS[bits]  # NumPy 1 has none


def popcount(bits: np.ndarray) -> int:
    """Set bits of all bytes of a contiguous array [n], eight at a time."""
    if not hasattr(np, "bitwise_count"):
        return int(bit_counts(bits).sum(dtype=np.int64))
    whole = len(bits) // 8 * 8
    words, rest = bits[:whole].view(np.uint64), bits[whole:]
    return sum(int(np.bitwise_count(part).sum(dtype=np.int64)) for part in (words, rest))
