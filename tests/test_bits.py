"""Bits are counted alike with NumPy 1 and 2, at any length."""

from __future__ import annotations

import numpy as np
import pytest

from opdkernels.bits import bit_counts, popcount


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000, 1023])
def test_bits_are_counted_with_and_without_numpy_2(monkeypatch, size):
    bits = np.frombuffer(np.random.default_rng(size).bytes(size), np.uint8)
    expected = np.unpackbits(bits.reshape(-1, 1), axis=1).sum(1)
    for _ in range(2):
        assert bit_counts(bits).tolist() == expected.tolist()
        assert popcount(bits) == expected.sum()
        monkeypatch.delattr(np, "bitwise_count", raising=False)
