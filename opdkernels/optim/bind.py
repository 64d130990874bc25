"""Which mask is whose: masks of a set, a file, a mapping or a list, bound to an optimizer's parameters, and cut to what of them
lives here.

Nothing here holds a Parameter: trainers replace them. A mask is bound to a place among the groups, a name and a global shape.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from opdkernels.errors import printable
from opdkernels.masks.mask import Mask
from opdkernels.masks.sets import MaskSet
from opdkernels.ops.step import DTYPES

Masks = MaskSet | str | os.PathLike[str] | Mapping[str, Mask | torch.Tensor] | Sequence[Mask | torch.Tensor]
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # that trainers put into names


@dataclass
class Shard:
    """What of a mask lives here: kernels' arguments, and the place of its first coordinate in the whole tensor."""

    mask: torch.Tensor
    offsets: torch.Tensor
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
            raise ValueError(f"{printable(self.name)} is now {list(param.shape)}; its mask is {list(self.mask.shape)}: make the optimizer again")
        local, at = local_part(param)
        key = (tuple(local.shape), at, local.device)
        if self.held is None or key != self.key:
            part, start = self.mask, 0 if at is None else None
            if at is not None:
                rows = self.mask.numel // self.mask.shape[0] if self.mask.shape and self.mask.shape[0] else 0
                if tuple(local.shape[1:]) == self.mask.shape[1:]:  # a range of places
                    start = at[0] * rows
                    part = self.mask.flat(start, start + local.numel())
                else:
                    part = Mask.from_bool(self.mask.to_bool()[tuple(slice(a, a + n) for a, n in zip(at, local.shape, strict=True))])
            bits = part.held_as == "bits"
            held = part.bits if bits else part.indices
            offsets = part.offsets if bits else torch.zeros(0, dtype=torch.int64)
            self.held, self.key = Shard(held.to(local.device), offsets.to(local.device), part.nnz, start), key
        return self.held


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """What of a tensor lives here, and, of a DTensor, where in it that begins."""
    if not is_dtensor(tensor):
        return tensor, None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(type(p).__name__ == "_StridedShard" for p in tensor.placements):  # type: ignore[attr-defined]
        raise ValueError("a parameter is sharded in strides (FSDP over tensor parallelism); masks take contiguous shards")
    _, at = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
    return tensor.to_local(), tuple(at)  # type: ignore[attr-defined]


def is_dtensor(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def plain_name(name: str) -> str:
    """A parameter's name without what trainers wrap it in."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


class Binder:
    """Hands out the masks that were given, each parameter its own."""

    def __init__(self, masks: Masks, unmasked: str):
        if unmasked not in ("refuse", "freeze", "train"):
            raise ValueError(f"unmasked must be refuse, freeze or train, not {unmasked}")
        if isinstance(masks, (str, os.PathLike)):
            masks = MaskSet.load(masks)
        self.by_name = masks if isinstance(masks, Mapping) else None
        self.in_order = None if isinstance(masks, Mapping) else list(masks)
        self.unmasked = unmasked
        self.count = 0

    def bind(self, params: Iterable[torch.Tensor], names: Sequence[str] | None) -> list[Binding]:
        """Bindings of a group's parameters. Raises TypeError or ValueError with the parameter that has none or another's."""
        return [self._bind(param, names[i] if names else None) for i, param in enumerate(params)]

    def _bind(self, param: torch.Tensor, name: str | None) -> Binding:
        ordinal, self.count = self.count, self.count + 1
        named = printable(plain_name(name)) if name else f"parameter {ordinal}"
        if param.dtype not in DTYPES:
            raise TypeError(f"{named} is {param.dtype}; masked optimizers step float32 and bfloat16")
        found = self._named(plain_name(name), named) if name and self.by_name is not None else self._numbered(ordinal, named)
        if found is None:
            if self.unmasked == "refuse":
                raise ValueError(f'{named} has no mask; give one, leave the parameter out, or pass unmasked="freeze" or "train"')
            every = torch.full((-(-param.numel() // 8),), 0xFF, dtype=torch.uint8)
            if param.numel() % 8:
                every[-1] = (1 << param.numel() % 8) - 1
            mask = Mask.from_bits(every if self.unmasked == "train" else torch.zeros_like(every), param.shape)
        else:
            mask = found if isinstance(found, Mask) else Mask.from_bool(found)
        if mask.shape != tuple(param.shape):
            raise ValueError(f"{named} is {list(param.shape)}, its mask {list(mask.shape)}: these are another model's masks")
        return Binding(mask, plain_name(name) if name else "", ordinal)

    def _named(self, name: str, named: str) -> Mask | torch.Tensor | None:
        assert self.by_name is not None
        if name in self.by_name:
            return self.by_name[name]
        ends = [one for one in self.by_name if one.endswith(f".{name}") or name.endswith(f".{one}")]  # a part of the model, or around it
        if len(ends) > 1:
            raise ValueError(f"{named} could be {printable(ends[0])} or {printable(ends[1])}; name parameters as the masks do")
        return self.by_name[ends[0]] if ends else None

    def _numbered(self, ordinal: int, named: str) -> Mask | torch.Tensor | None:
        if self.by_name is None:
            assert self.in_order is not None
            return self.in_order[ordinal] if ordinal < len(self.in_order) else None
        if not getattr(self.by_name, "in_model_order", False):
            raise ValueError(
                f"{named} has no name, and masks in a checkpoint's order would go to the wrong ones; give model.named_parameters(), "
                "or masks of opdkernels.optim.in_model_order(masks, model)"
            )
        names = list(self.by_name)
        return self.by_name[names[ordinal]] if ordinal < len(names) else None


def in_model_order(masks: Masks, model: torch.nn.Module) -> MaskSet:
    """The masks of a model's parameters in the order of `model.parameters()`, for trainers that hand over parameters without names.

    A set of these, or the file that its `save` writes, may be given for unnamed parameters. Raises ValueError for a parameter
    without a mask.
    """
    binder = Binder(masks, "refuse")
    named = list(model.named_parameters())
    bindings = binder.bind([param for _, param in named], [name for name, _ in named])
    found = MaskSet({plain_name(name): one.mask for (name, _), one in zip(named, bindings, strict=True)})
    found.in_model_order = True
    return found

