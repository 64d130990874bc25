"""`quantile` on the CPU: raw pointers to csrc/quantile/cpu.cpp. The public function validates the arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.backends import cpu
from opdkernels.backends.cpu import INT, PTR
from opdkernels.backends.layout import DTYPE_CODES
from opdkernels.ops.quantile.layout import NUM_COUNTS

KERNEL = cpu.declare("opd_quantile", PTR, INT, INT, PTR, INT, INT, PTR, INT, PTR, PTR)


def quantile(
    values: torch.Tensor, k: Sequence[int], largest: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    values = cpu.aligned(values)
    thresholds = torch.empty(len(k), dtype=torch.float64)
    counts = torch.empty(len(k), NUM_COUNTS, dtype=torch.int64)
    KERNEL(
        cpu.address(values),
        DTYPE_CODES[values.dtype],
        values.numel(),
        cpu.int64s(k),
        len(k),
        largest,
        cpu.address(mask),
        torch.get_num_threads(),
        thresholds.data_ptr(),
        counts.data_ptr(),
    )
    return thresholds, counts
