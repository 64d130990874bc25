"""`gram` on the CPU: raw pointers to csrc/gram/cpu.cpp. The public functions check the arguments."""

from __future__ import annotations

import torch

from opdkernels.backends import cpu


def gram_(
    source: torch.Tensor, trained: torch.Tensor, parts: int, visible: bool, block: int, into: torch.Tensor
) -> None:
    cpu._C.gram(
        source.data_ptr(),
        cpu.DTYPE_CODES[source.dtype],
        *source.stride(),
        trained.data_ptr(),
        cpu.DTYPE_CODES[trained.dtype],
        *trained.stride(),
        *source.shape,
        parts,
        visible,
        block,
        torch.get_num_threads(),
        into.data_ptr(),
    )
