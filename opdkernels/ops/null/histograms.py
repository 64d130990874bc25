"""The histograms of |W| and |visible delta| of several tensors, concatenated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opdkernels.backends.layout import BINS

MAX_NUMEL = 1 << 53  # doubles count coordinates
INFINITY = 0x7F80  # bf16 bits of the first magnitude that is not finite


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
    spacing: np.ndarray  # [T, 256] counts of |W| by exponent e, spacing 2**(e - 134); a power of two has two spacings

    @classmethod
    def of(
        cls, sizes: np.ndarray, bin_bits: np.ndarray, base: np.ndarray, delta: np.ndarray, uniform: bool
    ) -> Histograms:
        """The histograms of tensors whose bins are given one after another.

        Args:
            sizes: Number of bins of each tensor [T].
            bin_bits: bf16 bits of the bins, ascending in each tensor [bins].
            base: Coordinates whose |W| is in each bin [bins].
            delta: Coordinates whose |visible delta| is in each bin [bins].
            uniform: Whether W is stored wider than bf16.

        Raises:
            ValueError: No finite tensors have these histograms.
        """
        count, tensor = len(sizes), np.repeat(np.arange(len(sizes)), sizes)
        ascending = (np.diff(bin_bits) > 0) | (np.diff(tensor) > 0)
        if len(bin_bits) and not (bin_bits.min() >= 0 and bin_bits.max() < BINS and ascending.all()):
            raise ValueError("bf16 bits must be magnitudes, 0 to 32767, unique and ascending")
        if (base < 0).any() or (delta < 0).any():
            raise ValueError("counts must not be negative")
        if base[bin_bits >= INFINITY].any():
            raise ValueError("the histogram of |W| contains infinities or NaN; pass finite coordinates only")
        # Sums in floating point, which reach the limit where the exact ones do.
        if any((np.bincount(tensor, side, count) >= MAX_NUMEL).any() for side in (base, delta)):
            raise ValueError("a tensor has 2^53 or more coordinates")
        numel = sum_by(tensor, base, count)
        if (numel != sum_by(tensor, delta, count)).any():
            raise ValueError("the histograms of |W| and delta have different numbers of coordinates")
        changed = (delta > 0) & (bin_bits > 0)
        delta_tensor, delta_count = tensor[changed], delta[changed]
        # A difference of finite weights can overflow; it counts as the largest finite value.
        largest = np.minimum(bin_bits[changed], INFINITY - 1)
        used = base > 0
        tensor, pattern, counts = tensor[used], bin_bits[used], base[used]
        exponent, below = exponent_of(pattern), half_spacing(pattern, uniform)
        spacing = sum_by(tensor * 256 + exponent, counts * (1 - below), count * 256)
        spacing += sum_by(tensor * 256 + exponent - 1, counts * below, count * 256)
        return cls(
            uniform=uniform,
            numel=numel,
            tensor=tensor,
            pattern=pattern,
            count=counts,
            delta_tensor=delta_tensor,
            delta_pattern=largest,
            delta_count=delta_count,
            unchanged=numel - sum_by(delta_tensor, delta_count, count),
            energy=sum_by(delta_tensor, delta_count * magnitude(largest) ** 2, count),
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
