"""The table that the compiled kernels of `step` read: one STEP_ROW per tensor."""

from __future__ import annotations

import numpy as np
import torch

from opdkernels.ops.step.args import StepArgs, Tensors
from opdkernels.ops.step.layout import (
    GRAD_BF16,
    GRAD_COMPACT,
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
    rows = [step_row(args, i) for i in range(len(args.params)) if step_size(args.params[i], args.masks[i])]
    return np.array(rows, dtype=STEP_ROW)


def step_row(args: StepArgs, i: int) -> tuple[int, ...]:
    """The fields of STEP_ROW for the i-th tensor."""
    param, grad, mask = args.params[i], args.grads[i], args.masks[i]
    init_value, step_group = element(args.init_values, i), element(args.step_groups, i)
    max_exp_avg_sq = element(args.max_exp_avg_sqs, i)
    flags = (
        PARAM_BF16 * (param.dtype == torch.bfloat16)
        | GRAD_BF16 * (grad.dtype == torch.bfloat16)
        | GRAD_COMPACT * (grad.numel() != param.numel())
        | MASK_INDICES * (mask.dtype != torch.uint8)
        | MASK_INDICES_64 * (mask.dtype == torch.int64)
        | HAS_INIT_VALUE * (init_value is not None)
        | HAS_STEP_GROUP * (step_group is not None)
        | HAS_MAX_EXP_AVG_SQ * (max_exp_avg_sq is not None)
    )
    tensors = (
        param,
        grad,
        mask,
        element(args.block_counts, i),
        element(args.exp_avgs or args.momentum_buffers, i),
        element(args.exp_avg_sqs, i),
        max_exp_avg_sq,
        element(args.residuals, i),
        init_value,
        step_group,
    )
    return (
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        args.scalar_rows[i],
        args.shard_offsets[i],
        step_size(param, mask),
        param.numel(),
        args.param_ids[i],
        flags,
        0,
        0,
    )


def element(tensors: Tensors, i: int) -> torch.Tensor | None:
    """The i-th tensor of a list that may be empty; None where it has no elements."""
    return tensors[i] if tensors and tensors[i].numel() else None


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
