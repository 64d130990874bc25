"""What the Triton and the CUDA launchers of `delta` share: thresholds as bit patterns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_CUTS, MAX_THRESHOLDS = 4, 5
NEVER = 0x7FFF  # no finite magnitude exceeds this pattern
LT, LE = 4, 9  # places among the operator's counts


def limits(threshold: float, kind: type[np.floating]) -> tuple[int, int]:
    """The patterns from which a magnitude is not below a threshold, and from which it is beyond it.

    >>> [hex(limit) for limit in limits(0.5, np.float32)]
    ['0x3f000000', '0x3f000001']
    """
    if not threshold > 0:
        return 0, int(threshold == 0)
    with np.errstate(over="ignore"):
        nearest = kind(threshold)
    pattern = int(nearest.view(np.int64 if kind is np.float64 else np.int32))
    return pattern + int(float(nearest) < threshold), pattern + int(float(nearest) <= threshold)


def rules_of(cuts: Sequence[int], thresholds: Sequence[float], kind: type[np.floating]) -> list[int]:
    """What a kernel compares with, as data: four cuts, ten limits in order, the count that each limit belongs to."""
    bounds = [(0, LT)] * 2 * (MAX_THRESHOLDS - len(thresholds))  # nothing is below zero
    for k, threshold in enumerate(thresholds):
        below, beyond = limits(threshold, kind)
        bounds += [(below, LT + k), (beyond, LE + k)]
    bounds.sort()
    return [*cuts, *[NEVER] * (MAX_CUTS - len(cuts)), *(limit for limit, _ in bounds), *(slot for _, slot in bounds)]
