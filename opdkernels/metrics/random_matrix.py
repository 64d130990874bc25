"""Spectra of large random matrices with independent entries of one variance (Marchenko and Pastur 1967)."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

TOP = (1, 2, 4, 8, 16, 32, 64)  # numbers of singular values whose energy is reported
TRACY_WIDOM_DEVIATION = 1.2680  # standard deviation of the Tracy-Widom law of real matrices


@cache
def marchenko_pastur(y: float) -> tuple[np.ndarray, np.ndarray]:
    """The Marchenko-Pastur law for y = short / long.

    Returns angles t in 0 .. pi, each for the eigenvalue 1 + y + 2 sqrt(y) cos t, and the fraction of eigenvalues above
    it.
    """
    t = np.linspace(0, math.pi, 20_001)
    with np.errstate(invalid="ignore", divide="ignore"):
        density = np.nan_to_num(2 * np.sin(t) ** 2 / (math.pi * (1 + y + 2 * math.sqrt(y) * np.cos(t))), posinf=0)
    above = np.concatenate(([0], np.cumsum((density[1:] + density[:-1]) / 2 * (t[1] - t[0]))))
    return t, above / above[-1]


def random_decay(m: int, n: int, positions: np.ndarray) -> np.ndarray:
    """s_i / s_1 of a random [m, n] matrix at i = position * min(m, n), positions in 0 .. 1, for large m and n."""
    y = min(m, n) / max(m, n)
    t, above = marchenko_pastur(y)
    root = math.sqrt(y)
    return np.sqrt(np.maximum(1 + y + 2 * root * np.cos(np.interp(positions, above, t)), 0)) / (1 + root)


@cache
def random_spectrum(m: int, n: int) -> tuple[float, dict[int, float]]:
    """Stable rank, and fraction of the energy in the top k, of a random [m, n] matrix, for large m and n.

    Its entries are independent with one variance, whichever of them are zero: an update without direction (Marchenko
    and Pastur 1967).

    >>> stable_rank, energy = random_spectrum(896, 4864)
    >>> round(stable_rank), round(energy[16], 4)
    (439, 0.0351)
    """
    short, long = sorted((m, n))
    t, above = marchenko_pastur(short / long)
    energy = (t - np.sin(t) * np.cos(t)) / math.pi  # in the eigenvalues above t
    top_energy = {k: float(np.interp(min(k / short, 1), above, energy)) for k in TOP}
    return m * n / (math.sqrt(m) + math.sqrt(n)) ** 2, top_energy


def largest_eigenvalue_deviation(m: int, n: int) -> float:
    """Relative standard deviation of the largest squared singular value of a random [m, n] matrix, for large m and n.

    Source: Johnstone 2001, Annals of Statistics 29.

    >>> round(largest_eigenvalue_deviation(896, 896), 4)
    0.0086
    """
    root = math.sqrt(m) + math.sqrt(n)
    return TRACY_WIDOM_DEVIATION * (1 / math.sqrt(m) + 1 / math.sqrt(n)) ** (1 / 3) / root
