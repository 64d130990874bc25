"""Batches of tallies: the input of the formulas in `coordinates.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opdkernels.ops.delta import exact_floats, magnitudes
from opdkernels.ops.delta.layout import (
    COUNT_BIT_EQUAL,
    COUNT_NONFINITE,
    COUNT_NUMEL,
    HIST_BASE,
    HIST_BASE_CHANGED,
    HIST_BASE_OVER,
    HIST_DELTA,
    HIST_TRAINED_CHANGED,
)
from opdkernels.ops.delta.many import SparseTally
from opdkernels.spectral.exact import RATIOS

EPSILON = 1e-12


def threshold_label(value: float) -> str:
    """A threshold as in column names: 1e-5, not 1e-05."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def ratio_label(ratio: float) -> str:
    """A ratio as in column names: 10pct, 0.1pct."""
    return f"{ratio * 100:g}pct"


def to_bf16_bits(value: float) -> int:
    """bf16 bits of a threshold, rounded as torch rounds a scalar that is compared with a bf16 tensor."""
    bits = int(np.float32(value).view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


class TallyBatch:
    """Tallies of several tensors, concatenated: the bins of tensor t are at `start[t]` .. `stop[t]`."""

    def __init__(self, tallies: Sequence[SparseTally]):
        self.tallies = tallies
        sizes = np.array([len(t.bin_bits) for t in tallies], np.int64)
        self.stop = np.cumsum(sizes)
        self.start = self.stop - sizes
        self.bin_bits = np.concatenate([t.bin_bits for t in tallies])
        self.values = magnitudes[self.bin_bits]
        self.key = np.repeat(np.arange(len(tallies)) << 16, sizes) + self.bin_bits
        counts = np.stack([t.counts for t in tallies])
        self.counts = counts
        self.numel, self.nonfinite = counts[:, COUNT_NUMEL], counts[:, COUNT_NONFINITE]
        self.bit_equal = counts[:, COUNT_BIT_EQUAL]
        self.finite = self.numel - self.nonfinite
        self._energies: dict[str, np.ndarray] = {}
        self.n = np.where(self.finite > 0, self.finite, np.nan)  # a fraction of nothing is NaN

    def table(self, row: int) -> np.ndarray:
        """One histogram of all tensors, int64 [bins]."""
        return np.concatenate([t.tables[row] for t in self.tallies], dtype=np.int64)

    def changed(self, view: str) -> np.ndarray:
        """Histogram of |W| over the coordinates whose delta is not 0, int64 [bins]."""
        return self.table(HIST_BASE_CHANGED if view == "stored" else HIST_BASE_OVER)

    def energies(self, view: str) -> np.ndarray:
        """float64 [4, tensors]: sum W^2, sum W'^2, sum delta^2, sum |delta|."""
        if view not in self._energies:
            self._energies[view] = self._stored_energies() if view == "stored" else self._visible_energies()
        return self._energies[view]

    def _stored_energies(self) -> np.ndarray:
        return exact_floats(np.stack([t.sums for t in self.tallies])).T

    def _visible_energies(self) -> np.ndarray:
        base, delta = self.table(HIST_BASE), self.table(HIST_DELTA)
        trained = base - self.table(HIST_BASE_OVER) + self.table(HIST_TRAINED_CHANGED)
        squares = self.values**2
        # Not by BLAS, whose order of summation depends on the machine and the number of threads.
        terms = base * squares, trained * squares, delta * squares, delta * self.values
        return np.stack([self.sums(values, self.start, self.stop) for values in terms])

    def find(self, bf16_bits: np.ndarray) -> np.ndarray:
        """Index of the first bin of each tensor at or above `bf16_bits` [tensors or 1, k] -> [tensors, k]."""
        return np.searchsorted(self.key, (np.arange(len(self.tallies)) << 16)[:, None] + bf16_bits)

    def sums(self, values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Sum of values over bins begin .. end of each tensor, in bin order -> [tensors]."""
        edges = np.stack([begin, end], 1).ravel()
        return np.where(begin < end, np.add.reduceat(np.append(values, 0), edges)[::2], 0)


def prefix_sums(counts: np.ndarray) -> np.ndarray:
    """Exclusive prefix sums and the total [bins] -> [bins + 1]."""
    return np.concatenate(([0], np.cumsum(counts)))


RATIO_LABELS = [ratio_label(r) for r in RATIOS]
RATIO_SYMBOL = "1, 5, 10 or 20 %"  # in docs/outputs.md
Columns = dict[str, np.ndarray]  # metric name -> [tensors]
