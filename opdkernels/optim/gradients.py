"""Hooks on the gradients of a backward pass: gather the active ones, or set the frozen ones to zero."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.hooks import RemovableHandle

from opdkernels.ops.step import masked_gather
from opdkernels.optim.active import gather_active, scatter_active
from opdkernels.optim.base import MaskedOptimizer, ParamKey
from opdkernels.optim.binding import Binding, LocalMask, as_sharded, is_dtensor, local_gradient, local_part
from opdkernels.optim.gathered import GatheredGrad


class Hooks:
    """Installed hooks. `remove` removes them and discards what was gathered."""

    def __init__(self, handles: list[RemovableHandle], owner: weakref.ref[MaskedOptimizer] | None = None):
        self.handles, self.owner = handles, owner

    def remove(self) -> None:
        """Remove the hooks and discard gathered gradients."""
        for handle in self.handles:
            handle.remove()
        optimizer = self.owner() if self.owner else None
        if optimizer is not None:
            optimizer._discard_gathered()


def gather_active_grads(model: torch.nn.Module, optimizer: MaskedOptimizer) -> Hooks:
    """Gather the active gradients of each parameter during the backward pass and free the dense gradient.

    At any time the dense gradients of about one layer exist. Gathered gradients are fp32; micro-batches add up. After
    the backward pass `p.grad` has memory for the active coordinates only. A trainer's own clipping with
    `torch.nn.utils.clip_grad_norm_`, its log of the norm and a GradScaler work on it, over the active coordinates.
    Gradients of DTensors (FSDP2) are kept by the optimizer and `p.grad` is None: a trainer's clipping does not see
    them, so use `optimizer.clip_grad_norm_`.

    Args:
        model: The model that is trained, wrapped as it is trained.
        optimizer: An optimizer of its parameters.

    Returns:
        The installed hooks.

    Raises:
        RuntimeError: The model is a DistributedDataParallel, whose gradients are views of buckets that are reduced
            after the hook.
        ValueError: The optimizer has no trainable parameter of the model.

    Examples:
        >>> from opdkernels.optim import MaskedAdamW
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = MaskedAdamW(layer.named_parameters(), masks={"weight": torch.tensor([[True, False]])})
        >>> hooks = gather_active_grads(layer, optimizer)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> layer.weight.grad
        GatheredGrad([1, 2], active=tensor([1.]))
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise RuntimeError(
            "DistributedDataParallel reduces gradients after the hook that gathers them; "
            "use FSDP2 (fully_shard), or leave gradients dense"
        )
    if any(is_dtensor(param) for _, param, _ in optimizer._bindings()):
        warnings.warn(
            "the optimizer keeps the gathered gradients of DTensors: torch.nn.utils.clip_grad_norm_, and trainers that "
            "call it, do not clip them and log a norm without them; use optimizer.clip_grad_norm_, or "
            "zero_frozen_grads instead of gather_active_grads",
            stacklevel=2,
        )
    owner = weakref.ref(optimizer)  # the hook's closure lives as long as the model

    def gather(key: ParamKey, param: torch.Tensor) -> None:
        optimizer = owner()
        if param.grad is None or optimizer is None:
            return
        if isinstance(param.grad, GatheredGrad):  # this backward pass was added to it
            return
        binding = optimizer._bindings_by_group[key[0]][key[1]]
        gathered = optimizer._gathered_grads.get(key)
        if gathered is not None:
            add_active(gathered, local_gradient(param, param.grad, binding.display_name), binding.local_mask(param))
            param.grad = None
            return
        active = gather_active(local_gradient(param, param.grad, binding.display_name), binding.local_mask(param))
        if is_dtensor(param):
            optimizer._gathered_grads[key] = active
            param.grad = None
        else:
            param.grad = GatheredGrad(active, param, partial(add_dense, binding))

    return Hooks(register_hooks(model, optimizer, gather), owner)


def add_dense(binding: Binding, active: torch.Tensor, dense: torch.Tensor) -> None:
    """Add the active coordinates of a dense gradient to gathered ones."""
    add_active(active, local_gradient(dense, dense, binding.display_name), binding.local_mask(dense))


def add_active(active: torch.Tensor, local: torch.Tensor, local_mask: LocalMask) -> None:
    """Add the active coordinates of a local gradient to gathered ones, fp32 [num_active]."""
    masked_gather(local, local_mask.payload, local_mask.block_counts, active, add=True)


def zero_frozen_grads(model: torch.nn.Module, optimizer: MaskedOptimizer) -> Hooks:
    """Set frozen gradients to zero during the backward pass, NaN and Inf too.

    A trainer's own clipping, logging and GradScaler then see the active gradients only.

    Args:
        model: The model that is trained, wrapped as it is trained.
        optimizer: An optimizer of its parameters.

    Returns:
        The installed hooks.

    Raises:
        RuntimeError: The model is a DistributedDataParallel, whose gradients are views of buckets that are reduced
            after the hook.
        ValueError: The optimizer has no trainable parameter of the model.

    Examples:
        >>> from opdkernels.optim import MaskedAdamW
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = MaskedAdamW(layer.named_parameters(), masks={"weight": torch.tensor([[True, False]])})
        >>> hooks = zero_frozen_grads(layer, optimizer)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> layer.weight.grad
        tensor([[1., 0.]])
    """
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise RuntimeError(
            "DistributedDataParallel reduces gradients after the hook that masks them; "
            "use FSDP2 (fully_shard), or optimizer.clip_grad_norm_"
        )
    owner = weakref.ref(optimizer)  # the hook's closure lives as long as the model

    def zero_frozen(key: ParamKey, param: torch.Tensor) -> None:
        optimizer = owner()
        if param.grad is None or optimizer is None:
            return
        binding = optimizer._bindings_by_group[key[0]][key[1]]
        param.grad = as_sharded(param, param.grad)
        local_mask = binding.local_mask(param)
        active = gather_active(local_gradient(param, param.grad, binding.display_name), local_mask)
        local = local_part(param.grad)[0].detach()
        local.zero_()
        scatter_active(local, local_mask, active)

    return Hooks(register_hooks(model, optimizer, zero_frozen))


def register_hooks(
    model: torch.nn.Module, optimizer: MaskedOptimizer, hook: Callable[[ParamKey, torch.Tensor], None]
) -> list[RemovableHandle]:
    """Call `hook(key, parameter)` when a parameter of both model and optimizer has its gradient. Returns the
    handles."""
    keys = {param: key for key, param, _ in optimizer._bindings()}
    params = [param for param in model.parameters() if param in keys and param.requires_grad]
    if not params:
        raise ValueError(
            "the optimizer has no parameter of this model that needs a gradient; "
            "give the model that it was created for, wrapped as it is trained"
        )
    return [param.register_post_accumulate_grad_hook(partial(hook, keys[param])) for param in params]
