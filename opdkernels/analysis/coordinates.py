"""Coordinate-wise figures of a tensor, from its tally alone (metrics: arXiv 2606.13657 and its script; see each function).

Both views, always: `stored` is what training did, `visible` what a bf16 deployment sees. A figure that its tally
cannot give is None. Fractions are of the finite coordinates; norms and maxima are in the units of the weights.
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
        return cls(
            tally.cuts, used, tally.tables[:, used], tally.counts.copy(), tally.sums.copy(), tally.max_delta
        )

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

    @cached_property
    def values(self) -> np.ndarray:
        return magnitudes[self.patterns]

    def changed(self, view: str) -> np.ndarray:
        """|W| table of the coordinates whose delta is not 0."""
        return self.tables[MOVED if view == "stored" else CHANGED]

    @cached_property
    def energies(self) -> dict[str, tuple[float, float, float, float]]:
        """view -> sum W^2, sum W'^2, sum delta^2, sum |delta|."""
        stored = tuple(exact_float(from_limbs(row)) for row in self.sums)
        squares = self.values**2
        source, delta = dot(self.source, squares), dot(self.delta, squares)
        trained = dot(self.source - self.tables[CHANGED] + self.tables[TRAINED], squares)
        return {
            "stored": stored,  # type: ignore[dict-item]
            "visible": (source, trained, delta, dot(self.delta, self.values)),
        }


def dot(counts: np.ndarray, values: np.ndarray) -> float:
    """Not through BLAS, whose order of summation depends on the machine and its threads."""
    return float((counts * values).sum())


def share(count: float, of: float) -> float | None:
    return float(count) / float(of) if of else None


THRESHOLD_LABELS = [threshold_label(t) for t in THRESHOLDS]
VISIBLE_EDGES = np.array([to_bf16_pattern(t) + side for side in (0, 1) for t in THRESHOLDS])  # below them: <, then <=
RELATIVE_LABELS = [f"frac_lt_rel_{threshold_label(tau)}" for tau in RELATIVE]


def sparsity(tally: SparseTally, view: str) -> dict[str, float | None]:
    """Shares of coordinates below thresholds: `frac_zero` delta = 0; `frac_lt_1e-5` |delta| < 1e-5, `frac_le_1e-5` <=;
    `frac_lt_rel_1e-3` |delta| < 1e-3 rms(W); `unchanged_eta` |w - w'| <= 1e-3 max(|w|, |w'|) (Zhu et al., arXiv 2511.08567).

    Visible thresholds are rounded to bf16 (1e-5 becomes 1.00136e-5). A relative threshold in the stored view comes as
    an interval, since the tally holds |delta| by its top 16 bits: `_lower` and `_upper` stand beside its middle.
    """
    n = tally.finite
    row: dict[str, float | None] = {"frac_zero": share(n - int(tally.changed(view).sum()), n)}
    rms = math.sqrt(tally.energies[view][0] / n) if n else 0.0
    limits = [tau * max(rms, EPSILON) for tau in RELATIVE]
    if view == "visible":
        below = np.concatenate(([0], np.cumsum(tally.delta)))
        edges = np.concatenate((VISIBLE_EDGES, [to_bf16_pattern(limit) for limit in limits]))
        counts = below[np.searchsorted(tally.patterns, edges)].tolist()
    else:
        counts = tally.counts[4:14].tolist()
    for k, label in enumerate(THRESHOLD_LABELS):
        row[f"frac_lt_{label}"], row[f"frac_le_{label}"] = share(counts[k], n), share(counts[k + len(THRESHOLDS)], n)
    for k, label in enumerate(RELATIVE_LABELS):
        if view == "visible":
            row[label] = share(counts[2 * len(THRESHOLDS) + k], n)
            row[f"{label}_lower"] = row[f"{label}_upper"] = None
        else:
            lower, upper = stored_below(tally, limits[k])
            row[label], row[f"{label}_lower"], row[f"{label}_upper"] = share((lower + upper) / 2, n), share(lower, n), share(upper, n)
    row["unchanged_eta"] = share(int(tally.counts[3]), n) if view == "stored" else row["frac_zero"]
    return row


def stored_below(tally: SparseTally, limit: float) -> tuple[int, int]:
    """Least and most coordinates with stored |delta| < limit."""
    pattern = int(np.float32(limit).view(np.uint32)) >> 16
    at = np.searchsorted(tally.patterns, pattern)
    lower = int(tally.stored[:at].sum())
    tied = int(tally.stored[at]) if at < len(tally.patterns) and tally.patterns[at] == pattern else 0
    return lower, lower + tied


def norms(tally: SparseTally, view: str) -> dict[str, float | None]:
    """Frobenius norm of delta over that of W; root mean squares; mean and largest |delta|."""
    n = tally.finite
    source, trained, delta, absolute = tally.energies[view]
    largest = tally.max_delta
    if view == "visible":
        used = np.flatnonzero(tally.delta)
        largest = float(tally.values[used[-1]]) if len(used) else 0.0
    return {
        "relative_norm": share(math.sqrt(delta), math.sqrt(source)),
        "rms_source": math.sqrt(source / n) if n else None,
        "rms_trained": math.sqrt(trained / n) if n else None,
        "rms_delta": math.sqrt(delta / n) if n else None,
        "mean_abs": share(absolute, n),
        "max_abs": largest if n else None,
        "source_energy": source,
        "delta_energy": delta,
    }


