"""Expected histograms of |visible delta| under an update with a known distribution.

Histograms cover windows of octaves (by bf16 exponent field) with 128 bf16 values each; octaves below 1 are the
subnormals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opdkernels.ops.null.histograms import BINS, Histograms, exponent_of, half_spacing, magnitude, sum_by

LOWEST_ROW = -6  # spacing of the subnormals, 2**-133, as an exponent field


@dataclass(frozen=True, eq=False)
class Expected:
    """Expected counts under one kind of null, over a window of bf16 values per tensor."""

    size: np.ndarray  # [T]
    visible: np.ndarray  # P(visible) of each used |W| bin
    first: np.ndarray  # [T] bf16 bits of the window's first value
    values: np.ndarray  # [T, width of the window]
    known: np.ndarray  # [T] bool: whether the kind exists for the tensor

    def outputs(
        self, tables: Histograms, thresholds: list[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows of `fits` [T, NUM_FITS] and of `near_zero` [T, ratios, 2]; NaN where the kind does not exist."""
        count, width = self.values.shape
        changes = tables.count * self.visible
        changed = sum_by(tables.tensor, changes, count)
        unchanged = tables.numel - changed
        tensor, counts = tables.delta_tensor, tables.delta_count.astype(float)
        offset = tables.delta_pattern - self.first[tensor]
        inside = (offset >= 0) & (offset < width)
        observed = sum_by(tensor[inside] * width + offset[inside], counts[inside], count * width).reshape(count, width)
        observed -= self.values
        difference = np.abs(observed, out=observed).sum(1) + np.abs(unchanged - tables.unchanged)
        difference += sum_by(tensor[~inside], counts[~inside], count)
        distance = difference / 2 / np.maximum(tables.numel, 1)
        starts = np.searchsorted(tables.tensor, np.arange(count + 1))

        def among_smallest(each: np.ndarray, bin_: np.ndarray, taken: np.ndarray) -> np.ndarray:
            """Sum over the smallest |W| of each tensor of a value per coordinate of each bin."""
            below = np.concatenate([[0.0], np.cumsum(tables.count * each)])
            return below[bin_] - below[starts[:-1]] + taken * np.append(each, 0.0)[bin_]

        # Changes are independent: their number has variance sum p (1 - p), and by the delta method a fraction c of them
        # in a mask has variance (sum over the mask of p (1 - p) (1 - 2 c) + c^2 sum of p (1 - p)) / (sum of p)^2.
        spread = np.maximum(self.visible * (1 - self.visible), 0)  # P(visible) may exceed 1 by its rounding
        variance = sum_by(tables.tensor, tables.count * spread, count)
        near_zero = np.empty((count, len(thresholds), 2))
        for k, (bin_, taken) in enumerate(thresholds):
            inside = among_smallest(self.visible, bin_, taken)
            fraction = inside / np.where(changed > 0, changed, 1)
            inside_variance = among_smallest(spread, bin_, taken)
            total = np.maximum(inside_variance * (1 - 2 * fraction) + fraction**2 * variance, 0)
            near_zero[:, k] = np.stack([inside, np.sqrt(total) / np.where(changed > 0, changed, 1)], axis=1)
        fits = np.stack([self.size, distance, changed, np.sqrt(variance), unchanged], axis=1)
        fits[~self.known], near_zero[~self.known] = np.nan, np.nan
        return fits, near_zero

    def dense(self, unchanged: np.ndarray) -> np.ndarray:
        """Expected coordinates by bf16 bits of |visible delta| [T, BINS]; NaN where the kind does not exist."""
        tables = np.zeros((len(self.first), BINS))
        for table, first, values in zip(tables, self.first, self.values, strict=True):
            table[first : first + len(values)] = values
        tables[:, 0] += unchanged
        tables[~self.known] = np.nan
        return tables


