"""`overlap` on the CPU: raw pointers to csrc/overlap/cpu.cpp. The public functions check the arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.backends import cpu


def overlap_(
    source: torch.Tensor,
    trained: Sequence[torch.Tensor],
    cut: int,
    source_table: torch.Tensor,
    changed: torch.Tensor,
    both: torch.Tensor,
    runs: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    cpu._C.overlap(
        source.data_ptr(),
        cpu.DTYPE_CODES[source.dtype],
        [tensor.data_ptr() for tensor in trained],
        [cpu.DTYPE_CODES[tensor.dtype] for tensor in trained],
        source.numel(),
        cut,
        torch.get_num_threads(),
        source_table.data_ptr(),
        changed.data_ptr(),
        both.data_ptr(),
        runs.data_ptr(),
        counts.data_ptr(),
    )
