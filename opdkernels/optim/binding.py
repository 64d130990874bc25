"""Which mask is whose: masks of a set, a file, a mapping or a list, bound to an optimizer's parameters, and cut to what of them
lives here.

Nothing here holds a Parameter: trainers replace them. A mask is bound to a place among the groups, a name and a global shape.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from opdkernels.checkpoint.names import canonical_name
from opdkernels.errors import printable
from opdkernels.masks.mask import Mask
from opdkernels.masks.mask_set import MaskSet
from opdkernels.ops.step import DTYPES

Masks = MaskSet | str | os.PathLike[str] | Mapping[str, Mask | torch.Tensor] | Sequence[Mask | torch.Tensor]


@dataclass
class Shard:
    """What of a mask lives here: kernels' arguments, and the place of its first coordinate in the whole tensor."""

    mask: torch.Tensor
    block_counts: torch.Tensor
    active: int
    start: int | None  # None where the shard is not one range of places


@dataclass
class Binding:
    """The mask of one parameter. `ordinal` is its number among all of the optimizer's."""

    mask: Mask
    name: str
    ordinal: int
    key: tuple | None = field(default=None, compare=False)
    held: Shard | None = field(default=None, compare=False)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "key": None, "held": None}

    @property
    def digest(self) -> int:
        """That of the mask, as a signed 64-bit number, which a tensor can hold."""
        return int.from_bytes(bytes.fromhex(self.mask.digest), "big", signed=True)

    def shard(self, param: torch.Tensor) -> Shard:
        """The mask of what `param` holds here; made again only where that has changed."""
        if tuple(param.shape) != self.mask.shape:
            raise ValueError(
                f"{printable(self.name)} is now {list(param.shape)}; its mask is {list(self.mask.shape)}: make the optimizer again"
            )
        local, at = local_part(param)
        key = (tuple(local.shape), at, local.device)
        if self.held is None or key != self.key:
            part, start = self.mask, 0 if at is None else None
            if at is not None:
                rows = self.mask.numel // self.mask.shape[0] if self.mask.shape and self.mask.shape[0] else 0
                if tuple(local.shape[1:]) == self.mask.shape[1:]:  # a range of places
                    start = at[0] * rows if at else 0
                    part = self.mask.flat(start, start + local.numel())
                else:
                    part = Mask.from_bool(
                        self.mask.to_bool()[tuple(slice(a, a + n) for a, n in zip(at, local.shape, strict=True))]
                    )
            bits = part.layout == "bitmap"
            held = part.bitmap if bits else part.indices
            offsets = part.block_counts if bits else torch.zeros(0, dtype=torch.int64)
            self.held, self.key = Shard(held.to(local.device), offsets.to(local.device), part.num_active, start), key
        return self.held


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """What of a tensor lives here, and, of a DTensor, where in it that begins."""
    if not is_dtensor(tensor):
        return tensor, None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(type(p).__name__ == "_StridedShard" for p in tensor.placements):  # type: ignore[attr-defined]
        raise ValueError(
            "a parameter is sharded in strides (FSDP over tensor parallelism); masks take contiguous shards"
        )
    _, at = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
    return tensor.to_local(), tuple(at)  # type: ignore[attr-defined]


