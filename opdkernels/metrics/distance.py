"""How far two checkpoints are apart, from a sample of their tensors: its time does not grow with the models."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np

from opdkernels.checkpoint.match import Match, Pair
from opdkernels.metrics.verdict import UNRELATED, unrelated_sentence
from opdkernels.ops.delta import Tally, delta, exact_float

MAX_TENSORS = 32  # sampled tensors, evenly over the file: first and last layers change differently
SLICE = 1 << 14  # elements of one sampled slice
MAX_SLICES = 4  # slices per tensor


@dataclass(frozen=True)
class Distance:
    """Distance of two checkpoints in the sampled coordinates.

    Attributes:
        relative_norm: ||trained - base|| / ||base|| over the finite coordinates, the median over sampled tensors,
            weighted by their size; None if every sampled coordinate of the base is 0, NaN or Inf.
        bit_equal: Number of sampled coordinates with the same bits.
        sampled: Number of sampled coordinates.
    """

    relative_norm: float | None
    bit_equal: int
    sampled: int


def sampled_distance(pair: Pair) -> Distance:
    """Distance from at most 32 tensors, 65,536 coordinates of each: matrices if there are any, evenly over the file."""
    usable = matrices(pair) or [match for match in pair.matches if match.numel]
    norms, weights, equal, total = [], [], 0, 0
    for index in sorted({round(x) for x in np.linspace(0, len(usable) - 1, min(MAX_TENSORS, len(usable)))}):
        tally = sampled_tally(pair, usable[index])
        equal, total = equal + tally.bit_equal, total + tally.numel
        base_norm = exact_float(tally.sum_base_sq)
        if base_norm > 0:
            norms.append(math.sqrt(exact_float(tally.sum_delta_sq) / base_norm))
            weights.append(usable[index].numel)
    if not norms:
        return Distance(None, equal, total)
    order = np.argsort(norms)
    below = np.cumsum(np.array(weights, float)[order])
    return Distance(float(np.array(norms)[order][np.searchsorted(below, below[-1] / 2)]), equal, total)


def matrices(pair: Pair) -> list[Match]:
    """The matches with two or more dimensions that are not empty."""
    return [match for match in pair.matches if match.numel and len(match.shape) > 1]


def sampled_tally(pair: Pair, match: Match) -> Tally:
    """The tally of slices evenly over a match."""
    tally = Tally.empty()
    count = min(MAX_SLICES, -(-match.numel // SLICE))
    for start in np.linspace(0, max(0, match.numel - SLICE), count).astype(int).tolist():
        delta(*pair.read(match, start, min(start + SLICE, match.numel)), out=tally)
    return tally


def unrelated_note(pair: Pair) -> str | None:
    """What `analyze` says of two checkpoints that do not look like one run, judged by a sample of their matrices.

    Returns:
        The sentence; None for other pairs, and for those without matrices.
    """
    relative_norm = sampled_distance(pair).relative_norm if matrices(pair) else None
    return None if relative_norm is None or relative_norm < UNRELATED else unrelated_sentence(relative_norm)


def warn_if_unrelated(pair: Pair, stacklevel: int = 2) -> None:
    """Warns with `unrelated_note`, if there is one."""
    if note := unrelated_note(pair):
        warnings.warn(note, stacklevel=stacklevel + 1)
