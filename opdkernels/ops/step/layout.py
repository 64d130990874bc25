"""The memory layout of `step`, shared by Python, Triton and C: rows, flags, scalars, precisions, block size.

csrc/step/step.h repeats it for C++ and CUDA; tests/ops/step/test_layout.py compares the two. Imports nothing but NumPy.
"""

from __future__ import annotations

import numpy as np

BLOCK = 2048  # coordinates between the prefix popcounts of a bitmap
MAX_STEP_GROUPS = 256  # per tensor: a group is a uint8
PRECISIONS = ("nearest", "split_master", "kahan", "stochastic")  # codes: their positions, enum StepPrecision

# One row per tensor. Pointers are addresses on the device of the tensor, 0 for what is absent.
STEP_ROW = np.dtype(
    [
        ("param", "<u8"),  # fp32 or bf16 [numel]
        ("grad", "<u8"),  # fp32 or bf16 [numel], or fp32 [num_active]
        ("mask", "<u8"),  # uint8 [ceil(numel / 8)], or int32 or int64 [num_active]
        ("block_counts", "<u8"),  # int64 [ceil(numel / BLOCK) + 1] of a bitmap
        ("exp_avg", "<u8"),  # fp32 [num_active]; for SGD the momentum buffer; for gather and scatter the compact values
        ("exp_avg_sq", "<u8"),  # fp32 [num_active]
        ("max_exp_avg_sq", "<u8"),  # fp32 [num_active]
        ("residual", "<u8"),  # int16 or bf16 [num_active]
        ("init_value", "<u8"),  # dtype of param [num_active]
        ("step_group", "<u8"),  # uint8 [num_active]
        ("changed", "<u8"),  # uint8 [ceil(size / 8)]
        ("scalar_row", "<i8"),  # first row of scalars that belongs to the tensor
        ("shard_offset", "<i8"),  # flat index in the unsharded tensor of the first coordinate
        ("size", "<i8"),  # coordinates of a bitmap, or number of indices
        ("numel", "<i8"),  # coordinates of the param; indices are below it
        ("param_id", "<u4"),
        ("flags", "<u4"),
        ("first_tile", "<i8"),  # tiles of this tensor among the tiles of all: [first_tile, end_tile); GPUs only
        ("end_tile", "<i8"),
    ]
)

# Bits of `flags`. Triton launches once for all tensors with equal flags.
PARAM_BF16, GRAD_BF16, GRAD_COMPACT, MASK_INDICES, MASK_INDICES_64 = (1 << i for i in range(5))
HAS_INIT_VALUE, HAS_STEP_GROUP, HAS_MAX_EXP_AVG_SQ, HAS_CHANGED = (1 << i for i in range(5, 9))

# Columns of scalars, fp32 [rows, NUM_SCALARS]: those of AdamW, then those of SGD that have other names.
NUM_SCALARS = 8
DECAY_FACTOR, ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2, BIAS_CORRECTION2_SQRT, EPS, NEG_STEP_SIZE, STEP = range(8)
WEIGHT_DECAY, MOMENTUM, ONE_MINUS_DAMPENING, IS_FIRST = range(4)
