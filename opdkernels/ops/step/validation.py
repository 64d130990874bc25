"""Validation of the arguments of the `step` operators: kernels follow pointers, so nothing may be out of bounds.

`validate_adamw`, `validate_sgd`, `validate_gather` and `validate_scatter` run before every implementation.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opdkernels.bits import bit_counts
from opdkernels.ops.arguments import (
    SHARED,
    overlap_written,
    usable_memory,
    validate_input,
    validate_memory,
    validate_tensor,
)
from opdkernels.ops.step.args import ADAMW_FIELDS, SGD_FIELDS, StepArgs, unflatten
from opdkernels.ops.step.layout import BLOCK, NUM_SCALARS, PRECISIONS

DTYPES = (torch.float32, torch.bfloat16)
RESIDUAL_DTYPES = {"split_master": torch.int16, "kahan": torch.bfloat16}
MOMENTS = ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "momentum_buffers")


def precision_code(precision: str) -> int:
    """The position of a precision in PRECISIONS. Raises ValueError for another name."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision}")
    return PRECISIONS.index(precision)


def validate_adamw(*flat: object) -> None:
    """Validate the flat arguments of `masked_adamw_`."""
    validate_step(unflatten(flat, ADAMW_FIELDS), required=("exp_avgs", "exp_avg_sqs"))


def validate_sgd(*flat: object) -> None:
    """Validate the flat arguments of `masked_sgd_`."""
    validate_step(unflatten(flat, SGD_FIELDS), required=())


def validate_gather(
    values: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor, out: torch.Tensor, add: bool
) -> None:
    """Validate the arguments of `masked_gather_`."""
    validate_compact(values, mask, block_counts, out)
    validate_memory([out], [values, mask, block_counts], aligned=True)


def validate_scatter(
    values: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor, compact: torch.Tensor
) -> None:
    """Validate the arguments of `masked_scatter_`."""
    validate_compact(values, mask, block_counts, compact)
    validate_memory([values], [compact, mask, block_counts], aligned=True)


def validate_step(args: StepArgs, required: Sequence[str]) -> None:
    """Raise where the arguments of a step do not fit.

    Runs in every operator, so that no caller can pass a kernel a pointer that was not checked. What does not change
    between steps, the contents of masks, is remembered.

    Args:
        args: Arguments of the operator.
        required: The moments that may not be left out.

    Raises:
        TypeError: A param or a gradient is neither fp32 nor bf16.
        ValueError: A list has another length than `params`; a tensor has another dtype, shape or device than the
            schema says, is not contiguous or not aligned, or shares memory with a tensor that the step writes.
    """
    count, scalars = len(args.params), args.scalars
    optional = ("residuals", "init_values", "step_groups", "changed", *MOMENTS)
    lists = ("grads", "masks", "block_counts", "scalar_rows", "shard_offsets", "param_ids", *optional)
    for name in lists:
        length = len(getattr(args, name))
        if length != count and (length or name in required or name not in optional):
            raise ValueError(f"{count} params need as many {name}, not {length}")
    if not 0 <= args.precision < len(PRECISIONS):
        raise ValueError(f"precision must be the position of one of {', '.join(PRECISIONS)}, not {args.precision}")
    if (
        scalars.dtype != torch.float32
        or scalars.ndim != 2
        or scalars.shape[1] != NUM_SCALARS
        or any(not 0 <= row < len(scalars) for row in args.scalar_rows)
    ):
        raise ValueError(
            f"scalars must be float32 [rows, {NUM_SCALARS}] with a row for each of {count} params, "
            f"not {scalars.dtype} {list(scalars.shape)}"
        )
    if any(not 0 <= param_id < 1 << 32 for param_id in args.param_ids):
        raise ValueError(f"param_ids must be in 0 .. {(1 << 32) - 1}, not {list(args.param_ids)}")
    if not count:
        return
    device = args.params[0].device
    if scalars.device != device and scalars.device.type != "cpu":
        raise ValueError(f"scalars are on {scalars.device}, param 0 on {device}; move one of them")
    for name in ("grad_scale", "clip", "found_inf"):
        validate_factor(name, getattr(args, name), device)
    address, key = args.params[0].data_ptr(), fingerprint(args, required)
    known = REMEMBERED.get(address)
    contents = followed_tensors(args)
    if known is not None and key is not None and known.fingerprint == key and known.has_read(contents):
        validate_gradients(args, known)
        return
    num_active, written = validate_tensors(args, device)
    if key is not None:
        REMEMBERED.pop(address, None)
        REMEMBERED[address] = Validated(key, [weakref.ref(tensor) for tensor in contents], num_active, *written)
        for oldest in list(REMEMBERED)[:-MAX_REMEMBERED]:
            REMEMBERED.pop(oldest, None)  # another thread may have removed it


