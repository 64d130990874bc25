"""The active values as Parameters, for any optimizer, and for trainers whose optimizer state must have the size of the
parameters (DeepSpeed ZeRO, Megatron)."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from opdkernels.checkpoint.names import unwrap_name
from opdkernels.errors import InputError, printable
from opdkernels.optim.active import gather_active, scatter_active
from opdkernels.optim.batch import validate_usable
from opdkernels.optim.bind_masks import Masks, bind_model
from opdkernels.optim.binding import Binding, is_dtensor, local_gradient
from opdkernels.optim.distinct import validate_memory


class MaskedParameters(torch.nn.Module):
    """The active values of a model's masked weights as fp32 Parameters [num_active], one per weight, for any optimizer.

    During the backward pass the gradient of a weight is gathered into its compact Parameter and freed. After each step
    of an `attach`ed optimizer, or by `push_to_model`, the compact values are written to the weights; a bf16 weight is
    rounded to nearest from its compact value, which is its fp32 master. Frozen coordinates are never written. Weights
    without a mask or without an active coordinate are frozen. After loading a state dict into this module call
    `push_to_model`; after loading one into the model, `pull_from_model`.

    Args:
        model: The model that is trained. Its weights must not be DTensors.
        masks: As for `MaskedAdamW`, by the names of the model.

    Raises:
        ValueError: No weight has an active coordinate, a mask has no weight, or a masked weight is a DTensor (use
            MaskedAdamW).

    Examples:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> compact = MaskedParameters(layer, {"weight": torch.tensor([[True, False]])})
        >>> optimizer = compact.attach(torch.optim.SGD(compact.parameters(), lr=1.0))
    """

    def __init__(self, model: torch.nn.Module, masks: Masks):
        super().__init__()
        self._weights: list[tuple[torch.nn.Parameter, Binding]] = []
        self.values = torch.nn.ParameterList()
        self.names: list[str] = []
        self._handles: list[RemovableHandle] = []
        owner = weakref.ref(self)  # the hook's closure lives as long as the model
        bindings = bind_model(masks, model, "freeze")
        named = list(model.named_parameters())
        validate_memory([item for item, binding in zip(named, bindings, strict=True) if binding.mask.num_active])
        for (name, weight), binding in zip(named, bindings, strict=True):
            if not binding.mask.num_active or not weight.requires_grad:
                weight.requires_grad_(False)
                continue
            if is_dtensor(weight):
                raise ValueError(f"{printable(name)} is a DTensor; give MaskedAdamW the sharded parameters")
            index = len(self.values)
            self.values.append(torch.nn.Parameter(gather_active(weight, binding.local_mask(weight))))
            self.names.append(unwrap_name(name))
            self._weights.append((weight, binding))
            self._handles.append(weight.register_post_accumulate_grad_hook(partial(gather_gradient, owner, index)))
        self.register_load_state_dict_pre_hook(validate_extra_state)
        if not self.values:
            raise ValueError(
                "no parameter of the model has a mask with an active coordinate; give masks by the model's names"
            )

    def get_extra_state(self) -> dict[str, Any]:
        """The names and masks of the weights, which a state dict holds next to the values."""
        return {"names": list(self.names), "masks": [binding.mask.digest for _, binding in self._weights]}

    def set_extra_state(self, state: Any) -> None:
        """Nothing: `validate_extra_state` compares it before the values are loaded."""

    @torch.no_grad()
    def push_to_model(self) -> None:
        """Write the compact values to the weights.

        Raises:
            TypeError, ValueError: A weight is neither fp32 nor bf16 any more, or has no memory of its own; no weight
                has changed.
        """
        for weight, binding in self._weights:
            binding.validate_weights(weight, has_state=False)
        validate_usable([(binding.display_name, weight) for weight, binding in self._weights])
        for (weight, binding), value in zip(self._weights, self.values, strict=True):
            scatter_active(weight, binding.local_mask(weight), value.detach().float().contiguous())

    @torch.no_grad()
    def pull_from_model(self) -> None:
        """Read the compact values from the weights."""
        for (weight, binding), value in zip(self._weights, self.values, strict=True):
            value.copy_(gather_active(weight, binding.local_mask(weight)))

    def attach(self, optimizer: Any) -> Any:
        """Call `push_to_model` after every step of an optimizer. Returns the optimizer."""
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.push_to_model()))
        return optimizer

    def remove(self) -> None:
        """Remove the hooks from the weights and the optimizer."""
        for handle in self._handles:
            handle.remove()

    def __reduce__(self) -> Any:
        raise TypeError(
            "MaskedParameters are bound to their model; save their state_dict() "
            "and create them again from the copied or loaded model"
        )

    def __deepcopy__(self, memo: dict) -> Any:
        return self.__reduce__()


def validate_extra_state(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Raise InputError before values are loaded if a state dict is of other weights or masks, or in another order."""
    saved, own = state_dict.get(f"{prefix}_extra_state"), module.get_extra_state()
    if saved is not None and saved != own:
        saved_names = saved.get("names", []) if isinstance(saved, dict) else []
        what = "masks" if saved_names == own["names"] else "weights, or in another order"
        raise InputError(
            f"the state of {len(saved_names)} compact parameters is of other {what}; create MaskedParameters from the "
            "same model and masks as in the saved run"
        )


def gather_gradient(owner: weakref.ref[MaskedParameters], index: int, weight: torch.Tensor) -> None:
    """Pass a weight's active gradients to its compact Parameter by a backward pass, so that hooks of that one run."""
    compact = owner()
    if weight.grad is None or compact is None:
        return
    value, (_, binding) = compact.values[index], compact._weights[index]
    gradient = local_gradient(weight, weight.grad, printable(binding.name))
    active = gather_active(gradient, binding.local_mask(weight))
    weight.grad = None
    torch.autograd.backward([value], [active.to(value.dtype)])
