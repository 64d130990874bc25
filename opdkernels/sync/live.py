"""Live tensors of a model: one name per storage, and reading and writing their bits at flat positions."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from opdkernels.errors import InputError, UsageError, printable
from opdkernels.files import UNPAIRED_SURROGATE
from opdkernels.ops.patch import BITS
from opdkernels.optim.distinct import validate_memory
from opdkernels.patch.apply import described
from opdkernels.sync.tensor_patch import DTYPES

Model = torch.nn.Module | Mapping[str, Any]


def live_tensors(model: Model) -> dict[str, torch.Tensor]:
    """Returns the tensors of a module's state dict, or of a state dict, by name.

    Raises:
        InputError: A tensor is a shard, has no memory, or is of an unsupported dtype or layout.
        UsageError: `model` is neither a module nor a mapping.
    """
    if isinstance(model, torch.nn.Module):
        entries: Mapping[str, Any] = model.state_dict(keep_vars=True)
    elif isinstance(model, Mapping):
        entries = model
    else:
        raise UsageError(f"the model is of type {type(model).__name__}; give a module or its state_dict()")
    tensors = {name: tensor for name, tensor in entries.items() if isinstance(tensor, torch.Tensor)}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or UNPAIRED_SURROGATE.search(name):
            raise InputError(f"{name!a} in the state dict is not Unicode text; rename the tensor")
        described(name, tensor)
        if tensor.is_meta:
            raise InputError(f"{printable(name)} is on the meta device and has no values; load the model first")
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES.values():
            raise InputError(
                f"{printable(name)} is {tensor.dtype} ({tensor.layout}), which a sync patch does not support; leave it"
                " out of the state dict, or convert it"
            )
    return tensors


def names_by_storage(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """Returns the first name of each storage, with its other names.

    Raises:
        InputError: Two tensors share a part of their memory, or elements of one do.
    """
    names: dict[Hashable, list[str]] = {}
    for name, tensor in tensors.items():
        strides = tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)
        storage = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), strides)
        names.setdefault(storage if tensor.numel() else name, []).append(name)
    groups = {first: tuple(others) for first, *others in names.values()}
    try:
        validate_memory([(name, tensors[name]) for name in groups])
    except ValueError as error:
        raise InputError(printable(str(error))) from None
    return groups


def raw_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bits of a live tensor as integers of its shape: a view, whatever its strides."""
    return tensor.detach().view(BITS[tensor.element_size()])


def read_at(tensor: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Returns a copy of the bits at flat positions, integers [n]; of all bits for None."""
    raw = raw_bits(tensor)
    if positions is None:
        return raw.flatten().clone()
    return raw.view(-1)[positions] if raw.is_contiguous() else raw[torch.unravel_index(positions, raw.shape)]


def write_at(tensor: torch.Tensor, positions: torch.Tensor | None, values: torch.Tensor) -> None:
    """Sets the bits at flat positions; all bits for None."""
    raw = raw_bits(tensor)
    if positions is None:
        raw.copy_(values.view(raw.shape))
    elif raw.is_contiguous():
        raw.view(-1)[positions] = values
    else:
        raw[torch.unravel_index(positions, raw.shape)] = values
    if not tensor.is_inference():  # autograd does not see writes through integer views
        torch.autograd.graph.increment_version(tensor)
