"""The table that the compiled kernels of `step` read: one STEP_ROW per tensor."""

from __future__ import annotations

import numpy as np
import torch

from opdkernels.ops.step.args import StepArgs, Tensors
from opdkernels.ops.step.layout import (
    GRAD_BF16,
    GRAD_COMPACT,
    HAS_CHANGED,
    HAS_INIT_VALUE,
    HAS_MAX_EXP_AVG_SQ,
    HAS_STEP_GROUP,
    MASK_INDICES,
    MASK_INDICES_64,
    PARAM_BF16,
    STEP_ROW,
)


def step_rows(args: StepArgs) -> np.ndarray:
    """STEP_ROW [tensors] of the tensors that have coordinates of a bitmap or indices, without tiles."""
    rows = np.zeros(len(args.params), STEP_ROW)
    arrays = {
        "param": args.params,
        "grad": args.grads,
        "mask": args.masks,
        "block_counts": args.block_counts,
        "exp_avg": args.exp_avgs or args.momentum_buffers,
        "exp_avg_sq": args.exp_avg_sqs,
        "max_exp_avg_sq": args.max_exp_avg_sqs,
        "residual": args.residuals,
        "init_value": args.init_values,
        "step_group": args.step_groups,
        "changed": args.changed,
    }
    for field, tensors in arrays.items():
        if tensors:
            rows[field] = [tensor.data_ptr() for tensor in tensors]  # 0 for a tensor without elements
    rows["scalar_row"], rows["shard_offset"], rows["param_id"] = args.scalar_rows, args.shard_offsets, args.param_ids
    rows["numel"] = [param.numel() for param in args.params]
    rows["size"] = [step_size(param, mask) for param, mask in zip(args.params, args.masks, strict=True)]
    num_grads = np.array([grad.numel() for grad in args.grads])
    flags = {
        PARAM_BF16: [param.dtype is torch.bfloat16 for param in args.params],
        GRAD_BF16: [grad.dtype is torch.bfloat16 for grad in args.grads],
        GRAD_COMPACT: num_grads != rows["numel"],
        MASK_INDICES: [mask.dtype is not torch.uint8 for mask in args.masks],
        MASK_INDICES_64: [mask.dtype is torch.int64 for mask in args.masks],
        HAS_INIT_VALUE: has_elements(args.init_values),
        HAS_STEP_GROUP: has_elements(args.step_groups),
        HAS_MAX_EXP_AVG_SQ: has_elements(args.max_exp_avg_sqs),
        HAS_CHANGED: has_elements(args.changed),
    }
    for flag, is_set in flags.items():
        rows["flags"] |= np.where(is_set, flag, 0).astype(np.uint32)
    return rows[rows["size"] > 0]


def has_elements(tensors: Tensors) -> list[bool] | bool:
    """For each tensor of a list whether it has elements; False where no tensor has such a value."""
    return [tensor.numel() > 0 for tensor in tensors] if tensors else False


def step_size(values: torch.Tensor, mask: torch.Tensor) -> int:
    """Number of coordinates of a bitmap, or of indices."""
    return values.numel() if mask.dtype == torch.uint8 else mask.numel()


def with_tiles(rows: np.ndarray, tile: int) -> np.ndarray:
    """The rows with the range of each tensor's tiles among the tiles of all; `tile` is in coordinates or indices."""
    tiles = -(-rows["size"] // tile)
    rows["end_tile"] = np.cumsum(tiles)
    rows["first_tile"] = rows["end_tile"] - tiles
    return rows


def compact_args(
    values: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor, compact: torch.Tensor
) -> StepArgs:
    """A gather or a scatter as the arguments of a step: values are the param and the gradient, compact is exp_avg."""
    return StepArgs(
        params=[values],
        grads=[values],
        masks=[mask],
        block_counts=[block_counts],
        exp_avgs=[compact],
        scalar_rows=[0],
        shard_offsets=[0],
        param_ids=[0],
    )
