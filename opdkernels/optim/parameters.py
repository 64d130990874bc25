"""Mode B: the active values as Parameters of their own, for trainers whose optimizer state must be as large as the parameters
(DeepSpeed ZeRO, Megatron), and for any optimizer."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from opdkernels.checkpoint.names import canonical_name
from opdkernels.errors import printable
from opdkernels.optim.active import active_of, put_active
from opdkernels.optim.binding import Binder, Binding, Masks, is_dtensor, local_gradient


class MaskedParameters(torch.nn.Module):
    """The active values of a model's masked parameters as fp32 Parameters [active], one a masked parameter, for any optimizer.

    Backward's gradient of a weight is gathered into its compact Parameter and freed; after each step of an optimizer that
    is `attach`ed, or by `push_to_model`, the compact values go back into the weights, a bf16 weight rounded to nearest from what is its fp32
    master. Frozen coordinates are never written. Weights without a mask, and with an empty one, are frozen. A state dict that is
    loaded into this shows in the weights after `push_to_model`, one loaded into the model here after `pull_from_model`.

    Raises ValueError where no parameter of the model has a mask, and for DTensors: there MaskedAdamW itself serves.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> compact = MaskedParameters(layer, {"weight": torch.tensor([[True, False]])})
    >>> optimizer = compact.attach(torch.optim.SGD(compact.parameters(), lr=1.0))
    """

    def __init__(self, model: torch.nn.Module, masks: Masks):
        super().__init__()
        binder = Binder(masks, "freeze")
        self._weights: list[tuple[torch.nn.Parameter, Binding]] = []
        self.values = torch.nn.ParameterList()
        self.names: list[str] = []
        self._handles: list[RemovableHandle] = []
        me = weakref.ref(self)  # a hook's closure keeps what it holds as long as the model lives
        for name, weight in model.named_parameters():
            (binding,) = binder.bind([weight], [name])
            if not binding.mask.num_active or not weight.requires_grad:
                weight.requires_grad_(False)
                continue
            if is_dtensor(weight):
                raise ValueError(f"{printable(name)} is a DTensor; give MaskedAdamW the sharded parameters")
            number = len(self.values)
            self.values.append(torch.nn.Parameter(active_of(weight, binding.shard(weight))))
            self.names.append(canonical_name(name, keep_prefixes=True))
            self._weights.append((weight, binding))
            self._handles.append(weight.register_post_accumulate_grad_hook(partial(gather, me, number)))
        if not self.values:
            raise ValueError(
                "no parameter of the model has a mask with an active coordinate; give masks by the model's names"
            )

    @torch.no_grad()
    def push_to_model(self) -> None:
        """Puts the compact values into the weights."""
        for (weight, binding), value in zip(self._weights, self.values, strict=True):
            put_active(weight, binding.shard(weight), value.detach().float().contiguous())

    @torch.no_grad()
    def pull_from_model(self) -> None:
        """Takes the compact values from the weights, after something else has set these."""
        for (weight, binding), value in zip(self._weights, self.values, strict=True):
            value.copy_(active_of(weight, binding.shard(weight)))

    def attach(self, optimizer: Any) -> Any:
        """Has every step of the optimizer end with `push_to_model`. Returns the optimizer."""
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.push_to_model()))
        return optimizer

    def remove(self) -> None:
        """Takes the hooks off the weights and the optimizer."""
        for handle in self._handles:
            handle.remove()

    def __reduce__(self) -> Any:
        raise TypeError(
            "MaskedParameters are bound to their model; save their state_dict() and make them again from the copied or loaded model"
        )

    def __deepcopy__(self, memo: dict) -> Any:
        return self.__reduce__()


def gather(owner: weakref.ref[MaskedParameters], number: int, weight: torch.Tensor) -> None:
    """Hands a weight's active gradients to its compact Parameter by a backward of its own, so that its hooks see them."""
    compact = owner()
    if weight.grad is None or compact is None:
        return
    value, (_, binding) = compact.values[number], compact._weights[number]
    active = active_of(local_gradient(weight, weight.grad, printable(binding.name)), binding.shard(weight))
    weight.grad = None
    torch.autograd.backward([value], [active.to(value.dtype)])
