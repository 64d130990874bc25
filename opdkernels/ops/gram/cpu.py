"""`gram` on the CPU: raw pointers to csrc/gram/cpu.cpp. The public function validates the arguments."""

from __future__ import annotations

import torch

from opdkernels.backends import cpu
from opdkernels.backends.cpu import INT, PTR
from opdkernels.backends.layout import DTYPE_CODES

KERNEL = cpu.declare("opd_gram", PTR, INT, INT, INT, PTR, INT, INT, INT, INT, INT, INT, INT, INT, INT, PTR)


def gram_(base: torch.Tensor, trained: torch.Tensor, parts: int, visible: bool, block: int, out: torch.Tensor) -> None:
    base, trained = cpu.aligned(base), cpu.aligned(trained)
    KERNEL(
        cpu.address(base),
        DTYPE_CODES[base.dtype],
        *base.stride(),
        cpu.address(trained),
        DTYPE_CODES[trained.dtype],
        *trained.stride(),
        *base.shape,
        parts,
        visible,
        block,
        torch.get_num_threads(),
        out.data_ptr(),
    )
