"""`delta` on the CPU: raw pointers to csrc/delta/cpu.cpp. The public function validates the arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.backends import cpu
from opdkernels.backends.cpu import INT, PTR
from opdkernels.backends.layout import DTYPE_CODES

KERNEL = cpu.declare("opd_delta", PTR, INT, PTR, INT, INT, PTR, INT, PTR, INT, INT, PTR, PTR, PTR, PTR, PTR)


def delta_(
    base: torch.Tensor,
    trained: torch.Tensor,
    threshold_bits: Sequence[int],
    thresholds: Sequence[float],
    tables: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    maximum: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    base, trained = cpu.aligned(base), cpu.aligned(trained)
    KERNEL(
        cpu.address(base),
        DTYPE_CODES[base.dtype],
        cpu.address(trained),
        DTYPE_CODES[trained.dtype],
        base.numel(),
        cpu.int64s(threshold_bits),
        len(threshold_bits),
        cpu.doubles(thresholds),
        len(thresholds),
        torch.get_num_threads(),
        tables.data_ptr(),
        counts.data_ptr(),
        sums.data_ptr(),
        maximum.data_ptr(),
        cpu.address(mask),
    )
