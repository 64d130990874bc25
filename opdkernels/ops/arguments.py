"""Validation of the tensors that an operator passes to kernels by address.

Every operator with compiled kernels has a `validate_*` function that `register` runs before each implementation, so
that a call of `torch.ops.opdkernels` is checked as a call of a public function is.
"""

from __future__ import annotations

from collections import defaultdict
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


def sharing_memory(named: Iterable[tuple[str, torch.Tensor]]) -> tuple[str, str | None] | None:
    """The names of two tensors that have an element in common, or one name and None where elements of one tensor share
    memory, as after expand(); None if there are none."""
    by_storage: defaultdict[tuple[torch.device, int], list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for name, tensor in named:
        if not tensor.numel() or tensor.device.type == "meta":
            continue
        if torch._debug_has_internal_overlap(tensor) == 1:
            return name, None
        by_storage[tensor.device, tensor.untyped_storage().data_ptr()].append((name, tensor))
    for (_, address), sharing in by_storage.items():
        if not address or len(sharing) == 1:
            continue
        sharing.sort(key=lambda item: byte_range(item[1])[0])
        for i, (name, tensor) in enumerate(sharing):
            end = byte_range(tensor)[1]
            for other_name, other in sharing[i + 1 :]:
                if byte_range(other)[0] >= end:
                    break
                if overlap(tensor, other):
                    return name, other_name
    return None


def byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the first byte after it."""
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + last + 1) * tensor.element_size()


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one storage, whose byte ranges overlap, have an element in common.

    Interleaved views, such as the columns of a matrix, have none.
    """
    if (a.is_contiguous() and b.is_contiguous()) or a.element_size() != b.element_size():
        return True
    first = min(a.storage_offset(), b.storage_offset())
    last = max(byte_range(tensor)[1] for tensor in (a, b)) // a.element_size()
    used = torch.zeros(last - first, dtype=torch.bool)
    views = [used.as_strided(t.shape, t.stride(), t.storage_offset() - first) for t in (a, b)]
    views[0].fill_(True)
    return bool(views[1].any())
