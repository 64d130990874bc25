"""`quantile` on the CPU: raw pointers to csrc/quantile/cpu.cpp. The public functions check the arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.backends import cpu


def quantile(
    values: torch.Tensor, k: Sequence[int], largest: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    cuts, counts = torch.empty(len(k), dtype=torch.float64), torch.empty(len(k), 5, dtype=torch.int64)
    cpu._C.quantile(
        values.data_ptr(),
        cpu.DTYPE_CODES[values.dtype],
        values.numel(),
        list(k),
        largest,
        0 if mask is None else mask.data_ptr(),
        torch.get_num_threads(),
        cuts.data_ptr(),
        counts.data_ptr(),
    )
    return cuts, counts
