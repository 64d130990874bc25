"""Validation of the arguments of the `step` operators: kernels follow pointers, so nothing may be out of bounds."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from opdkernels.bits import bit_counts
from opdkernels.ops.step.args import StepArgs
from opdkernels.ops.step.layout import BLOCK, NUM_SCALARS, PRECISIONS

DTYPES = (torch.float32, torch.bfloat16)
RESIDUAL_DTYPES = {"split_master": torch.int16, "kahan": torch.bfloat16}
MOMENTS = ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "momentum_buffers")


def precision_code(precision: str) -> int:
    """The position of a precision in PRECISIONS. Raises ValueError for another name."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision}")
    return PRECISIONS.index(precision)


def validate_step(args: StepArgs, required: Sequence[str]) -> None:
    """Raise where the arguments of a step do not fit; `required` are the moments that may not be left out."""
    count, scalars = len(args.params), args.scalars
    optional = ("residuals", "init_values", "step_groups", *MOMENTS)
    lists = ("grads", "masks", "block_counts", "scalar_rows", "shard_offsets", "param_ids", *optional)
    for name in lists:
        length = len(getattr(args, name))
        if length != count and (length or name in required or name not in optional):
            raise ValueError(f"{count} params need as many {name}, not {length}")
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
    for i in range(count):
        validate_param(i, args)


def validate_param(i: int, args: StepArgs) -> None:
    """Raise where the tensors of the i-th param do not fit."""
    param, grad = args.params[i], args.grads[i]
    num_active = validate_dense(i, param, grad, args.masks[i], args.block_counts[i])
    for name in MOMENTS:
        moments = getattr(args, name)
        if moments and (name != "max_exp_avg_sqs" or moments[i].numel()):
            validate_tensor(i, param, name, moments[i], torch.float32, num_active)
    precision = PRECISIONS[args.precision]
    residual_dtype = RESIDUAL_DTYPES.get(precision) if param.dtype == torch.bfloat16 else None
    if residual_dtype is not None:
        if not args.residuals:
            raise ValueError(f"precision {precision} needs residuals, {residual_dtype} [{num_active}] for param {i}")
        validate_tensor(i, param, "residuals", args.residuals[i], residual_dtype, num_active)
    elif args.residuals:
        residual = args.residuals[i]
        validate_tensor(i, param, "residuals", residual, residual.dtype, residual.numel())
    if args.init_values and args.init_values[i].numel():
        validate_tensor(i, param, "init_values", args.init_values[i], param.dtype, num_active)
    if args.step_groups and args.step_groups[i].numel():
        validate_tensor(i, param, "step_groups", args.step_groups[i], torch.uint8, num_active)
        largest, rows = cached(max_step_group, args.step_groups[i]), len(args.scalars) - args.scalar_rows[i]
        if largest >= rows:
            raise ValueError(f"param {i} has step group {largest} and {rows} rows of scalars")
    if not param.is_contiguous() or not grad.is_contiguous() or grad.shape not in (param.shape, (num_active,)):
        raise ValueError(
            f"param {i} and its gradient must be contiguous and of one shape, "
            f"not {list(param.shape)} and {list(grad.shape)}"
        )
    if grad.shape != param.shape and grad.dtype != torch.float32:
        raise ValueError(f"the gathered gradient of param {i} must be float32, not {grad.dtype}")


def validate_compact(
    values: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor, compact: torch.Tensor
) -> None:
    """Raise where the arguments of a gather or a scatter do not fit."""
    num_active = validate_dense(0, values, values, mask, block_counts)
    validate_tensor(0, values, "compact values", compact, torch.float32, num_active)
    if not values.is_contiguous():
        raise ValueError(f"values must be contiguous, not of stride {list(values.stride())}")


