"""Tallies with only the bins in use, and batches of them: the input of the formulas in `coordinates.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from opdkernels.ops.delta import Tally, exact_float, from_limbs, magnitudes
from opdkernels.ops.delta.layout import (
    COUNT_BIT_EQUAL,
    COUNT_NONFINITE,
    COUNT_NUMEL,
    COUNT_ULP,
    HIST_BASE,
    HIST_BASE_CHANGED,
    HIST_BASE_OVER,
    HIST_DELTA,
    HIST_DELTA_STORED,
    HIST_TRAINED_CHANGED,
)
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


@dataclass(frozen=True)
class SparseTally:
    """A tally with only the bins in use.

    Attributes:
        threshold_bits: bf16 bits of the thresholds that visible |delta| was compared with.
        bin_bits: bf16 bits of the magnitude of each bin, ascending, int64 [bins].
        tables: Histograms, int64 [5 + len(threshold_bits), bins], rows as in `ops.delta.layout`.
        counts: int64 [NUM_COUNTS], as in `ops.delta.layout`.
        sums: Exact sums as int64 limbs [NUM_SUMS, SUM_LIMBS].
        max_delta: The largest stored |delta|.
    """

    threshold_bits: tuple[int, ...]
    bin_bits: np.ndarray
    tables: np.ndarray
    counts: np.ndarray
    sums: np.ndarray
    max_delta: float

    @classmethod
    def of(cls, tally: Tally) -> SparseTally:
        """The bins in use of a dense tally."""
        tables = tally.tables  # HIST_BASE_CHANGED and HIST_BASE_OVER are subsets of HIST_BASE
        used = np.flatnonzero(
            tables[HIST_BASE] | tables[HIST_DELTA] | tables[HIST_TRAINED_CHANGED] | tables[HIST_DELTA_STORED]
        )
        return cls(
            tally.threshold_bits, used, tally.tables[:, used], tally.counts.copy(), tally.sums.copy(), tally.max_delta
        )

    def dense(self) -> Tally:
        """The dense tally."""
        tally = Tally.empty(self.threshold_bits)
        tally.tables[:, self.bin_bits] = self.tables
        tally.counts[:], tally.sums[:], tally.maximum[:] = self.counts, self.sums, self.max_delta
        return tally

    numel = property(lambda self: int(self.counts[COUNT_NUMEL]))
    nonfinite = property(lambda self: int(self.counts[COUNT_NONFINITE]))
    bit_equal = property(lambda self: int(self.counts[COUNT_BIT_EQUAL]))
    finite = property(lambda self: self.numel - self.nonfinite)
    hist_base = property(lambda self: self.tables[HIST_BASE])
    hist_delta = property(lambda self: self.tables[HIST_DELTA])
    ulp = property(lambda self: self.counts[COUNT_ULP:])

    def changed(self, view: str) -> np.ndarray:
        """Histogram of |W| over the coordinates whose delta is not 0, int64 [bins]."""
        return self.tables[HIST_BASE_CHANGED if view == "stored" else HIST_BASE_OVER]

    @cached_property
    def energies(self) -> dict[str, tuple[float, float, float, float]]:
        """view -> (sum W^2, sum W'^2, sum delta^2, sum |delta|)."""
        values = magnitudes[self.bin_bits]
        squares = values**2
        trained = self.hist_base - self.tables[HIST_BASE_OVER] + self.tables[HIST_TRAINED_CHANGED]
        visible = (
            (self.hist_base, squares),
            (trained, squares),
            (self.hist_delta, squares),
            (self.hist_delta, values),
        )
        return {
            "stored": tuple(exact_float(from_limbs(row)) for row in self.sums),  # type: ignore[dict-item]
            # Not by BLAS, whose summation order depends on the machine and the number of threads.
            "visible": tuple(float((counts * v).sum()) for counts, v in visible),  # type: ignore[dict-item]
        }


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
        self.n = np.where(self.finite > 0, self.finite, np.nan)  # a fraction of nothing is NaN

    def table(self, row: int) -> np.ndarray:
        """One histogram of all tensors, int64 [bins]."""
        return np.concatenate([t.tables[row] for t in self.tallies])

    def changed(self, view: str) -> np.ndarray:
        """Histogram of |W| over the coordinates whose delta is not 0, int64 [bins]."""
        return self.table(HIST_BASE_CHANGED if view == "stored" else HIST_BASE_OVER)

    def energies(self, view: str) -> np.ndarray:
        """float64 [4, tensors]: sum W^2, sum W'^2, sum delta^2, sum |delta|."""
        return np.array([t.energies[view] for t in self.tallies]).T

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
