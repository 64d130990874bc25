"""Validation of the tensors that an operator passes to kernels by address.

Every operator with compiled kernels has a `validate_*` function that `register` runs before each implementation, so
that a call of `torch.ops.opdkernels` is checked as a call of a public function is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
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


def usable_memory(tensors: Sequence[torch.Tensor], *, aligned: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Raise ValueError where a tensor has no memory, ends after its storage or, if `aligned`, is not aligned.

    Returns:
        The addresses of the tensors and their `memory_spans`, both uint64 [tensors].
    """
    addresses = np.array([tensor.data_ptr() for tensor in tensors], np.uint64)
    sizes = memory_spans(tensors)
    for i in np.flatnonzero((addresses == 0) & (sizes > 0)):
        raise ValueError(f"a tensor {list(tensors[i].shape)} has no memory: its storage was freed")
    for i, problem in beyond_storage(tensors, sizes):
        raise ValueError(f"a tensor {list(tensors[i].shape)} {problem}; clone() it before its storage is resized")
    if aligned and (addresses % 8).any():  # no element is wider
        widths = np.array([tensor.element_size() for tensor in tensors], np.uint64)
        for i in np.flatnonzero(addresses % widths):
            raise ValueError(
                f"a {tensors[i].dtype} tensor {list(tensors[i].shape)} is not aligned to its elements; clone() it"
            )
    return addresses, sizes


def beyond_storage(tensors: Sequence[torch.Tensor], sizes: np.ndarray) -> Iterator[tuple[int, str]]:
    """The tensors that end after their storage, which `untyped_storage().resize_` made smaller.

    Args:
        tensors: Tensors of any strides.
        sizes: Their `memory_spans`.

    Returns:
        The position of each such tensor, and what is wrong with it.
    """
    available = np.array([tensor.untyped_storage().nbytes() for tensor in tensors], np.uint64)
    needed = np.array([tensor.storage_offset() for tensor in tensors], np.uint64)
    if needed.any():
        needed *= np.array([tensor.element_size() for tensor in tensors], np.uint64)
    needed += sizes
    for i in np.flatnonzero((available < needed) & (sizes > 0)):
        yield int(i), f"needs {needed[i]} bytes, and its storage was resized to {available[i]}"


def memory_spans(tensors: Iterable[torch.Tensor]) -> np.ndarray:
    """`memory_span` of each tensor, uint64 [tensors]."""
    return np.array([t.nbytes if t.is_contiguous() else memory_span(t) for t in tensors], np.uint64)


def memory_span(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element of a tensor of any strides."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + last) * tensor.element_size()


def overlap_written(addresses: np.ndarray, sizes: np.ndarray, num_written: int) -> bool:
    """Whether one of the first `num_written` ranges of bytes overlaps any other range."""
    order = np.argsort(addresses, kind="stable")
    is_written = (order < num_written) & (sizes[order] > 0)
    starts, ends = addresses[order], addresses[order] + sizes[order]
    any_end = np.maximum.accumulate(ends)[:-1]  # of the ranges that begin earlier, and of those that are written
    written_end = np.maximum.accumulate(np.where(is_written, ends, 0))[:-1]
    limit = np.where(is_written[1:], any_end, written_end)
    return bool(((starts[1:] < limit) & (sizes[order][1:] > 0)).any())
