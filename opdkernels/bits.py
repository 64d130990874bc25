"""Population counts of byte arrays, and the narrowest dtype of integers."""

from __future__ import annotations

import numpy as np

BYTE_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def bit_counts(bits: np.ndarray) -> np.ndarray:
    """The number of set bits of each byte, uint8.

    Examples:
        >>> bit_counts(np.array([0, 7, 255], np.uint8)).tolist()
        [0, 3, 8]
    """
    return np.bitwise_count(bits) if hasattr(np, "bitwise_count") else BYTE_COUNTS[bits]  # not in NumPy 1


def popcount(bits: np.ndarray) -> int:
    """The number of set bits of a contiguous uint8 array [n], counted in words of eight bytes.

    Examples:
        >>> popcount(np.array([0, 7, 255], np.uint8))
        11
    """
    if not hasattr(np, "bitwise_count"):
        return int(bit_counts(bits).sum(dtype=np.int64))
    end = len(bits) // 8 * 8
    words, tail = bits[:end].view(np.uint64), bits[end:]
    return sum(int(np.bitwise_count(array).sum(dtype=np.int64)) for array in (words, tail))


def narrowest_dtype(values: np.ndarray) -> type[np.integer]:
    """The narrowest of uint16, uint32 and int64 that holds every integer of an array.

    Examples:
        >>> narrowest_dtype(np.array([1, 70_000])).__name__
        'uint32'
    """
    largest = int(values.max(initial=0)) if values.min(initial=0) >= 0 else 1 << 32
    return np.uint16 if largest < 1 << 16 else np.uint32 if largest < 1 << 32 else np.int64
