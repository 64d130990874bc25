"""Gather, scatter and restore the active values of a local tensor."""

from __future__ import annotations

import torch

from opdkernels.ops.step import active_indices, masked_gather, masked_scatter
from opdkernels.optim.binding import Shard, local_part


def gather_active(tensor: torch.Tensor, shard: Shard) -> torch.Tensor:
    """The active values of a local tensor, fp32 [num_active]."""
    out = torch.empty(shard.num_active, dtype=torch.float32, device=tensor.device)
    return masked_gather(tensor.detach().contiguous(), shard.mask, shard.block_counts, out)


def scatter_active(tensor: torch.Tensor, shard: Shard, values: torch.Tensor) -> None:
    """Set the active values of a local tensor, in place, to fp32 [num_active]."""
    tensor = tensor.detach()
    contiguous = tensor.contiguous()
    masked_scatter(contiguous, shard.mask, shard.block_counts, values)
    if contiguous.data_ptr() != tensor.data_ptr():
        tensor.copy_(contiguous)


def restore_dropped(param: torch.Tensor, init_value: torch.Tensor, before: Shard, after: Shard) -> None:
    """Reset coordinates that are active before and not after to their initial values [num_active before]."""
    local = local_part(param)[0]
    was, now = (active_indices(shard.mask, local.numel()) for shard in (before, after))
    values = torch.where(torch.isin(was, now), gather_active(local, before), init_value.float())
    scatter_active(local, before, values)
