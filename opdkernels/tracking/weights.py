"""The trainable weights of a model in memory: which part this process counts, and their values at the start."""

from __future__ import annotations

import contextlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from opdkernels.checkpoint.base import Checkpoint
from opdkernels.checkpoint.correspondence import match_tensors
from opdkernels.checkpoint.names import unwrap_name
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.masks.mask import Mask
from opdkernels.ops.delta import DTYPES
from opdkernels.optim.bind_masks import Masks, masks_of_model, model_types
from opdkernels.optim.binding import Binding, is_dtensor, local_part

Reader = Callable[[int, int], torch.Tensor]  # flat elements [start, stop) of a parameter, 1-D


@dataclass
class TrackedWeight:
    """The part of one parameter that this process counts, every `stride`-th coordinate of it.

    Attributes:
        start: Values at the start [num_sampled].
        numel: Coordinates of the local part.
        stride: Distance between two coordinates that are compared.
        changed_any: Which coordinates differed from the start at any measurement, uint8 [ceil(num_sampled / 8)].
        mask: Which coordinates are active in the given mask, in the same layout; None without masks.
    """

    start: torch.Tensor
    numel: int
    stride: int
    changed_any: np.ndarray
    mask: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        arrays = [self.changed_any] if self.mask is None else [self.changed_any, self.mask]
        return self.start.nbytes + sum(array.nbytes for array in arrays)


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by the names that they have without wrappers; a tied weight once.

    Raises:
        UsageError: There is none, its dtype is not supported, or the parameters are flattened or gathered elsewhere
            (FSDP1, ZeRO-3), so that their coordinates cannot be compared.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UsageError("UpdateTracker cannot read the flattened parameters of FSDP1; use FSDP2 (fsdp_version 2)")
    params = {unwrap_name(name): param for name, param in model.named_parameters() if param.requires_grad}
    if not params:
        raise UsageError("the model has no trainable parameter (requires_grad), so that no update can be tracked")
    for name, param in params.items():
        if hasattr(param, "ds_id"):
            raise UsageError("UpdateTracker cannot read parameters of DeepSpeed ZeRO-3; use ZeRO-2 or FSDP2")
        if param.is_meta:
            raise UsageError(f"{printable(name)} is on the meta device, without data; load the weights first")
        if param.dtype not in DTYPES:
            raise UsageError(
                f"{printable(name)} is {param.dtype}; UpdateTracker compares bfloat16, float16, float32 and float64"
            )
    return params


def is_counted_here(param: torch.Tensor) -> bool:
    """Whether this process counts its local part of a parameter: of equal copies, only the first one counts."""
    if not is_dtensor(param):
        return process_rank() == 0
    position = param.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    if position is None:
        return False
    placements = param.placements  # type: ignore[attr-defined]
    return all(index == 0 for index, placement in zip(position, placements, strict=True) if placement.is_replicate())


def process_rank() -> int:
    """Rank of this process; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def flat_local(param: torch.Tensor) -> torch.Tensor:
    """The local part of a parameter, 1-D; a copy only if it is not contiguous."""
    return local_part(param.detach())[0].reshape(-1)


def coprime_stride(shape: tuple[int, ...], stride: int) -> int:
    """The smallest stride from `stride` on that has no factor in common with a dimension, so that no row or column is
    left out as a whole.

    >>> coprime_stride((896, 896), 10), coprime_stride((896, 896), 1)
    (11, 1)
    """
    numel = math.prod(shape)
    while stride > 1 and numel and math.gcd(stride, numel) > 1:
        stride += 1
    return stride


def start_weights(
    model: torch.nn.Module,
    *,
    masks: Masks | None = None,
    base: str | os.PathLike[str] | None = None,
    stride: int = 1,
    offload: bool = True,
) -> dict[str, TrackedWeight]:
    """The weights that a run starts from, by the names of the parameters; those that other processes count are absent.

    Args:
        model: The model.
        masks: As for `MaskedAdamW`.
        base: Checkpoint with the weights at the start; None: those that the model has now.
        stride: Compare about every stride-th coordinate.
        offload: Keep the values in CPU memory instead of on the device of the parameter.

    Raises:
        UsageError: See `trainable_parameters`; or no mask is of a trainable parameter.
        InputError: `base` cannot be read, or lacks a parameter.
        ValueError: A mask has another shape than its parameter.
    """
    params = trainable_parameters(model)
    bound = bound_masks(masks, model, params) if masks is not None else {}
    result: dict[str, TrackedWeight] = {}
    with open_base(base, model) as readers:
        for name, param in params.items():
            if not is_counted_here(param):
                continue
            local, offset = local_part(param.detach())
            step = coprime_stride(tuple(local.shape), stride)
            if base is None:
                values = local.reshape(-1)[::step]
            else:
                if name not in readers:
                    raise InputError(
                        f"{printable(os.fspath(base))} has no tensor for the parameter {printable(name)} of shape "
                        f"{list(param.shape)}; give the checkpoint that this model was trained from"
                    )
                values = read_local(readers[name], tuple(param.shape), tuple(local.shape), offset)[::step]
            device = torch.device("cpu") if offload else local.device
            # A copy in any case: the parameter changes, and what a checkpoint returns is valid until its next read.
            start = values.to(device, copy=True).contiguous()
            num_bytes = (len(start) + 7) // 8
            weight = TrackedWeight(start, local.numel(), step, np.zeros(num_bytes, np.uint8))
            if masks is not None:
                weight.mask = (
                    sampled_bits(bound[name], name, param, step) if name in bound else np.zeros_like(weight.changed_any)
                )
            result[name] = weight
    return result


def bound_masks(masks: Masks, model: torch.nn.Module, params: dict[str, torch.nn.Parameter]) -> dict[str, Mask]:
    """The masks of trainable parameters. Raises UsageError if there is none, ValueError for another shape."""
    named = {unwrap_name(name): mask for name, mask in masks_of_model(masks, model).items()}
    bound = {name: mask for name, mask in named.items() if name in params}
    if not bound:
        raise UsageError(
            f"no mask has the name of a trainable parameter: the first of {len(named)} masks is "
            f"{printable(next(iter(named), ''))}, the first parameter {printable(next(iter(params)))}; give masks of "
            "this model"
        )
    for name, mask in bound.items():
        if mask.shape != tuple(params[name].shape):
            raise ValueError(
                f"{printable(name)} is {list(params[name].shape)}, its mask {list(mask.shape)}: these are another "
                "model's masks"
            )
    return bound


def sampled_bits(mask: Mask, name: str, param: torch.Tensor, stride: int) -> np.ndarray:
    """The bits of a mask at the compared coordinates of this process's part of a parameter."""
    local = Binding(mask, name, 0).local_mask(param)
    numel = local_part(param)[0].numel()
    payload = local.payload.cpu()
    is_bitmap = payload.dtype == torch.uint8
    active = Mask((numel,), payload, None) if is_bitmap else Mask((numel,), None, payload)
    return np.packbits(active.to_bool().numpy()[::stride], bitorder="little")


