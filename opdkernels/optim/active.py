"""The active values of a local tensor: taken, put, put back."""

from __future__ import annotations

import torch

from opdkernels.ops.step import active_indices
from opdkernels.optim.binding import Shard, local_part


def active_of(tensor: torch.Tensor, shard: Shard) -> torch.Tensor:
    """fp32 [active]: a local tensor's active values."""
    into = torch.empty(shard.active, dtype=torch.float32, device=tensor.device)
    torch.ops.opdkernels.masked_gather_(tensor.detach().contiguous(), shard.mask, shard.block_counts, into, False)
    return into


def put_active(tensor: torch.Tensor, shard: Shard, values: torch.Tensor) -> None:
    """Sets a local tensor's active values, in place."""
    tensor = tensor.detach()
    whole = tensor.contiguous()
    torch.ops.opdkernels.masked_scatter_(whole, shard.mask, shard.block_counts, values)
    if whole.data_ptr() != tensor.data_ptr():
        tensor.copy_(whole)


def restore(param: torch.Tensor, init: torch.Tensor, before: Shard, after: Shard) -> None:
    """Puts what is active before and no longer after back to where it began."""
    local = local_part(param)[0]
    was, now = (active_indices(shard.mask, local.numel()) for shard in (before, after))
    values = torch.where(torch.isin(was, now), active_of(local, before), init.float())
    put_active(local, before, values)