@dataclass(frozen=True)
class Validated:
    """What was validated in an earlier step.

    Attributes:
        fingerprint: Everything that was validated but for gradients and factors, see `fingerprint`.
        contents: References to the tensors whose contents were read. A new tensor may have the address and the version
            of one that was freed, and other contents.
        num_active: Active coordinates of each param.
        starts, ends: The ranges of bytes that the step writes, ascending, uint64.
    """

    fingerprint: tuple[Any, ...]
    contents: list[weakref.ref[torch.Tensor]]
    num_active: list[int]
    starts: np.ndarray
    ends: np.ndarray

    def has_read(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are the tensors whose contents were read, of as many as the fingerprint says."""
        return all(reference() is tensor for reference, tensor in zip(self.contents, tensors, strict=True))


MAX_REMEMBERED = 64  # calls, each of the parameters of a group on a device
REMEMBERED: dict[int, Validated] = {}  # by the address of the first param; the fingerprint decides


def fingerprint(args: StepArgs, required: Sequence[str]) -> tuple[Any, ...] | None:
    """Addresses, dtypes, shapes, contiguity, storages and versions of all tensors but gradients and factors.

    A step with an equal fingerprint accesses the same memory in the same way as the one that was validated. Computing
    it costs less than a fifth of the validation, and nearly every step of a run is such a step. None for tensors of
    inference mode.
    """
    contents = followed_tensors(args)
    moments = [tensor for name in MOMENTS for tensor in getattr(args, name)]
    tensors = (*args.params, *moments, *args.residuals, *args.init_values, *args.changed, *contents)
    try:
        versions = [tensor._version for tensor in contents]
    except RuntimeError:
        return None
    return (
        [tensor.data_ptr() for tensor in tensors],
        [tensor.dtype for tensor in tensors],
        [tensor.shape for tensor in tensors],
        [tensor.is_contiguous() for tensor in tensors],
        [tensor.untyped_storage().nbytes() for tensor in tensors],
        [tensor.storage_offset() for tensor in tensors],
        versions,
        [
            len(getattr(args, name))
            for name in ("params", *MOMENTS, "residuals", "init_values", "step_groups", "changed")
        ],
        args.params[0].device,
        tuple(required),
        args.precision,
        list(args.scalar_rows) if args.step_groups else [],
        len(args.scalars) if args.step_groups else 0,
    )


def followed_tensors(args: StepArgs) -> list[torch.Tensor]:
    """The tensors whose contents a kernel follows as indices."""
    return [*args.masks, *args.block_counts, *args.step_groups]


def validate_gradients(args: StepArgs, known: Validated) -> None:
    """Raise where a gradient or a factor does not fit."""
    device = args.params[0].device
    for i, (param, grad) in enumerate(zip(args.params, args.grads, strict=True)):
        validate_input(f"grads[{i}]", grad, DTYPES, device)
        validate_gradient(i, param, grad, known.num_active[i])
    addresses, sizes = as_arrays(*usable_memory([*args.grads, *shared_tensors(args)], aligned=True))
    first = np.searchsorted(known.ends, addresses, side="right")  # the first range that ends after a gradient begins
    starts = np.append(known.starts, np.iinfo(np.uint64).max)[first]
    if ((starts < addresses + sizes) & (sizes > 0)).any():
        raise ValueError(SHARED)


def validate_tensors(args: StepArgs, device: torch.device) -> tuple[list[int], tuple[np.ndarray, np.ndarray]]:
    """Raise where a tensor does not fit.

    Returns:
        The active coordinates of each param, and the ranges of bytes that the step writes, as in `Validated`.
    """
    count = len(args.params)
    dense = zip(args.params, args.grads, args.masks, args.block_counts, strict=True)
    active = [validate_dense(i, *tensors, device) for i, tensors in enumerate(dense)]
    shapes = [(num_active,) for num_active in active]
    fp32 = count * [torch.float32]
    for name in ("exp_avgs", "exp_avg_sqs", "momentum_buffers"):
        validate_list(name, getattr(args, name), fp32, shapes, device)
    validate_list("max_exp_avg_sqs", args.max_exp_avg_sqs, fp32, shapes, device, optional=True)
    validate_list(
        "init_values", args.init_values, [param.dtype for param in args.params], shapes, device, optional=True
    )
    validate_list("step_groups", args.step_groups, count * [torch.uint8], shapes, device, optional=True)
    sizes = [
        (-(-(param.numel() if mask.dtype == torch.uint8 else num_active) // 8),)
        for param, mask, num_active in zip(args.params, args.masks, active, strict=True)
    ]
    validate_list("changed", args.changed, count * [torch.uint8], sizes, device, optional=True)
    residuals = validate_residuals(args, shapes, device)
    for i, step_group in enumerate(args.step_groups):
        rows = len(args.scalars) - args.scalar_rows[i]
        if step_group.numel() and cached(max_step_group, step_group) >= rows:
            largest = max_step_group(step_group)
            raise ValueError(f"param {i} has step group {largest} and {rows} rows of scalars")
    moments = (tensor for name in MOMENTS for tensor in getattr(args, name))
    written = [*args.params, *moments, *residuals, *args.changed]
    read = [*args.grads, *args.masks, *args.block_counts, *args.init_values, *args.step_groups, *shared_tensors(args)]
    ranges = usable_memory(written + read, aligned=True)
    if overlap_written(*ranges, len(written)):
        raise ValueError(SHARED)
    addresses, spans = as_arrays(*ranges)
    used = np.flatnonzero(spans[: len(written)])
    order = used[np.argsort(addresses[used])]
    return active, (addresses[order], addresses[order] + spans[order])


def as_arrays(*numbers: list[int]) -> list[np.ndarray]:
    """Addresses and sizes as uint64 arrays."""
    return [np.array(values, np.uint64) for values in numbers]


def shared_tensors(args: StepArgs) -> list[torch.Tensor]:
    """The tensors that all params share."""
    factors = (args.scalars, args.grad_scale, args.clip, args.found_inf)
    return [tensor for tensor in factors if tensor is not None]


def validate_list(
    name: str,
    tensors: Sequence[torch.Tensor],
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int]],
    device: torch.device,
    *,
    optional: bool = False,
) -> None:
    """Raise where a tensor of a list that may be empty does not fit; `optional`: a tensor without elements does."""
    if not tensors:
        return
    for i, (tensor, dtype, shape) in enumerate(zip(tensors, dtypes, shapes, strict=True)):
        if tensor.dtype is dtype and tensor.shape == shape and tensor.device == device and tensor.is_contiguous():
            continue
        if not optional or tensor.numel():
            validate_tensor(f"{name} of param {i}", tensor, dtype, shape, device)


def validate_residuals(args: StepArgs, shapes: Sequence[tuple[int]], device: torch.device) -> list[torch.Tensor]:
    """Raise where the residuals of bf16 params do not fit. Returns those that the step writes."""
    precision = PRECISIONS[args.precision]
    dtype = RESIDUAL_DTYPES.get(precision)
    used = [i for i, param in enumerate(args.params) if dtype and param.dtype == torch.bfloat16]
    for i in used:
        if not args.residuals:
            raise ValueError(f"precision {precision} needs residuals, {dtype} {list(shapes[i])} for param {i}")
        validate_tensor(f"residuals of param {i}", args.residuals[i], dtype, shapes[i], device)  # type: ignore[arg-type]
    return [args.residuals[i] for i in used]


def validate_factor(name: str, factor: torch.Tensor | None, device: torch.device) -> None:
    """Raise where a factor that all tensors share is not one fp32 element on the device of the params."""
    if factor is None:
        return
    if factor.dtype != torch.float32 or factor.numel() != 1 or factor.ndim > 1:
        raise ValueError(f"{name} must be float32 with one element, not {factor.dtype} {list(factor.shape)}")
    if factor.device != device:
        raise ValueError(f"{name} is on {factor.device}, param 0 on {device}; move one of them")


def validate_compact(
    values: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor, compact: torch.Tensor
) -> None:
    """Raise where the arguments of a gather or a scatter do not fit."""
    num_active = validate_dense(0, values, None, mask, block_counts, values.device)
    validate_tensor("compact values of param 0", compact, torch.float32, (num_active,), values.device)


def validate_dense(
    i: int,
    param: torch.Tensor,
    grad: torch.Tensor | None,
    mask: torch.Tensor,
    block_counts: torch.Tensor,
    device: torch.device,
) -> int:
    """Raise where a param, its gradient or its mask does not fit. Returns the number of active coordinates."""
    for name, tensor in (("params", param), ("grads", grad)) if grad is not None else (("values", param),):
        validate_input(f"{name}[{i}]", tensor, DTYPES, device)
    try:
        num_active = cached(count_active, mask, block_counts, param.numel())
    except ValueError as error:
        raise ValueError(f"param {i}: {error}") from None
    if mask.device != device:
        raise ValueError(f"the mask of param {i} must be on {device}, not on {mask.device}; move one of them")
    if grad is not None:
        validate_gradient(i, param, grad, num_active)
    return num_active


def validate_gradient(i: int, param: torch.Tensor, grad: torch.Tensor, num_active: int) -> None:
    """Raise where a gradient has neither the shape of its param nor one fp32 element per active coordinate."""
    if grad.shape == param.shape:
        return
    if grad.shape != (num_active,):
        raise ValueError(
            f"param {i} and its gradient must be of one shape, not {list(param.shape)} and {list(grad.shape)}"
        )
    if grad.dtype != torch.float32:
        raise ValueError(f"the gathered gradient of param {i} must be float32, not {grad.dtype}")


def count_active(mask: torch.Tensor, block_counts: torch.Tensor, n: int) -> int:
    """The active coordinates of a mask of n coordinates. Reads all of it: a kernel follows every index."""
    is_bitmap = mask.dtype == torch.uint8
    index_dtype = mask.dtype if mask.dtype in (torch.int32, torch.int64) else torch.int64
    if is_bitmap:
        validate_tensor("its mask", mask, torch.uint8, ((n + 7) // 8,), mask.device)
    else:
        validate_tensor("its mask of indices", mask, index_dtype, (mask.numel(),), mask.device)
    num_counts = -(-n // BLOCK) + 1 if is_bitmap else 0
    validate_tensor("its block_counts", block_counts, torch.int64, (num_counts,), mask.device)
    validate_memory([], [mask, block_counts])
    if not is_bitmap:
        if mask.numel() and (int(mask[0]) < 0 or int(mask[-1]) >= n or bool((mask[1:] <= mask[:-1]).any())):
            raise ValueError(f"the indices of its mask must ascend within the {n} coordinates")
        return mask.numel()
    if n % 8 and int(mask[-1]) >> n % 8:
        raise ValueError(f"its mask has bits beyond the last of the {n} coordinates")
    padded = np.zeros((block_counts.numel() - 1) * BLOCK // 8, np.uint8)
    padded[: mask.numel()] = mask.cpu().numpy()
    counts = bit_counts(padded.reshape(-1, BLOCK // 8)).sum(1, dtype=np.int64)
    if not np.array_equal(block_counts.cpu().numpy(), np.concatenate(([0], np.cumsum(counts)))):
        raise ValueError("its block_counts are not the prefix popcounts of its mask")
    return int(block_counts[-1])


def max_step_group(step_group: torch.Tensor) -> int:
    return int(step_group.max())


# Results of `cached` by the id of the first tensor; an entry ends with its tensor.
CACHE: dict[int, tuple[Any, ...]] = {}


def tensor_fingerprint(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What changes with the contents or the layout of a tensor. Raises RuntimeError for tensors of inference mode."""
    return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.is_contiguous()


def cached(function: Any, tensor: torch.Tensor, other: torch.Tensor | None = None, *numbers: int) -> int:
    """function(tensor, ...), remembered until torch changes one of the tensors in place.

    An optimizer gives the same masks at each step: reading all of them again would cost as much as the step, and on a
    GPU a copy to the host.
    """
    try:
        key = (function, numbers, *tensor_fingerprint(tensor))
        if other is not None:
            key += tensor_fingerprint(other)
    except RuntimeError:  # tensors of inference mode have no version
        return function(tensor) if other is None else function(tensor, other, *numbers)
    entry = CACHE.get(id(tensor))
    if entry is not None and entry[0]() is tensor and entry[2] == key and (other is None or entry[1]() is other):
        return entry[3]
    result = function(tensor) if other is None else function(tensor, other, *numbers)
    identity = id(tensor)
    reference = weakref.ref(tensor, lambda _: CACHE.pop(identity, None))
    CACHE[identity] = (reference, None if other is None else weakref.ref(other), key, result)
    return result