@contextlib.contextmanager
def open_base(base: str | os.PathLike[str] | None, model: torch.nn.Module) -> Iterator[dict[str, Reader]]:
    """A function for each parameter that reads a range of it from a checkpoint; none without a checkpoint."""
    if base is None:
        yield {}
        return
    checkpoint = open_checkpoint(base)
    try:
        yield base_readers(checkpoint, model)
        checkpoint.check()
    finally:
        checkpoint.close()


def base_readers(checkpoint: Checkpoint, model: torch.nn.Module) -> dict[str, Reader]:
    """A function for each parameter that a checkpoint has, under any of its names and in any layout of experts."""
    params = dict(model.named_parameters())
    named = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(param.shape) for name, param in named.items()}
    infos = checkpoint.tensors
    result = match_tensors({name: info.shape for name, info in infos.items()}, shapes, model_types=model_types(model))
    # Pieces of each parameter: its first flat element, number of elements, tensor, first flat element there.
    pieces: defaultdict[str, list[tuple[int, int, str, int]]] = defaultdict(list)
    for name, other, _ in result.pairs:
        if tuple(infos[name].shape) != shapes[other]:
            raise InputError(
                f"{printable(name)} is {list(infos[name].shape)} in {printable(checkpoint.path)} and "
                f"{list(shapes[other])} in the model; give the checkpoint that this model was trained from"
            )
        pieces[other].append((0, infos[name].numel, name, 0))
    for part in result.parts:
        pieces[part.other].append((part.other_start, part.numel, part.name, part.start))
    first_names = {id(param): name for name, param in params.items()}
    readers: dict[str, Reader] = {}
    for name, of_parameter in pieces.items():
        if sum(numel for _, numel, _, _ in of_parameter) == math.prod(shapes[name]):
            first_name = unwrap_name(first_names[id(named[name])])
            readers.setdefault(first_name, piecewise_reader(checkpoint, sorted(of_parameter)))
    return readers


def piecewise_reader(checkpoint: Checkpoint, pieces: list[tuple[int, int, str, int]]) -> Reader:
    """A function that reads a range of a parameter that is stored in pieces."""

    def read(start: int, stop: int) -> torch.Tensor:
        parts = []
        for first, numel, name, offset in pieces:
            low, high = max(start, first), min(stop, first + numel)
            if low < high:
                values = checkpoint.read(name, offset + low - first, offset + high - first)
                parts.append(values if len(pieces) == 1 else values.clone())
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    return read


def read_local(
    read: Reader, shape: tuple[int, ...], local_shape: tuple[int, ...], offset: tuple[int, ...] | None
) -> torch.Tensor:
    """The local part of a parameter of `shape`, 1-D; `offset` are the coordinates where it begins."""
    numel, local_numel = math.prod(shape), math.prod(local_shape)
    if not local_numel:
        return torch.empty(0)
    if offset is None:
        return read(0, numel)
    if local_shape[1:] == shape[1:]:  # a shard along dimension 0 is a flat range
        start = offset[0] * math.prod(shape[1:]) if shape else 0
        return read(start, start + local_numel)
    region = tuple(slice(first, first + n) for first, n in zip(offset, local_shape, strict=True))
    return read(0, numel).view(shape)[region].reshape(-1)
