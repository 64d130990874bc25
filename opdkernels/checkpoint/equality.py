"""Whether two stored tensors have the same bits."""

from __future__ import annotations

import torch

from opdkernels.checkpoint.base import Checkpoint, TensorInfo

FIRST_ITEMS = 1 << 12  # most tensors that differ do so at once
MAX_ITEMS = 1 << 22


def same_bits(checkpoint: Checkpoint, info: TensorInfo, other_checkpoint: Checkpoint, other: TensorInfo) -> bool:
    """Returns whether two tensors have the same dtype, shape and bits. Reads until the first difference."""
    if (info.dtype, info.shape, info.nbytes) != (other.dtype, other.shape, other.nbytes):
        return False
    start, step = 0, FIRST_ITEMS
    while start < info.items:
        stop = min(info.items, start + step)
        # A read may reuse the memory of the read before.
        bits = checkpoint.read_bits(info.name, start, stop).clone()
        if not torch.equal(bits, other_checkpoint.read_bits(other.name, start, stop)):
            return False
        start, step = stop, MAX_ITEMS
    return True
