"""The histograms of |W| and |visible delta| of several tensors, concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opdkernels.backends.layout import BINS

INFINITY = 0x7F80  # bf16 bits of the first magnitude that is not finite

Table = np.ndarray | tuple[np.ndarray, np.ndarray]  # int64 [BINS], or (bf16 bits ascending, counts)


def flatten(tables: Sequence[Table]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tensor number, bf16 bits and count of every used bin."""
    sparse = []
    for table in tables:
        if isinstance(table, tuple):
            bin_bits, counts = np.asarray(table[0], np.int64), np.asarray(table[1], np.int64)
        else:
            bin_bits = np.flatnonzero(table)
            counts = np.asarray(table)[bin_bits].astype(np.int64)
        if len(bin_bits) and not (bin_bits[0] >= 0 and bin_bits[-1] < BINS and np.all(np.diff(bin_bits) > 0)):
            raise ValueError("bf16 bits must be magnitudes, 0 to 32767, unique and ascending")
        sparse.append((bin_bits, counts))
    tensor = np.repeat(np.arange(len(sparse)), [len(p) for p, _ in sparse])
    empty = np.zeros(0, np.int64)
    return (
        tensor,
        np.concatenate([p for p, _ in sparse] or [empty]),
        np.concatenate([c for _, c in sparse] or [empty]),
    )


def magnitude(bin_bits: np.ndarray) -> np.ndarray:
    """The values of bf16 bits, float64."""
    return (bin_bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Histograms:
    """The histograms of T tensors with the same remainder: used bins concatenated, and counts of |W| by spacing."""

    uniform: bool
    numel: np.ndarray  # [T] int64
    tensor: np.ndarray  # [used |W| bins]
    pattern: np.ndarray
    count: np.ndarray
    delta_tensor: np.ndarray  # [used |visible delta| bins, without 0]
    delta_pattern: np.ndarray
    delta_count: np.ndarray
    unchanged: np.ndarray  # [T]
    energy: np.ndarray  # [T] sum of |visible delta|^2
    spacing: (
        np.ndarray
    )  # [T, 256] counts of |W| by exponent e, spacing 2**(e - 134), powers of two split between two spacings

    @classmethod
    def of(cls, base: Sequence[Table], delta: Sequence[Table], uniform: bool) -> Histograms:
        count = len(base)
        tensor, pattern, counts = flatten(base)
        delta_tensor, delta_pattern, delta_counts = flatten(delta)
        numel = sum_by(tensor, counts, count)
        if np.any(pattern >= INFINITY):
            raise ValueError("the histogram of |W| contains infinities or NaN; pass finite coordinates only")
        if np.any(numel != sum_by(delta_tensor, delta_counts, count)):
            raise ValueError("the histograms of |W| and delta have different numbers of coordinates")
        moved = delta_pattern > 0
        unchanged = numel - sum_by(delta_tensor[moved], delta_counts[moved], count)
        # A difference of finite weights can overflow; it counts as the largest finite value.
        largest = np.minimum(delta_pattern[moved], INFINITY - 1)
        energy = sum_by(delta_tensor[moved], delta_counts[moved] * magnitude(largest) ** 2, count)
        exponent, below = exponent_of(pattern), half_spacing(pattern, uniform)
        spacing = sum_by(tensor * 256 + exponent, counts * (1 - below), count * 256)
        spacing += sum_by(tensor * 256 + exponent - 1, counts * below, count * 256)
        return cls(
            uniform=uniform,
            numel=numel,
            tensor=tensor,
            pattern=pattern,
            count=counts,
            delta_tensor=delta_tensor[moved],
            delta_pattern=largest,
            delta_count=delta_counts[moved],
            unchanged=unchanged,
            energy=energy,
            spacing=spacing.reshape(count, 256),
        )


def sum_by(group: np.ndarray, values: np.ndarray, groups: int) -> np.ndarray:
    """Sums of values by group [groups], int64 or float64."""
    sums = np.bincount(group, weights=values, minlength=groups)
    # Without values, bincount returns integers whatever the weights are.
    return sums.astype(np.int64 if values.dtype == np.int64 else np.float64)


def exponent_of(pattern: np.ndarray) -> np.ndarray:
    """Exponent field that determines the spacing at bf16 bits."""
    return np.maximum(pattern >> 7, 1)  # subnormals have the spacing of exponent 1


def half_spacing(pattern: np.ndarray, uniform: bool) -> np.ndarray:
    """The fraction of a bin's coordinates for which the spacing is half as wide.

    Below a power of two the spacing is half as wide: half of its coordinates move there. With a remainder the
    rounding interval is (-u/4, u/2) and P(hidden) = 1 - x / (3u/4) for either sign, which is what a third of half
    spacings and two thirds of whole ones give as long as x < u/2.
    """
    return np.where((pattern & 127 == 0) & (pattern >= 256), 1 / 3 if uniform else 1 / 2, 0.0)
