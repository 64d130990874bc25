"""The size of an update whose expected visible energy is the observed one.

E[k^2] is the expected square of the visible delta in units of the spacing; sizes are solved by bisection over all
tensors at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import numpy as np

from opdkernels.ops.null.histograms import Histograms


def rounded_square(x: np.ndarray, uniform: bool) -> np.ndarray:
    """E[k^2] for an update of x spacings."""
    if not uniform:
        return np.floor(x + 0.5) ** 2
    floor = np.floor(x)
    return floor * floor + (2 * floor + 1) * (x - floor)


def rounded_square_with_carry(x: np.ndarray, uniform: bool) -> np.ndarray:
    """The same with the steps of j or more spacings from j below a power of two, beyond which the spacing is double.

    One weight of 128 for each j, on half of the signs: a part in a thousand, but it decides on which side of a jump a
    size is.
    """
    square = rounded_square(x, uniform)
    below = np.arange(1, 17)
    few = (x >= 1) & (x < 16)  # beyond, jumps are small and average out
    y = x[few][:, None]
    carried = (below + 2 * np.floor((y - below) / 2 + 0.5)) ** 2 - square[few][:, None]
    square[few] += np.where(y >= below, carried, 0).sum(1) / 256
    return square


def rounded_square_integral(x: np.ndarray, uniform: bool) -> np.ndarray:
    """Integral of `rounded_square` from 0 to x."""
    if uniform:
        floor = np.floor(x)
        part = x - floor
        steps = (floor - 1) * floor * (2 * floor - 1) / 6 + floor * floor / 2
        return steps + floor * floor * part + (floor + 0.5) * part * part
    floor = np.floor(x + 0.5)
    return (floor - 1) * floor * (2 * floor - 1) / 6 + floor * floor * np.where(floor > 0, x - (floor - 0.5), 0.0)


@cache
def normal_square(uniform: bool) -> tuple[np.ndarray, np.ndarray]:
    """log2 E[k^2] for a normal update, against log2 of its standard deviation in spacings, from 1/32 to 2."""
    log_size = np.linspace(-5.0, 1.0, 6 * 512 + 1)
    size, k = np.exp2(log_size)[:, None], np.arange(20)
    if uniform:  # sum over k of (2k + 1) times the integral of P(x > y) over (k, k + 1), summed by parts
        tail = size * math.sqrt(2 / math.pi) * np.exp(-((k / size) ** 2) / 2) - k * (1 - erf(k / size / math.sqrt(2)))
        return log_size, np.log2(tail[:, 0] + 2 * tail[:, 1:].sum(1))
    erfc = np.asarray(np.frompyfunc(math.erfc, 1, 1)((k + 0.5) / size / math.sqrt(2)), float)
    return log_size, np.log2(((2 * k + 1) * erfc).sum(1))


def erf(x: np.ndarray) -> np.ndarray:
    """The error function."""
    import torch

    return torch.special.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def normal_energy(size: np.ndarray, uniform: bool) -> np.ndarray:
    """E[k^2] for a normal update with standard deviation `size` in spacings."""
    log_size, log_energy = normal_square(uniform)
    below = math.sqrt(2 / math.pi) * size if uniform else 0.0
    inside = np.exp2(np.interp(np.log2(size), log_size, log_energy))
    # From two spacings on, rounding adds its own variance and nothing else (Sheppard; the error is below 1e-30).
    return np.where(size < 2**-5, below, np.where(size < 2, inside, size * size + (1 / 6 if uniform else 1 / 12)))


def solve(
    target: np.ndarray,
    energy: Callable[[np.ndarray], np.ndarray],
    low: np.ndarray,
    high: np.ndarray,
    halvings: int = 34,
) -> np.ndarray:
    """The sizes in (low, high) whose energy is nearest to the target; the energy grows with size, perhaps in jumps."""
    low, high = np.log2(low), np.log2(high)
    for _ in range(halvings):
        middle = (low + high) / 2
        under = energy(np.exp2(middle)) < target
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    low, high = np.exp2(low), np.exp2(high)
    return np.where(target - energy(low) < energy(high) - target, low, high)


def solve_by_spacing(tables: Histograms, *squares: Callable[[np.ndarray, bool], np.ndarray]) -> np.ndarray:
    """Size [T] of a kind whose E[k^2] depends on its size in spacings, 0 where nothing changed.

    The first of `squares` brackets the size, the others refine it.
    """
    used = np.flatnonzero(tables.spacing.any(0))
    if not len(used):
        return np.zeros(len(tables.numel))
    spacing, counts = np.exp2(used - 134.0), tables.spacing[:, used]
    moved = tables.energy > 0
    rms = np.sqrt(np.where(moved, tables.energy, 1.0) / np.maximum(tables.numel, 1))
    widest = spacing[len(used) - 1 - np.argmax(counts[:, ::-1] > 0, axis=1)]

    def energy(size: np.ndarray, square: Callable[[np.ndarray, bool], np.ndarray]) -> np.ndarray:
        return square(size[:, None] / spacing, tables.uniform) * counts @ spacing**2

    # Visible steps are at most twice the update, so 0.4 rms is too small, unless there is a remainder; the upper end is
    # far too large.
    low = rms**2 / np.maximum(widest, rms) / 8 if tables.uniform else rms * 0.4
    size = solve(tables.energy, partial(energy, square=squares[0]), low, 4 * np.maximum(widest, rms))
    for square in squares[1:]:
        size = solve(tables.energy, partial(energy, square=square), size * 0.9, size * 1.1, 14)
    return np.where(moved, size, 0.0)