def validate_dense(
    i: int, param: torch.Tensor, grad: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor
) -> int:
    """Raise where a param, its gradient or its mask does not fit. Returns the number of active coordinates."""
    if param.dtype not in DTYPES or grad.dtype not in DTYPES:
        raise TypeError(f"param {i} is {param.dtype}, its gradient {grad.dtype}; step takes float32 and bfloat16")
    if grad.device != param.device:
        raise ValueError(on_another_device(i, param, "grads", grad))
    n = param.numel()
    if mask.dtype == torch.uint8:
        validate_tensor(i, param, "masks", mask, torch.uint8, (n + 7) // 8)
        validate_tensor(i, param, "block_counts", block_counts, torch.int64, -(-n // BLOCK) + 1)
    else:
        index_dtype = mask.dtype if mask.dtype in (torch.int32, torch.int64) else torch.int64
        validate_tensor(i, param, "masks", mask, index_dtype, mask.numel())
        validate_tensor(i, param, "block_counts", block_counts, torch.int64, 0)
    try:
        return cached(count_active, mask, block_counts, n)
    except ValueError as error:
        raise ValueError(f"{error} of param {i}") from None


def validate_tensor(
    i: int, param: torch.Tensor, name: str, tensor: torch.Tensor, dtype: torch.dtype, size: int
) -> None:
    """Raise where a tensor is on another device than its param, or not contiguous, of this dtype and [size]."""
    if tensor.device != param.device:
        raise ValueError(on_another_device(i, param, name, tensor))
    if tensor.dtype != dtype or tensor.shape != (size,) or not tensor.is_contiguous():
        raise ValueError(
            f"{name} of param {i} must be contiguous {dtype} [{size}], not {tensor.dtype} {list(tensor.shape)}"
        )


def on_another_device(i: int, param: torch.Tensor, name: str, tensor: torch.Tensor) -> str:
    return f"param {i} is on {param.device}, its {name} on {tensor.device}; move one of them"


def count_active(mask: torch.Tensor, block_counts: torch.Tensor, n: int) -> int:
    """The active coordinates of a mask of n coordinates. Reads all of it: a kernel follows every index."""
    if mask.dtype != torch.uint8:
        if mask.numel() and (int(mask[0]) < 0 or int(mask[-1]) >= n or bool((mask[1:] <= mask[:-1]).any())):
            raise ValueError(f"the indices must ascend within the {n} coordinates")
        return mask.numel()
    if n % 8 and int(mask[-1]) >> n % 8:
        raise ValueError(f"the mask has bits beyond the last of the {n} coordinates")
    padded = np.zeros((block_counts.numel() - 1) * BLOCK // 8, np.uint8)
    padded[: mask.numel()] = mask.cpu().numpy()
    counts = bit_counts(padded.reshape(-1, BLOCK // 8)).sum(1, dtype=np.int64)
    if not np.array_equal(block_counts.cpu().numpy(), np.concatenate(([0], np.cumsum(counts)))):
        raise ValueError("the block_counts are not the prefix popcounts of the mask")
    return int(block_counts[-1])


def max_step_group(step_group: torch.Tensor) -> int:
    return int(step_group.max())


# Results of `cached` by the identity of the first tensor, which is not kept alive.
CACHE = WeakIdKeyDictionary()


def cached(function: Any, tensor: torch.Tensor, other: torch.Tensor | None = None, *numbers: int) -> int:
    """function(tensor, ...), remembered until torch changes one of the tensors in place.

    An optimizer gives the same masks at each step: reading all of them again would cost as much as the step, and on a
    GPU a copy to the host.
    """
    tensors = (tensor,) if other is None else (tensor, other)
    if any(t.is_inference() for t in tensors):  # these have no version
        return function(*tensors, *numbers)
    key = (function, numbers, tuple((t._version, t.data_ptr(), t.shape) for t in tensors))
    entry = CACHE.get(tensor)
    if entry is not None and entry[0] == key and (other is None or entry[1]() is other):
        return entry[2]
    result = function(*tensors, *numbers)
    CACHE[tensor] = (key, None if other is None else weakref.ref(other), result)
    return result
