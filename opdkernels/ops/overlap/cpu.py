"""`overlap` on the CPU: raw pointers to csrc/overlap/cpu.cpp. The public function validates the arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.backends import cpu
from opdkernels.backends.cpu import INT, PTR
from opdkernels.backends.layout import DTYPE_CODES

KERNEL = cpu.declare("opd_overlap", PTR, INT, PTR, PTR, INT, INT, INT, INT, PTR, PTR, PTR, PTR, PTR)


def overlap_(
    base: torch.Tensor,
    trained: Sequence[torch.Tensor],
    threshold_bits: int,
    hist_base: torch.Tensor,
    hist_changed: torch.Tensor,
    both: torch.Tensor,
    hist_num_runs: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    base, trained = cpu.aligned(base), [cpu.aligned(tensor) for tensor in trained]
    KERNEL(
        cpu.address(base),
        DTYPE_CODES[base.dtype],
        cpu.int64s([cpu.address(tensor) for tensor in trained]),
        cpu.int64s([DTYPE_CODES[tensor.dtype] for tensor in trained]),
        len(trained),
        base.numel(),
        threshold_bits,
        torch.get_num_threads(),
        hist_base.data_ptr(),
        hist_changed.data_ptr(),
        both.data_ptr(),
        hist_num_runs.data_ptr(),
        counts.data_ptr(),
    )
