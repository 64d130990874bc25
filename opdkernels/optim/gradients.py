"""Gradients of the active coordinates alone: gathered as backward goes, or dense with zeros where nothing is active."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.hooks import RemovableHandle

from opdkernels.optim.active import active_of, put_active
from opdkernels.optim.binding import as_sharded, local_gradient, local_part
from opdkernels.optim.masked import MaskedOptimizer, Place, named


class Hooks:
    """What was registered; `remove` takes it off again, and forgets what was gathered."""

    def __init__(self, handles: list[RemovableHandle], gathering: weakref.ref[MaskedOptimizer] | None = None):
        self.handles, self.gathering = handles, gathering

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        optimizer = self.gathering() if self.gathering else None
        if optimizer is not None:
            optimizer._gathers -= 1
            optimizer._compact.clear()
        self.gathering = None


def gather_active_grads(model: torch.nn.Module, optimizer: MaskedOptimizer) -> Hooks:
    """Gathers the active gradients of each parameter, fp32, as soon as backward has them, and frees the dense gradient: at any time
    about one layer's lives. Micro-batches add up; `optimizer.step` takes what was gathered, `zero_grad` forgets it.

    `p.grad` is then None after backward, so that a trainer's own clipping sees nothing: use `optimizer.clip_grad_norm_`. Raises
    RuntimeError for DistributedDataParallel, whose gradients are views of buckets that are reduced after the hook.
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise RuntimeError(
            "DistributedDataParallel reduces gradients after the hook that gathers them; use FSDP2 (fully_shard), or leave gradients dense"
        )
    owner = weakref.ref(optimizer)  # a hook's closure keeps what it holds as long as the model lives

    def gather(place: Place, param: torch.Tensor) -> None:
        stepping = owner()
        if param.grad is None or stepping is None:
            return
        binding = stepping._bound[place[0]][place[1]]
        local, shard = local_gradient(param, param.grad, named(binding)), binding.shard(param)
        gathered = stepping._compact.get(place)
        if gathered is None:
            stepping._compact[place] = active_of(local, shard)
        else:
            torch.ops.opdkernels.masked_gather_(local, shard.mask, shard.block_counts, gathered, True)
        param.grad = None

    hooks = Hooks(hook_each(model, optimizer, gather), owner)
    optimizer._gathers += 1
    return hooks


def zero_frozen_grads(model: torch.nn.Module, optimizer: MaskedOptimizer) -> Hooks:
    """Sets frozen gradients to zero, NaN and Inf too, as soon as backward has them, so that any trainer's clipping, logging and
    GradScaler see the active ones alone.

    Raises RuntimeError for DistributedDataParallel, whose gradients are views of buckets that are reduced after the hook.
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise RuntimeError(
            "DistributedDataParallel reduces gradients after the hook that masks them; use FSDP2 (fully_shard), or optimizer.clip_grad_norm_"
        )
    owner = weakref.ref(optimizer)

    def mask(place: Place, param: torch.Tensor) -> None:
        masking = owner()
        if param.grad is None or masking is None:
            return
        binding = masking._bound[place[0]][place[1]]
        param.grad = as_sharded(param, param.grad)
        active, shard = local_gradient(param, param.grad, named(binding)), binding.shard(param)
        local = local_part(param.grad)[0].detach()
        active = active_of(active, shard)
        local.zero_()
        put_active(local, shard, active)

    return Hooks(hook_each(model, optimizer, mask))


def hook_each(
    model: torch.nn.Module, optimizer: MaskedOptimizer, hook: Callable[[Place, torch.Tensor], None]
) -> list[RemovableHandle]:
    """Has `hook(place, parameter)` called when a parameter of both has its gradient."""
    ours = {param: place for place, param, _ in optimizer._live()}
    params = [param for param in model.parameters() if param in ours and param.requires_grad]
    if not params:
        raise ValueError(
            "the optimizer has no parameter of this model that needs a gradient; give the model that it was made for, wrapped as it is trained"
        )
    return [param.register_post_accumulate_grad_hook(partial(hook, ours[param])) for param in params]
