"""Mode B: the active values as Parameters of their own, for trainers whose optimizer state must be as large as the parameters
(DeepSpeed ZeRO, Megatron), and for any optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from opdkernels.errors import printable
from opdkernels.ops.step import masked_put, masked_take
from opdkernels.optim.bind import Binder, Binding, Masks, is_dtensor, plain_name
from opdkernels.optim.masked import active_of, put_active


class MaskedParameters(torch.nn.Module):
    """The active values of a model's masked parameters as fp32 Parameters [active], one a masked parameter, for any optimizer.

    Backward's gradient of a weight is gathered into its compact Parameter and freed; after each step of an optimizer that
    `follow`s, or by `write`, the compact values go back into the weights, a bf16 weight rounded to nearest from what is its fp32
    master. Frozen coordinates are never written. Weights without a mask, and with an empty one, are frozen.

    Raises ValueError where no parameter of the model has a mask, and for DTensors: there MaskedAdamW itself serves.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> compact = MaskedParameters(layer, {"weight": torch.tensor([[True, False]])})
    >>> optimizer = compact.follow(torch.optim.SGD(compact.parameters(), lr=1.0))
    """

    def __init__(self, model: torch.nn.Module, masks: Masks):
        super().__init__()
        binder = Binder(masks, "freeze")
        self._weights: list[tuple[torch.nn.Parameter, Binding]] = []
        self.values = torch.nn.ParameterList()
        self.names: list[str] = []
        self._handles: list[RemovableHandle] = []
        for name, weight in model.named_parameters():
            (binding,) = binder.bind([weight], [name])
            if not binding.mask.nnz:
                weight.requires_grad_(False)
                continue
            if is_dtensor(weight):
                raise ValueError(f"{printable(name)} is a DTensor; give MaskedAdamW the sharded parameters")
            value = torch.nn.Parameter(active_of(weight, binding.shard(weight)))
            number = len(self.values)
            self.values.append(value)
            self.names.append(plain_name(name))
            self._weights.append((weight, binding))
            self._handles.append(weight.register_post_accumulate_grad_hook(lambda param, number=number: self._gather(number, param)))
        if not self.values:
            raise ValueError("no parameter of the model has a mask with an active coordinate; give masks by the model's names")

    def _gather(self, number: int, weight: torch.Tensor) -> None:
        if weight.grad is None:
            return
        value, shard = self.values[number], self._weights[number][1].shard(weight)
        grad = weight.grad.detach().contiguous()
        grad = grad if grad.dtype in (torch.float32, torch.bfloat16) else grad.float()
        if value.grad is None:
            value.grad = active_of(grad, shard)
        else:
            masked_take(grad, shard.mask, shard.offsets, value.grad, add=True)
        weight.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Puts the compact values into the weights."""
        for (weight, binding), value in zip(self._weights, self.values, strict=True):
            shard = binding.shard(weight)
            if weight.is_contiguous():
                masked_put(weight.detach(), shard.mask, shard.offsets, value.detach().float().contiguous())
            else:
                put_active(weight, shard, value.detach().float().contiguous())

    def follow(self, optimizer: Any) -> Any:
        """Has every step of the optimizer end with `write`. Returns the optimizer."""
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.write()))
        return optimizer

    def remove(self) -> None:
        """Takes the hooks off the weights and the optimizer."""
        for handle in self._handles:
            handle.remove()
