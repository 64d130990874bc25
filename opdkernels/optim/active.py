"""Gather, scatter and restore the active values of a local tensor."""

from __future__ import annotations

import torch

from opdkernels.ops.step import active_indices, masked_gather, masked_scatter
from opdkernels.optim.binding import LocalMask, local_part


def gather_active(tensor: torch.Tensor, local_mask: LocalMask) -> torch.Tensor:
    """The active values of a local tensor, fp32 [num_active]."""
    out = torch.empty(local_mask.num_active, dtype=torch.float32, device=tensor.device)
    return masked_gather(tensor.detach().contiguous(), local_mask.payload, local_mask.block_counts, out)


def scatter_active(tensor: torch.Tensor, local_mask: LocalMask, values: torch.Tensor) -> None:
    """Set the active values of a local tensor, in place, to fp32 [num_active]."""
    tensor = tensor.detach()
    contiguous = tensor.contiguous()
    masked_scatter(contiguous, local_mask.payload, local_mask.block_counts, values)
    if contiguous.data_ptr() != tensor.data_ptr():
        tensor.copy_(contiguous)


def restore_dropped(param: torch.Tensor, init_value: torch.Tensor, old_mask: LocalMask, new_mask: LocalMask) -> None:
    """Reset the coordinates that are active in the old mask only to their initial values [num_active of the old]."""
    local = local_part(param)[0]
    old_indices = active_indices(old_mask.payload, local.numel())
    new_indices = active_indices(new_mask.payload, local.numel())
    stays_active = torch.isin(old_indices, new_indices)
    scatter_active(local, old_mask, torch.where(stays_active, gather_active(local, old_mask), init_value.float()))
