"""`delta` on the CPU: raw pointers to csrc/delta/cpu.cpp. The public functions check the arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.backends import cpu


def delta_(
    source: torch.Tensor,
    trained: torch.Tensor,
    cuts: Sequence[int],
    thresholds: Sequence[float],
    tables: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    maximum: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    cpu._C.delta(
        source.data_ptr(),
        cpu.DTYPE_CODES[source.dtype],
        trained.data_ptr(),
        cpu.DTYPE_CODES[trained.dtype],
        source.numel(),
        list(cuts),
        list(thresholds),
        torch.get_num_threads(),
        tables.data_ptr(),
        counts.data_ptr(),
        sums.data_ptr(),
        maximum.data_ptr(),
        0 if mask is None else mask.data_ptr(),
    )
