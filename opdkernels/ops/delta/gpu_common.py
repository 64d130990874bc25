"""What the Triton and the CUDA launchers of `delta` share: thresholds as bits, and many pairs one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from opdkernels.backends.layout import BINS
from opdkernels.ops.delta.layout import (
    COUNT_LE,
    COUNT_LT,
    MAX_VISIBLE_THRESHOLDS,
    NUM_STORED_THRESHOLDS,
    ROWS_OF_BINS,
)

NEVER = 0x7FFF  # no finite magnitude exceeds these bits


def threshold_limits(threshold: float, float_type: type[np.floating]) -> tuple[int, int]:
    """The least magnitude, as bits of `float_type`, that is not below a threshold, and the least that exceeds it.

    >>> [hex(limit) for limit in threshold_limits(0.5, np.float32)]
    ['0x3f000000', '0x3f000001']
    """
    if not threshold > 0:
        return 0, int(threshold == 0)
    with np.errstate(over="ignore"):
        nearest = float_type(threshold)
    bits = int(nearest.view(np.int64 if float_type is np.float64 else np.int32))
    return bits + int(float(nearest) < threshold), bits + int(float(nearest) <= threshold)


def kernel_params(
    threshold_bits: Sequence[int], thresholds: Sequence[float], float_type: type[np.floating]
) -> list[int]:
    """The thresholds as the kernels read them, int [NUM_PARAMS] (layout.py)."""
    limits = [(0, COUNT_LT)] * 2 * (NUM_STORED_THRESHOLDS - len(thresholds))  # nothing is below zero
    for k, threshold in enumerate(thresholds):
        not_below, above = threshold_limits(threshold, float_type)
        limits += [(not_below, COUNT_LT + k), (above, COUNT_LE + k)]
    limits.sort()
    return [
        *threshold_bits,
        *[NEVER] * (MAX_VISIBLE_THRESHOLDS - len(threshold_bits)),
        *(limit for limit, _ in limits),
        *(count for _, count in limits),
    ]


def one_by_one(
    count: Callable[..., None],
    base: Sequence[torch.Tensor],
    trained: Sequence[torch.Tensor],
    threshold_bits: Sequence[int],
    thresholds: Sequence[float],
    num_bins: torch.Tensor,
    bin_bits: torch.Tensor,
    tables: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    maximum: torch.Tensor,
) -> None:
    """The operator `delta_many_` by an implementation of `delta_`, which counts each pair in a dense tally."""
    start = 0
    num_bins.fill_(-1)
    for i, (w, v) in enumerate(zip(base, trained, strict=True)):
        dense = torch.zeros(len(tables), BINS, dtype=torch.int64, device=tables.device)
        for output in (counts, sums, maximum):
            output[i] = 0
        count(w, v, threshold_bits, thresholds, dense, counts[i], sums[i], maximum[i : i + 1], None)
        used = (dense[list(ROWS_OF_BINS)] != 0).any(0).nonzero().flatten()
        stop = start + len(used)
        if stop > len(bin_bits):
            return
        bin_bits[start:stop], tables[:, start:stop], num_bins[i] = used, dense[:, used], len(used)
        start = stop