def top_energy(tally: SparseTally, view: str) -> dict[str, float | None]:
    """Share of the energy of delta in its ceil(p n) largest |delta|, p = 0.1, 1, 5 %. None where nothing changed.

    Exact in the visible view. In the stored view the tally holds |delta| to the top 16 bits: the share is estimated at
    the middle of each bin, with guaranteed bounds beside it.
    """
    n, energy = tally.finite, tally.energies[view][2]
    row: dict[str, float | None] = {}
    counts = (tally.delta if view == "visible" else tally.stored)[::-1]
    taken = np.cumsum(counts)
    low = tally.values[::-1] ** 2
    if view == "stored":
        high = magnitudes[np.minimum(tally.patterns[::-1] + 1, 0x7F7F)] ** 2
        middle = (low + high) / 2
    for p in TOP_SHARES:
        label = f"top_energy_{ratio_label(p)}"
        row[label] = row[f"{label}_lower"] = row[f"{label}_upper"] = None
        if not n or not energy:
            continue
        k = max(1, math.ceil(p * n))
        whole = int(np.searchsorted(taken, k))  # bins taken whole
        rest = k - (int(taken[whole - 1]) if whole else 0)

        def within(values: np.ndarray, whole: int = whole, rest: int = rest) -> float:
            return dot(counts[:whole], values[:whole]) + rest * float(values[whole])

        if view == "visible":
            row[label] = within(low) / energy
        else:
            row[label] = within(middle) / dot(counts, middle)
            row[f"{label}_lower"] = min(1.0, within(low) / energy)
            row[f"{label}_upper"] = min(1.0, within(high) / energy)
            row[label] = min(max(row[label], row[f"{label}_lower"]), row[f"{label}_upper"])  # type: ignore[type-var]
    return row


RATIO_LABELS = [ratio_label(r) for r in RATIOS]


@dataclass(frozen=True)
class NearZero:
    """How the ceil(r n) smallest |W| share the changed coordinates; ties at the cut in expectation and as bounds."""

    size: int
    expected: float
    lower: int
    upper: int


def near_zero(tally: SparseTally, changed: np.ndarray, ratio: float) -> NearZero:
    """Changed coordinates among the ceil(ratio n) smallest |W| of the tensor; `changed` is a |W| table."""
    return near_zeros(tally, changed, (ratio,))[0]


def near_zeros(tally: SparseTally, changed: np.ndarray, ratios: Sequence[float]) -> list[NearZero]:
    n, found = tally.finite, []
    sizes = [min(n, max(1, math.ceil(ratio * n))) for ratio in ratios]
    below, changed_below = np.cumsum(tally.source), np.cumsum(changed)
    for size, cut in zip(sizes, np.searchsorted(below, sizes).tolist(), strict=True):
        before, inside = (int(below[cut - 1]), int(changed_below[cut - 1])) if cut else (0, 0)
        tied, tied_changed, need = int(tally.source[cut]), int(changed[cut]), size - before
        found.append(
            NearZero(
                size,
                inside + tied_changed * (need / tied),
                inside + max(0, need - (tied - tied_changed)),
                inside + min(need, tied_changed),
            )
        )
    return found


def near_zero_coverage(tally: SparseTally, view: str) -> dict[str, float | None]:
    """|mask & changed| / |changed| for the near-zero mask at 1, 5, 10, 20 %; `_enrichment` is coverage over the mask's
    density, `mask_changed` |mask & changed| / |mask|. Ties at the cut: the expected value under random tie-breaking,
    and both bounds. In the stored view |W| is resolved to bf16, so more coordinates tie.
    """
    row: dict[str, float | None] = {}
    changed = tally.changed(view)
    total = int(changed.sum())
    found = near_zeros(tally, changed, RATIOS) if tally.finite else [NearZero(0, 0, 0, 0)] * len(RATIOS)
    for label, one in zip(RATIO_LABELS, found, strict=True):
        row[f"near_zero_coverage_{label}"] = share(one.expected, total)
        row[f"near_zero_coverage_{label}_lower"] = share(one.lower, total)
        row[f"near_zero_coverage_{label}_upper"] = share(one.upper, total)
        row[f"near_zero_coverage_{label}_enrichment"] = share(one.expected * tally.finite, total * one.size)
        row[f"near_zero_mask_changed_{label}"] = share(one.expected, one.size)
    return row


def figures(tally: SparseTally, view: str) -> dict[str, Any]:
    """Every coordinate-wise figure of one tensor in one view, by column name."""
    return {
        "view": view,
        "numel": tally.numel,
        "nonfinite": tally.nonfinite,
        "bit_equal": tally.bit_equal,
        "changed": int(tally.changed(view).sum()),
        **sparsity(tally, view),
        **norms(tally, view),
        **top_energy(tally, view),
        **near_zero_coverage(tally, view),
    }
