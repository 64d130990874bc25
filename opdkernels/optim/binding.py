"""The mask of a parameter of an optimizer, sliced to the local shard.

Nothing here holds a Parameter, since trainers replace them: a mask is bound to a position in the groups, a name and a
global shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from opdkernels.errors import printable
from opdkernels.masks.mask import Mask
from opdkernels.ops.step.validation import DTYPES

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)  # no DTensors, which saves looking for their attributes


@dataclass
class LocalMask:
    """The local part of a mask, on the device of the parameter."""

    payload: torch.Tensor  # bitmap uint8 [ceil(numel / 8)], or indices int32 or int64 [num_active]
    block_counts: torch.Tensor  # int64 [blocks + 1] of a bitmap, else [0]
    num_active: int
    offset: int | None  # flat index of its first coordinate in the unsharded tensor; None if it is no flat range


@dataclass
class Binding:
    """The mask of one parameter.

    Attributes:
        mask: The mask of the whole parameter, also where the parameter is sharded.
        name: Name of the parameter; empty if it has none.
        param_id: Position among all parameters of the optimizer.
        last_step: The dtype and the device of the parameter in its last step; its state fits only these.
    """

    mask: Mask
    name: str
    param_id: int
    last_step: tuple[torch.dtype, torch.device] | None = None
    cache_key: tuple | None = field(default=None, compare=False)
    cached_local_mask: LocalMask | None = field(default=None, compare=False)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "cache_key": None, "cached_local_mask": None}

    @property
    def digest(self) -> int:
        """The digest of the mask as a signed 64-bit number, which a tensor can hold."""
        return int.from_bytes(bytes.fromhex(self.mask.digest), "big", signed=True)

    @cached_property
    def display_name(self) -> str:
        """The name of the parameter for messages."""
        return printable(self.name) or f"parameter {self.param_id}"

    def local_mask(self, param: torch.Tensor) -> LocalMask:
        """The mask of the local part of `param`; cached until the shape, the position or the device changes."""
        if param.shape != self.mask.shape:
            raise ValueError(
                f"{self.display_name} is now {list(param.shape)}; its mask is {list(self.mask.shape)}: "
                "create the optimizer again"
            )
        local, start = local_part(param)
        key = (local.shape, start, local.device)
        if self.cached_local_mask is None or key != self.cache_key:
            mask, offset = self._slice_mask(local, start)
            block_counts = mask.block_counts if mask.layout == "bitmap" else torch.zeros(0, dtype=torch.int64)
            self.cached_local_mask = LocalMask(
                mask.payload.to(local.device), block_counts.to(local.device), mask.num_active, offset
            )
            self.cache_key = key
        return self.cached_local_mask

    def validate_weights(self, local: torch.Tensor, *, has_state: bool) -> None:
        """Raise where the local weights cannot be stepped, or have another dtype or device than their state.

        Before its first step a model may be moved, or cast between float32 and bfloat16.
        """
        if local.device.type == "meta":
            raise ValueError(
                f"{self.display_name} is on the meta device, without data; load its weights before the step"
            )
        if self.mask.num_active and local.dtype not in DTYPES:
            raise TypeError(
                f"{self.display_name} is now {local.dtype}; masked optimizers step float32 and bfloat16: "
                "cast the model back, and use torch.autocast instead of a cast"
            )
        if self.mask.num_active and not local.is_contiguous() and torch._debug_has_internal_overlap(local) == 1:
            raise ValueError(f"elements of {self.display_name} share memory, as after expand(); clone() it")
        if has_state and self.last_step and self.last_step != (local.dtype, local.device):
            dtype, device = self.last_step
            raise ValueError(
                f"{self.display_name} was {dtype} on {device} in its last step and is now {local.dtype} on "
                f"{local.device}; cast or move the model back, or do so before the first step"
            )

    def _slice_mask(self, local: torch.Tensor, start: tuple[int, ...] | None) -> tuple[Mask, int | None]:
        """The mask of a local tensor that begins at the coordinates `start`, and its flat offset, if it is a flat
        range."""
        if start is None:
            return self.mask, 0
        if tuple(local.shape[1:]) != self.mask.shape[1:]:
            region = tuple(slice(first, first + n) for first, n in zip(start, local.shape, strict=True))
            return Mask.from_bool(self.mask.to_bool()[region]), None
        row_numel = self.mask.numel // self.mask.shape[0] if self.mask.shape and self.mask.shape[0] else 0
        offset = start[0] * row_numel if start else 0
        return self.mask.flat(offset, offset + local.numel()), offset


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """The local shard of a tensor, and, for a DTensor, the coordinates where it begins."""
    if not is_dtensor(tensor):
        return tensor, None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(type(p).__name__ == "_StridedShard" for p in tensor.placements):  # type: ignore[attr-defined]
        raise ValueError(
            "a parameter is sharded in strides (FSDP over tensor parallelism); masks take contiguous shards"
        )
    _, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
    return tensor.to_local(), tuple(start)  # type: ignore[attr-defined]


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return type(tensor) not in PLAIN_TYPES and hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local_gradient(param: torch.Tensor, grad: torch.Tensor, name: str) -> torch.Tensor:
    """The gradient of the local shard of a parameter: contiguous, fp32 or bf16. `name` is for messages."""
    if grad.is_sparse or grad.is_complex():
        raise RuntimeError(f"{name} has a {'sparse' if grad.is_sparse else 'complex'} gradient; give a dense, real one")
    validate_gradient_shape(param, grad, name)
    local = as_sharded(param, grad)
    local = local_part(local)[0].detach().contiguous()
    return local if local.dtype in DTYPES else local.float()


def validate_gradient_shape(param: torch.Tensor, grad: torch.Tensor, name: str) -> None:
    """Raise ValueError where a gradient does not have the shape of its parameter."""
    if grad.shape != param.shape:
        raise ValueError(
            f"{name} is {list(param.shape)}, its gradient {list(grad.shape)}; zero_grad() after a parameter has changed"
        )


def as_sharded(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """A gradient with the placements of its DTensor: that of a replicated weight may be a sum that is still pending."""
    if is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        return grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return grad