def near_zero_threshold(tables: Histograms, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """The used bin where the ceil(ratio n) smallest |W| of each tensor end [T], and how many of it they take [T]."""
    # In floating point, as in the paper's masks: ceil(0.1 * 30) is 4.
    taken = np.array([min(n, math.ceil(ratio * n)) for n in tables.numel.tolist()], np.int64)
    below = np.concatenate([[0], np.cumsum(tables.count)])
    target = below[np.searchsorted(tables.tensor, np.arange(len(tables.numel)))] + taken
    last = np.maximum(np.searchsorted(below, target, side="left") - 1, 0)
    return last, target - below[last]


def octave(x: np.ndarray) -> np.ndarray:
    return np.frexp(x)[1] + 126


def window(tables: Histograms, bottom: np.ndarray, top: np.ndarray) -> tuple[np.ndarray, int]:
    """First octave of each tensor's window [T], and the number of octaves of all windows."""
    if tables.uniform:  # however small the update, a remainder near the edge changes the value by one spacing
        widest = 255 - np.argmax(tables.spacing[:, ::-1] > 0, axis=1) - 7
        top = np.maximum(top, widest)
    top = np.clip(top, LOWEST_ROW, 254)
    rows = min(int((top - np.maximum(bottom, LOWEST_ROW)).max(initial=0)) + 1, 254 - LOWEST_ROW)
    return np.clip(top - rows + 1, LOWEST_ROW, 255 - rows), rows


def lattice(first: np.ndarray, rows: int, steps: int) -> np.ndarray:
    """Values of the octave before the window and of its octaves, float64 [T, rows + 1, steps]."""
    row = (first - 1)[:, None] + np.arange(rows + 1)
    return np.ldexp(1.0, row - 127)[:, :, None] * (1 + np.arange(steps) / steps)


def cumulative_at_steps(below: np.ndarray, uniform: bool, unmoved: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """P(x <= y) on the lattice [T, rows + 1, 256] as probabilities of staying at or below each visible delta.

    A row contains 2**o multiples of spacing u, o = log2(row / u): list[o], [T, rows + 1, 2**o], is the probability of
    being rounded to one of them or less. The array [T, rows + 1] is P(hidden) where the row's first value is u.
    `unmoved` [T] is P(x = 0).
    """
    bottom = (unmoved + below[:, 0, 0]) / 2
    if not uniform:
        upper_edges = [below[:, :, 1 << (7 - o) :: 1 << (8 - o)] for o in range(8)]
        return upper_edges, np.concatenate([bottom[:, None], below[:, :-1, 0]], axis=1)
    following = np.concatenate([below[:, 1:, 0], below[:, -1:, -1]], axis=1)[:, :, None]
    edges = np.concatenate([below[:, :, 0::2], following], axis=2)
    mean = (edges[:, :, :-1] + 4 * below[:, :, 1::2] + edges[:, :, 1:]) / 6  # Simpson over a 128th of an octave
    return cumulative_from_means(mean, bottom)


def cumulative_from_means(mean: np.ndarray, bottom: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The same for a remainder, from the means of P(x <= y) over bf16 steps [T, rows + 1, 128] and below them [T]."""
    steps = [mean]
    for _ in range(7):
        steps.insert(0, (steps[0][:, :, 0::2] + steps[0][:, :, 1::2]) / 2)
    hidden = np.empty(mean.shape[:2])
    hidden[:, 0] = bottom
    for row in range(1, mean.shape[1]):
        hidden[:, row] = (hidden[:, row - 1] + steps[0][:, row - 1, 0]) / 2
    return steps, hidden


def expected_histograms(
    tables: Histograms,
    size: np.ndarray,
    known: np.ndarray,
    first: np.ndarray,
    steps: list[np.ndarray],
    hidden: np.ndarray,
    unmoved: np.ndarray,
) -> Expected:
    """Expected histograms from the cumulative probabilities on one lattice, which all spacings share."""
    count, rows = len(first), hidden.shape[1] - 1
    padded = np.zeros((count, 256 + 32))  # rows above 255 or below 0 hold no weights
    padded[:, 16:272] = tables.spacing
    finer = np.cumsum(padded, axis=1)
    tensor, row = np.arange(count)[:, None], first[:, None] + np.arange(rows) + 16
    values = np.zeros((count, rows, 128))
    for o in range(7):  # spacing u, 2**o of its multiples in the row
        weights = padded[tensor, row + 7 - o][:, :, None]
        if not weights.any():
            continue
        upper = steps[o][:, 1:]
        mass = upper.copy()
        mass[:, :, 1:] -= upper[:, :, :-1]
        mass[:, :, 0] -= steps[o - 1][:, :-1, -1] if o else hidden[:, 1:]
        mass *= weights
        if o >= 2:
            # Half of the coordinates move towards zero, and q = x / (128 u) of those pass a power of two, below which
            # odd multiples of u/2 are as likely as even ones: q/4 goes there. Below exponent 2 there is no finer
            # spacing.
            crossed = mass * ((1 + np.arange(1 << o) / (1 << o)) * 2.0 ** (o - 9))
            crossed[row + 7 - o <= 17] = 0
            mass -= crossed
            values[:, :, 1 << (6 - o) :: 1 << (7 - o)] += crossed
        values[:, :, :: 1 << (7 - o)] += mass
    upper = steps[7][:, 1:]
    same, smaller = padded[tensor, row], finer[tensor, row - 1]
    values[:, :, 1:] += (same + smaller)[:, :, None] * (upper[:, :, 1:] - upper[:, :, :-1])
    values[:, :, 0] += same * (upper[:, :, 0] - steps[6][:, :-1, -1])
    values[:, :, 0] += smaller * (upper[:, :, 0] - steps[7][:, :-1, -1])

    # P(visible) by exponent, and from it that of each used bin. Below the window P(0 < x <= y) goes down with y.
    above = np.arange(256) - 7 - (first[:, None] - 1)
    hidden_at = hidden[tensor, np.clip(above, 0, rows)]
    hidden_at = unmoved[:, None] + (hidden_at - unmoved[:, None]) * np.exp2(np.minimum(above, 0.0))
    visible_at = np.where(above > rows, 0.0, 1 - hidden_at)
    exponent, below = exponent_of(tables.pattern), half_spacing(tables.pattern, tables.uniform)
    visible = (1 - below) * visible_at[tables.tensor, exponent] + below * visible_at[tables.tensor, exponent - 1]
    # The small count that is visible below the window is added to its first value.
    values = values.reshape(count, rows * 128)
    values[:, 0] += np.maximum((tables.spacing * visible_at).sum(1) - values.sum(1), 0.0)
    unchanged = size == 0
    visible[unchanged[tables.tensor]] = 0
    values[unchanged] = 0
    return Expected(size, visible, *fold_subnormals(first, values), known)


def fold_subnormals(first_row: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bf16 bits of each window's first value, and the counts by bf16 value; octaves below 1 share the subnormals."""
    for t in np.flatnonzero(first_row < 1):
        row, slot = first_row[t] + np.arange(values.shape[1]) // 128, np.arange(values.shape[1]) % 128
        pattern = np.where(row < 1, (128 + slot) >> np.maximum(1 - row, 0), row * 128 + slot)
        values[t] = np.bincount(pattern, weights=values[t], minlength=values.shape[1])[: values.shape[1]]
    return np.maximum(first_row * 128, 0), values


def top_energy(first: int, values: np.ndarray, numel: int, fractions: Sequence[float]) -> np.ndarray:
    """Fraction of the energy in the ceil(fraction n) largest |visible delta| of a null that expects changes.

    Args:
        first: bf16 bits of the first value.
        values: Expected coordinates by bf16 bits from `first` on.
        numel: Coordinates of the tensor.
        fractions: Of the coordinates.

    Returns:
        Mean, and standard deviation by the delta method for independent coordinates, float64 [fractions, 2].
    """
    result = np.empty((len(fractions), 2))
    # From the largest |delta| down. Counts are divided by their sum, squares by their mean.
    counts = np.maximum(values[::-1], 0)  # differences may round below 0
    squares = magnitude(first + np.arange(len(values))[::-1]) ** 2
    changes = counts.sum()
    squares /= (counts * squares).sum() / changes
    counts = counts / changes
    before, before_1, before_2 = (
        np.concatenate([[0.0], np.cumsum(x)]) for x in (counts, counts * squares, counts * squares * squares)
    )
    for k, fraction in enumerate(fractions):
        taken = max(1, math.ceil(fraction * numel)) / changes
        if taken >= before[-1]:  # every change
            result[k] = 1, 0
            continue
        last = int(np.searchsorted(before, taken)) - 1  # the bin of the smallest |delta| of which coordinates are taken
        above, above_1, above_2, threshold = before[last], before_1[last], before_2[last], squares[last]
        top = above_1 + (taken - above) * threshold
        # Sums of the influence of coordinates, max(square - threshold, 0) - top square, and of its square.
        influence = above_1 - threshold * above - top
        influence_sq = above_2 - 2 * threshold * above_1 + threshold**2 * above
        influence_sq += -2 * top * (above_2 - threshold * above_1) + top**2 * before_2[-1]
        result[k] = top, math.sqrt(max(influence_sq - influence**2 * changes / numel, 0) / changes)
    return result
