"""How the metrics of tensors combine into those of groups.

Sums run in the order of the rows, so that they are bit-identical on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


class Members:
    """Tensors of one view, their metrics as columns, and the group of each.

    Args:
        columns: Metric name -> float64 [tensors].
        keys: The group of each tensor [tensors].
    """

    def __init__(self, columns: Mapping[str, np.ndarray], keys: Sequence[tuple]):
        self.columns = columns
        index = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self.groups, self.group = list(index), np.array([index[key] for key in keys], np.int64)

    @cached_property
    def finite(self) -> np.ndarray:
        """Finite coordinates of each tensor [tensors]."""
        return self.columns["numel"] - self.columns["nonfinite"]

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum of float64 [tensors] by group -> [groups]."""
        return np.bincount(self.group, weights=values, minlength=len(self.groups))

    def sum(self, name: str) -> np.ndarray:
        """Sum of a metric by group -> [groups]."""
        return self.total(self.columns[name])

    def mean(self, name: str, weight: np.ndarray) -> np.ndarray:
        """Weighted mean by group over the tensors that have the metric; NaN where none of them has weight."""
        values = self.columns[name]
        used = ~np.isnan(values) & (weight > 0)
        total = self.total(np.where(used, weight, 0))
        return self.total(np.where(used, values * weight, 0)) / np.where(total > 0, total, np.nan)

    def median(self, name: str) -> np.ndarray:
        """Median by group over the tensors that have the metric; NaN where none has."""
        values = self.columns[name]
        known = ~np.isnan(values)
        order = np.lexsort((values[known], self.group[known]))
        ranked = np.append(values[known][order], np.nan)
        sizes = np.bincount(self.group[known], minlength=len(self.groups))
        starts = np.cumsum(sizes) - sizes
        low, high = starts + np.maximum(sizes - 1, 0) // 2, starts + sizes // 2
        return np.where(sizes > 0, (ranked[low] + ranked[np.minimum(high, len(ranked) - 1)]) / 2, np.nan)


@dataclass(frozen=True)
class Aggregation:
    """How the values of tensors become the value of a group.

    Attributes:
        description: The rule in words, for docs/outputs.md.
        compute: Computes float64 [num_groups] from the tensors of one view and the metric's name. None if groups have
            no value, or if it is computed elsewhere (means over matrices, in summary.json).
    """

    description: str
    compute: Callable[[Members, str], np.ndarray] | None = None


NOT_AGGREGATED = Aggregation("")
MEAN_OVER_MATRICES = Aggregation("mean over matrices")  # summary.json has mean, median and mean weighted by m n
SUM = Aggregation("sum", lambda members, name: members.sum(name))
MEAN_BY_COORDINATES = Aggregation(
    "mean weighted by finite coordinates", lambda members, name: members.mean(name, members.finite)
)


def mean_by(weight: str, description: str) -> Aggregation:
    """Mean weighted by another metric."""
    return Aggregation(description, lambda members, name: members.mean(name, members.columns[weight]))


def median_of(metric: str) -> Aggregation:
    """Median of a metric over the tensors of a group."""
    return Aggregation("median over tensors", lambda members, _: members.median(metric))


def recomputed(description: str, compute: Callable[[Members], np.ndarray]) -> Aggregation:
    """The metric of the group as a whole, from its sums."""
    return Aggregation(description, lambda members, _: compute(members))


MEAN_BY_ENERGY = mean_by("delta_energy", "mean weighted by the energy of Δ")
MEAN_BY_CHANGED = mean_by("changed", "mean weighted by changed coordinates")
MEAN_BY_CHANGED_NULL = mean_by("changed_null", "mean weighted by expected changes")