def is_dtensor(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local_gradient(param: torch.Tensor, grad: torch.Tensor, named: str) -> torch.Tensor:
    """What of a gradient belongs to what of its parameter lives here: contiguous, fp32 or bf16."""
    if grad.is_sparse or grad.is_complex():
        raise RuntimeError(
            f"{named} has a {'sparse' if grad.is_sparse else 'complex'} gradient; give a dense, real one"
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"{named} is {list(param.shape)}, its gradient {list(grad.shape)}; zero_grad() after a parameter has changed"
        )
    local = as_sharded(param, grad)
    local = local_part(local)[0].detach().contiguous()
    return local if local.dtype in DTYPES else local.float()


def as_sharded(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """A DTensor's gradient, placed as the DTensor is: that of a replicated weight may still be a sum to be taken."""
    if is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        return grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return grad


class Binder:
    """Hands out the masks that were given, each parameter its own."""

    def __init__(self, masks: Masks, unmasked: str):
        if unmasked not in ("error", "freeze", "train"):
            raise ValueError(f"unmasked must be refuse, freeze or train, not {unmasked}")
        if isinstance(masks, (str, os.PathLike)):
            masks = MaskSet.load(masks)
        self.by_name: Mapping[str, Mask] | None = None
        self.in_order: list[Mask] | None = None
        if isinstance(masks, MaskSet):
            self.by_name = masks
        elif isinstance(masks, Mapping):
            self.by_name = {name: as_mask(mask, f"the mask of {printable(name)}") for name, mask in masks.items()}
        elif isinstance(masks, Sequence):
            self.in_order = [as_mask(mask, f"mask {i}") for i, mask in enumerate(masks)]
        else:
            raise TypeError(
                f"masks are {type(masks).__name__}; give a MaskSet, its path, a mapping of names to masks or bool tensors, or a list of them"
            )
        self.unmasked = unmasked
        self.count = self.found = self.numbered = 0

    def bind(self, params: Iterable[torch.Tensor], names: Sequence[str] | None) -> list[Binding]:
        """Bindings of a group's parameters. Raises TypeError or ValueError with the parameter that has none or another's."""
        before = self.count, self.found, self.numbered
        try:
            return [self._bind(param, names[i] if names else None) for i, param in enumerate(params)]
        except Exception:
            self.count, self.found, self.numbered = before
            raise

    def check(self) -> None:
        """Raises ValueError where the masks are clearly not of the parameters that were bound."""
        if self.by_name and not self.found:
            raise ValueError(
                f"none of the {len(self.by_name)} masks, {printable(next(iter(self.by_name)))} and so on, is of a parameter here; name them alike"
            )
        if self.by_name is not None and self.numbered and self.numbered != len(self.by_name):
            raise ValueError(
                f"{self.numbered} parameters without names and {len(self.by_name)} masks in a model's order; give all of model.parameters(), or names"
            )

    def _bind(self, param: torch.Tensor, name: str | None) -> Binding:
        ordinal, self.count = self.count, self.count + 1
        named = printable(name) if name else f"parameter {ordinal}"
        if self.by_name is not None and name:
            found = (
                self.by_name[name]
                if name in self.by_name
                else self.by_name.get(canonical_name(name, keep_prefixes=True))
            )
        else:
            found = self._numbered(ordinal, named)
        self.found += found is not None
        if found is None:
            if self.unmasked == "error":
                raise ValueError(
                    f'{named} has no mask; give one, leave the parameter out, or pass unmasked="freeze" or "train"'
                )
            none = Mask.from_indices(torch.zeros(0, dtype=torch.int64), param.shape)
            found = ~none if self.unmasked == "train" else none
        if found.shape != tuple(param.shape):
            raise ValueError(
                f"{named} is {list(param.shape)}, its mask {list(found.shape)}: these are another model's masks"
            )
        if found.num_active and param.dtype not in DTYPES:
            raise TypeError(f"{named} is {param.dtype}; masked optimizers step float32 and bfloat16")
        return Binding(found, name or "", ordinal)

    def _numbered(self, ordinal: int, named: str) -> Mask | None:
        if self.by_name is None:
            assert self.in_order is not None
            return self.in_order[ordinal] if ordinal < len(self.in_order) else None
        if not getattr(self.by_name, "in_model_order", False):
            raise ValueError(
                f"{named} has no name, and masks in a checkpoint's order would go to the wrong ones; give model.named_parameters(), "
                "or masks of opdkernels.optim.in_model_order(masks, model)"
            )
        self.numbered += 1
        names = list(self.by_name)
        return self.by_name[names[ordinal]] if ordinal < len(names) else None


def as_mask(given: object, named: str) -> Mask:
    if isinstance(given, Mask):
        return given
    if not isinstance(given, torch.Tensor) or given.dtype != torch.bool:
        raise TypeError(f"{named} is {getattr(given, 'dtype', type(given).__name__)}; give a Mask or a bool tensor")
    return Mask.from_bool(given)


def in_model_order(masks: Masks, model: torch.nn.Module) -> MaskSet:
    """The masks of a model's parameters in the order of `model.parameters()`, for trainers that hand over parameters without names.

    A set of these, or the file that its `save` writes, may be given for unnamed parameters: all of them, in that order, in one
    group. Raises ValueError for a parameter without a mask.
    """
    binder = Binder(masks, "error")
    named = list(model.named_parameters())
    bindings = binder.bind([param for _, param in named], [name for name, _ in named])
    found = MaskSet(
        {canonical_name(name, keep_prefixes=True): one.mask for (name, _), one in zip(named, bindings, strict=True)}
    )
    found.in_model_order = True
    return found
