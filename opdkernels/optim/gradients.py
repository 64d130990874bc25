"""Gradients of the active coordinates alone: gathered as backward goes, or dense with zeros where nothing is active."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.hooks import RemovableHandle

from opdkernels.ops.step import DTYPES, masked_take
from opdkernels.optim.bind import Binding, local_part
from opdkernels.optim.masked import MaskedOptimizer, Place, active_of, named, put_active


class Hooks:
    """What was registered; `remove` takes it off again."""

    def __init__(self, handles: list[RemovableHandle], gathering: MaskedOptimizer | None = None):
        self.handles, self.gathering = handles, gathering

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        if self.gathering is not None:
            self.gathering._gathers = False


def compact_gradients(model: torch.nn.Module, optimizer: MaskedOptimizer) -> Hooks:
    """Gathers the active gradients of each parameter, fp32, as soon as backward has them, and frees the dense gradient: at any time
    about one layer's lives. Micro-batches add up; `optimizer.step` takes what was gathered, `zero_grad` forgets it.

    `p.grad` is then None after backward, so that a trainer's own clipping sees nothing: use `optimizer.clip_grad_norm_`. Raises
    RuntimeError for DistributedDataParallel, whose gradients are views of buckets that are reduced after the hook.
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise RuntimeError("DistributedDataParallel reduces gradients after the hook that gathers them; use FSDP2 (fully_shard), or leave gradients dense")
    def gather(place: Place, binding: Binding, param: torch.Tensor) -> None:
        grad = param.grad
        if grad is None:
            return
        if grad.is_sparse:
            raise RuntimeError(f"{named(binding)} has a sparse gradient; give a dense one")
        shard, local = binding.shard(param), local_part(grad)[0].detach().contiguous()
        local = local if local.dtype in DTYPES else local.float()
        gathered = optimizer._compact.get(place)
        if gathered is None:
            optimizer._compact[place] = active_of(local, shard)
        else:
            masked_take(local, shard.mask, shard.offsets, gathered, add=True)
        param.grad = None

    handles = hook_each(model, optimizer, gather)
    optimizer._gathers = True
    return Hooks(handles, optimizer)


def mask_gradients(model: torch.nn.Module, optimizer: MaskedOptimizer) -> Hooks:
    """Sets frozen gradients to zero, NaN and Inf too, as soon as backward has them, so that any trainer's clipping, logging and
    GradScaler see the active ones alone.

    Raises RuntimeError for DistributedDataParallel, whose gradients are views of buckets that are reduced after the hook.
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise RuntimeError("DistributedDataParallel reduces gradients after the hook that masks them; use FSDP2 (fully_shard), or optimizer.clip_grad_norm_")
    def mask(place: Place, binding: Binding, param: torch.Tensor) -> None:
        if param.grad is None:
            return
        shard, local = binding.shard(param), local_part(param.grad)[0].detach()
        active = active_of(local, shard)
        local.zero_()
        put_active(local, shard, active)

    return Hooks(hook_each(model, optimizer, mask))


def hook_each(model: torch.nn.Module, optimizer: MaskedOptimizer, hook: Callable[[Place, Binding, torch.Tensor], None]) -> list[RemovableHandle]:
    """Has `hook(place, binding, parameter)` called when a parameter of both has its gradient. Nothing here keeps a parameter alive."""
    ours = {param: (place, binding) for place, param, binding in optimizer._live()}
    params = [param for param in model.parameters() if param in ours and param.requires_grad]
    if not params:
        raise ValueError("the optimizer has no parameter of this model that needs a gradient; give the model that it was made for, wrapped as it is trained")
    return [param.register_post_accumulate_grad_hook(partial(hook, *ours[param])) for param in params]
