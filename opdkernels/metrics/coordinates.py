"""Coordinate-wise figures of tensors, from their tallies alone (metrics: arXiv 2606.13657 and its script; see each function).

Both views, always: `stored` is what training did, `visible` what a bf16 deployment sees. Figures are columns, float64
with one entry a tensor, computed for many tensors at once: a model may have twenty thousand experts. NaN stands for a
figure that the tally cannot give. Fractions are of the finite coordinates; norms and maxima are in the units of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from opdkernels.ops.delta import (
    CHANGED,
    DELTA,
    MOVED,
    SOURCE,
    STORED,
    THRESHOLDS,
    TRAINED,
    Tally,
    exact_float,
    from_limbs,
    magnitudes,
)

VIEWS = ("stored", "visible")
RELATIVE = (1e-4, 1e-3, 1e-2)
TOP_SHARES = (0.001, 0.01, 0.05)
RATIOS = (0.01, 0.05, 0.1, 0.2)
EPSILON = 1e-12


def threshold_label(value: float) -> str:
    """How thresholds are printed: 1e-5, not 1e-05."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def ratio_label(ratio: float) -> str:
    """10pct, 0.1pct."""
    return f"{ratio * 100:g}pct"


def to_bf16_pattern(value: float) -> int:
    """Magnitude pattern of a threshold rounded to bf16, as torch rounds a scalar beside a bf16 tensor."""
    bits = int(np.float32(value).view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


@dataclass(frozen=True)
class SparseTally:
    """A tally with only the bins in use: `tables` [5 + cuts, bins] int64 at ascending `patterns` [bins]."""

    cuts: tuple[int, ...]
    patterns: np.ndarray
    tables: np.ndarray
    counts: np.ndarray
    sums: np.ndarray
    max_delta: float

    @classmethod
    def of(cls, tally: Tally) -> SparseTally:
        tables = tally.tables  # moved and changed are parts of source
        used = np.flatnonzero(tables[SOURCE] | tables[DELTA] | tables[TRAINED] | tables[STORED])
        return cls(tally.cuts, used, tally.tables[:, used], tally.counts.copy(), tally.sums.copy(), tally.max_delta)

    def dense(self) -> Tally:
        tally = Tally.empty(self.cuts)
        tally.tables[:, self.patterns] = self.tables
        tally.counts[:], tally.sums[:], tally.maximum[:] = self.counts, self.sums, self.max_delta
        return tally

    numel = property(lambda self: int(self.counts[0]))
    nonfinite = property(lambda self: int(self.counts[1]))
    bit_equal = property(lambda self: int(self.counts[2]))
    finite = property(lambda self: self.numel - self.nonfinite)
    source = property(lambda self: self.tables[SOURCE])
    delta = property(lambda self: self.tables[DELTA])
    moved = property(lambda self: self.tables[MOVED])
    stored = property(lambda self: self.tables[STORED])
    ulp = property(lambda self: self.counts[14:])

    def changed(self, view: str) -> np.ndarray:
        """|W| table of the coordinates whose delta is not 0."""
        return self.tables[MOVED if view == "stored" else CHANGED]

    @cached_property
    def energies(self) -> dict[str, tuple[float, float, float, float]]:
        """view -> sum W^2, sum W'^2, sum delta^2, sum |delta|."""
        values = magnitudes[self.patterns]
        squares = values**2
        trained = self.source - self.tables[CHANGED] + self.tables[TRAINED]
        visible = ((self.source, squares), (trained, squares), (self.delta, squares), (self.delta, values))
        return {
            "stored": tuple(exact_float(from_limbs(row)) for row in self.sums),  # type: ignore[dict-item]
            # Not through BLAS, whose order of summation depends on the machine and its threads.
            "visible": tuple(float((counts * v).sum()) for counts, v in visible),  # type: ignore[dict-item]
        }


class Batch:
    """Tallies side by side: the bins of all in one row, tensor after tensor, at `start[t] .. stop[t]`."""

    def __init__(self, tallies: Sequence[SparseTally]):
        self.tallies = tallies
        sizes = np.array([len(t.patterns) for t in tallies], np.int64)
        self.stop = np.cumsum(sizes)
        self.start = self.stop - sizes
        self.patterns = np.concatenate([t.patterns for t in tallies])
        self.values = magnitudes[self.patterns]
        self.key = np.repeat(np.arange(len(tallies)) << 16, sizes) + self.patterns
        counts = np.stack([t.counts for t in tallies])
        self.counts, self.numel, self.nonfinite, self.bit_equal = counts, counts[:, 0], counts[:, 1], counts[:, 2]
        self.finite = self.numel - self.nonfinite
        self.n = np.where(self.finite > 0, self.finite, np.nan)  # a share of nothing is NaN

    def table(self, row: int) -> np.ndarray:
        return np.concatenate([t.tables[row] for t in self.tallies])

    def changed(self, view: str) -> np.ndarray:
        return self.table(MOVED if view == "stored" else CHANGED)

    def energies(self, view: str) -> np.ndarray:
        """[4, tensors]: sum W^2, sum W'^2, sum delta^2, sum |delta|."""
        return np.array([t.energies[view] for t in self.tallies]).T

    def find(self, patterns: np.ndarray) -> np.ndarray:
        """Where in the row each tensor's bins reach a pattern; patterns [tensors or 1, k]."""
        return np.searchsorted(self.key, (np.arange(len(self.tallies)) << 16)[:, None] + patterns)

    def sums(self, values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Sum of values over bins begin .. end, tensor by tensor, in their order."""
        edges = np.stack([begin, end], 1).ravel()
        return np.where(begin < end, np.add.reduceat(np.append(values, 0), edges)[::2], 0)


def running(counts: np.ndarray) -> np.ndarray:
    """Sums of what stands before each bin, and of all."""
    return np.concatenate(([0], np.cumsum(counts)))


THRESHOLD_LABELS = [threshold_label(t) for t in THRESHOLDS]
VISIBLE_EDGES = np.array([to_bf16_pattern(t) + side for side in (0, 1) for t in THRESHOLDS])  # below them: <, then <=
RELATIVE_LABELS = [f"frac_lt_rel_{threshold_label(tau)}" for tau in RELATIVE]
RATIO_LABELS = [ratio_label(r) for r in RATIOS]
Columns = dict[str, np.ndarray]


def float_patterns(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).view(np.uint32).astype(np.int64)


def sparsity(batch: Batch, view: str) -> Columns:
    """Shares of coordinates below thresholds: `frac_zero` delta = 0; `frac_lt_1e-5` |delta| < 1e-5, `frac_le_1e-5` <=;
    `frac_lt_rel_1e-3` |delta| < 1e-3 rms(W); `unchanged_rtol_1e-3` |w - w'| <= 1e-3 max(|w|, |w'|) (Zhu et al., arXiv 2511.08567).

    Visible thresholds are rounded to bf16 (1e-5 becomes 1.00136e-5). A relative threshold in the stored view comes as
    an interval, since the tally holds |delta| by its top 16 bits: `_lower` and `_upper` stand beside its middle.
    """
    n = batch.n
    changed = batch.sums(batch.changed(view), batch.start, batch.stop)
    found = {"frac_zero": (batch.finite - changed) / n}
    rms = np.sqrt(batch.energies(view)[0] / n)
    limits = float_patterns(np.maximum(np.nan_to_num(rms), EPSILON)[:, None] * np.array(RELATIVE))
    table = batch.table(DELTA if view == "visible" else STORED)
    before = running(table)
    if view == "visible":
        rounded = (limits + 0x7FFF + (limits >> 16 & 1)) >> 16
        edges = np.concatenate([np.broadcast_to(VISIBLE_EDGES, (len(n), len(VISIBLE_EDGES))), rounded], 1)
        counts = before[batch.find(edges)] - before[batch.start][:, None]
        counts, below = counts[:, : 2 * len(THRESHOLDS)], counts[:, 2 * len(THRESHOLDS) :]
    else:
        counts = batch.counts[:, 4 : 4 + 2 * len(THRESHOLDS)]
        at = batch.find(limits >> 16)
        below = before[at] - before[batch.start][:, None]
        upto = before[batch.find((limits >> 16) + 1)] - before[batch.start][:, None]
    for k, label in enumerate(THRESHOLD_LABELS):
        found[f"frac_lt_{label}"], found[f"frac_le_{label}"] = counts[:, k] / n, counts[:, k + len(THRESHOLDS)] / n
    for k, label in enumerate(RELATIVE_LABELS):
        if view == "visible":
            found[label] = below[:, k] / n
            found[f"{label}_lower"] = found[f"{label}_upper"] = np.full(len(n), np.nan)
        else:
            lower, upper = below[:, k] / n, upto[:, k] / n
            found[label], found[f"{label}_lower"], found[f"{label}_upper"] = (lower + upper) / 2, lower, upper
    found["unchanged_rtol_1e-3"] = batch.counts[:, 3] / n if view == "stored" else found["frac_zero"]
    return found


def norms(batch: Batch, view: str) -> Columns:
    """Frobenius norm of delta over that of W; root mean squares; mean and largest |delta|; both energies."""
    n = batch.n
    source, trained, delta, absolute = batch.energies(view)
    if view == "visible":
        seen = running(batch.table(DELTA))
        last = np.searchsorted(seen, seen[batch.stop]) - 1  # the last bin in use
        largest = np.where(batch.finite > 0, np.append(batch.values, 0)[last], np.nan)
    else:
        largest = np.where(batch.finite > 0, [t.max_delta for t in batch.tallies], np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(source > 0, np.sqrt(delta) / np.sqrt(source), np.nan)
    return {
        "relative_norm": relative,
        "rms_source": np.sqrt(source / n),
        "rms_trained": np.sqrt(trained / n),
        "rms_delta": np.sqrt(delta / n),
        "mean_abs": absolute / n,
        "max_abs": largest,
        "source_energy": source,
        "delta_energy": delta,
    }


def top_energy(batch: Batch, view: str) -> Columns:
    """Share of the energy of delta in its ceil(p n) largest |delta|, p = 0.1, 1, 5 %. NaN where nothing changed.

    Exact in the visible view. In the stored view the tally holds |delta| to the top 16 bits: the share is estimated at
    the middle of each bin, with guaranteed bounds beside it.
    """
    energy = batch.energies(view)[2]
    energy = np.where(energy > 0, energy, np.nan)
    counts = batch.table(DELTA if view == "visible" else STORED)
    before = running(counts)
    low = batch.values**2
    high = magnitudes[np.minimum(batch.patterns + 1, 0x7F7F)] ** 2
    middle = (low + high) / 2
    whole_middle = batch.sums(counts * middle, batch.start, batch.stop)
    found = {}
    for p in TOP_SHARES:
        label = f"top_energy_{ratio_label(p)}"
        size = np.array([max(1, math.ceil(p * n)) for n in batch.finite.tolist()])
        # The bin that is taken in part: those above it hold fewer than `size`.
        part = np.searchsorted(before[1:], before[batch.stop] - np.minimum(size, batch.finite), side="right")
        rest = size - (before[batch.stop] - np.append(before[1:], 0)[part])

        def taken(values: np.ndarray, part: np.ndarray = part, rest: np.ndarray = rest) -> np.ndarray:
            return (
                batch.sums(counts * values, np.minimum(part + 1, batch.stop), batch.stop)
                + rest * np.append(values, 0)[part]
            )

        if view == "visible":
            found[label] = taken(low) / energy
            found[f"{label}_lower"] = found[f"{label}_upper"] = np.full(len(energy), np.nan)
        else:
            lower, upper = np.minimum(taken(low) / energy, 1), np.minimum(taken(high) / energy, 1)
            with np.errstate(invalid="ignore", divide="ignore"):
                found[label] = np.clip(np.where(energy > 0, taken(middle) / whole_middle, np.nan), lower, upper)
            found[f"{label}_lower"], found[f"{label}_upper"] = lower, upper
    return found


@dataclass(frozen=True)
class NearZero:
    """How the `size` smallest |W| of each tensor share its changed coordinates [tensors, ratios]; ties at the cut in
    expectation and as bounds. Zero throughout where a tensor is empty."""

    size: np.ndarray
    expected: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def near_zero(batch: Batch, changed: np.ndarray, ratios: Sequence[float] = RATIOS) -> NearZero:
    """Changed coordinates among the ceil(ratio n) smallest |W|; `changed` is a |W| table of the batch."""
    source = batch.table(SOURCE)
    before, changed_before = running(source), running(changed)
    # In floating point, as the paper's masks are: ceil(0.1 * 30) may be 4.
    size = np.array([[min(n, max(1, math.ceil(r * n))) for r in ratios] for n in batch.finite.tolist()])
    cut = np.searchsorted(before[1:], before[batch.start][:, None] + size)
    empty = size == 0
    cut = np.where(empty, len(source), cut)
    need = size - (before[cut] - before[batch.start][:, None])
    inside = changed_before[cut] - changed_before[batch.start][:, None]
    tied, tied_changed = np.append(source, 1)[cut], np.append(changed, 0)[cut]
    expected = inside + tied_changed * (need / tied)
    lower = inside + np.maximum(0, need - (tied - tied_changed))
    upper = inside + np.minimum(need, tied_changed)
    return NearZero(size, *(np.where(empty, 0, x) for x in (expected, lower, upper)))


def near_zero_coverage(batch: Batch, view: str) -> Columns:
    """|mask & changed| / |changed| for the near-zero mask at 1, 5, 10, 20 %; `_enrichment` is coverage over the mask's
    density, `mask_changed` |mask & changed| / |mask|. Ties at the cut: the expected value under random tie-breaking,
    and both bounds. In the stored view |W| is resolved to bf16, so more coordinates tie.
    """
    changed = batch.changed(view)
    total = batch.sums(changed, batch.start, batch.stop)
    total = np.where(total > 0, total, np.nan)
    found, mask = {}, near_zero(batch, changed)
    for k, label in enumerate(RATIO_LABELS):
        size = np.where(mask.size[:, k] > 0, mask.size[:, k], np.nan)
        found[f"near_zero_coverage_{label}"] = mask.expected[:, k] / total
        found[f"near_zero_coverage_{label}_lower"] = mask.lower[:, k] / total
        found[f"near_zero_coverage_{label}_upper"] = mask.upper[:, k] / total
        found[f"near_zero_coverage_{label}_enrichment"] = mask.expected[:, k] * batch.finite / (total * size)
        found[f"near_zero_mask_changed_{label}"] = mask.expected[:, k] / size
    return found


INTEGER_FIGURES = ("numel", "nonfinite", "bit_equal", "changed")
BATCH = 128  # tensors at a time: bounds the memory


def compute_metrics(tallies: Sequence[SparseTally], view: str) -> Columns:
    """Every coordinate-wise figure of the tensors in one view, by column name; counts are int64."""
    parts = []
    for first in range(0, len(tallies), BATCH):
        batch = Batch(tallies[first : first + BATCH])
        parts.append(
            {
                "numel": batch.numel,
                "nonfinite": batch.nonfinite,
                "bit_equal": batch.bit_equal,
                "changed": batch.sums(batch.changed(view), batch.start, batch.stop),
                **sparsity(batch, view),
                **norms(batch, view),
                **top_energy(batch, view),
                **near_zero_coverage(batch, view),
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def tensor_metrics(tally: SparseTally, view: str) -> dict[str, float | int | None]:
    """The figures of one tensor, None where there is none."""
    return {name: none_for_nan(column[0]) for name, column in compute_metrics([tally], view).items()}


def none_for_nan(value: Any) -> float | int | None:
    return int(value) if isinstance(value, np.integer) else None if math.isnan(value) else float(value)
