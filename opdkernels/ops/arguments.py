"""Validation of the tensors that an operator passes to kernels by address.

Every operator with compiled kernels has a `validate_*` function that `register` runs before each implementation, so
that a call of `torch.ops.opdkernels` is checked as a call of a public function is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

SHARED = "two tensors share memory and one of them is written; pass each tensor once, with memory of its own"


def validate_tensor(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> None:
    """Raise ValueError unless a tensor is contiguous, of this dtype and shape and on this device."""
    if tensor.dtype is dtype and tensor.shape == shape and tensor.device == device and tensor.is_contiguous():
        return
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, not on {tensor.device}; move it")
    raise ValueError(
        f"{name} must be contiguous {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)} "
        f"of stride {list(tensor.stride())}"
    )


def validate_dtype(name: str, tensor: torch.Tensor, dtypes: Iterable[torch.dtype], device: torch.device) -> None:
    """Raise TypeError unless a tensor is of one of the dtypes, ValueError unless it is on this device."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype}; the operator takes {', '.join(map(str, dtypes))}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, not on {tensor.device}; move it")


def validate_input(
    name: str, tensor: torch.Tensor, dtypes: Iterable[torch.dtype], device: torch.device, numel: int | None = None
) -> None:
    """Raise TypeError or ValueError unless a tensor is contiguous, of one of the dtypes, on this device and of `numel`
    elements."""
    validate_dtype(name, tensor, dtypes, device)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not of stride {list(tensor.stride())}")
    if numel is not None and tensor.numel() != numel:
        raise ValueError(f"{name} must have {numel} elements, not {tensor.numel()}")


def validate_memory(
    written: Iterable[torch.Tensor], read: Iterable[torch.Tensor] = (), *, aligned: bool = False
) -> None:
    """Raise ValueError where a tensor that is written shares memory with another one, or a tensor has no memory.

    Args:
        written: Tensors that the kernel writes.
        read: Tensors that it only reads; these may share memory with each other.
        aligned: Whether addresses must be multiples of the size of an element.
    """
    written, read = list(written), list(read)
    addresses, sizes = usable_memory(written + read, aligned=aligned)
    if overlap_written(addresses, sizes, len(written)):
        raise ValueError(SHARED)


def usable_memory(tensors: Sequence[torch.Tensor], *, aligned: bool = False) -> tuple[list[int], list[int]]:
    """Raise ValueError where a tensor has no memory, ends after its storage or, if `aligned`, is not aligned.

    Returns:
        The address and the `memory_span` of each tensor.
    """
    addresses, sizes = [], []
    for tensor in tensors:
        address, size = tensor.data_ptr(), memory_span(tensor)
        if size and not address:
            raise ValueError(f"a tensor {list(tensor.shape)} has no memory: its storage was freed")
        if problem := beyond_storage(tensor, size):
            raise ValueError(f"a tensor {list(tensor.shape)} {problem}; clone() it before its storage is resized")
        if aligned and address % 8 and address % tensor.element_size():  # no element is wider than 8 bytes
            raise ValueError(f"a {tensor.dtype} tensor {list(tensor.shape)} is not aligned to its elements; clone() it")
        addresses.append(address)
        sizes.append(size)
    return addresses, sizes


def beyond_storage(tensor: torch.Tensor, size: int) -> str | None:
    """What is wrong with a tensor that ends after its storage, which `untyped_storage().resize_` made smaller.

    Args:
        tensor: A tensor of any strides.
        size: Its `memory_span`.
    """
    available = tensor.untyped_storage().nbytes()
    needed = size + int(tensor.storage_offset()) * tensor.element_size()
    if available >= needed or not size:
        return None
    return f"needs {needed} bytes, and its storage was resized to {available}"


def memory_span(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element of a tensor of any strides."""
    if tensor.is_contiguous():
        return tensor.nbytes
    if not tensor.numel():
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + last) * tensor.element_size()


def overlap_written(addresses: Sequence[int], sizes: Sequence[int], num_written: int) -> bool:
    """Whether one of the first `num_written` ranges of bytes overlaps any other range."""
    ranges = sorted((addresses[i], addresses[i] + size, i < num_written) for i, size in enumerate(sizes) if size)
    any_end = written_end = 0  # of the ranges that begin earlier, and of those of them that are written
    for start, end, is_written in ranges:
        if start < (any_end if is_written else written_end):
            return True
        any_end = max(any_end, end)
        if is_written:
            written_end = max(written_end, end)
    return False
