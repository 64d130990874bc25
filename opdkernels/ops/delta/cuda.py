"""`delta` in CUDA C++: the launches of csrc/delta/cuda.cu."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda import launch
from opdkernels.backends.layout import BINS, DTYPE_CODES, SMEM_HEADER_BYTES, SMEM_TABLE_BYTES, WARP
from opdkernels.ops.delta.gpu_common import kernel_params, one_by_one
from opdkernels.ops.delta.layout import MANTISSAS

WORK_ROWS = 10  # of the work tables, 32-bit [WORK_ROWS, BINS] (`enum Work` of csrc/delta/cuda.cu)
LOW_ROWS = 2  # sums of the low halves of bf16 differences and of their squares, int64 [LOW_ROWS, BINS]


def launch_shape(base: torch.dtype, trained: torch.dtype) -> tuple[str, int, int]:
    """The kernel for a pair of dtypes, its threads per block, and the coordinates that a thread takes per step."""
    if base == trained == torch.bfloat16:
        return "delta_count_bf16", 768, 8
    if torch.float64 in (base, trained):
        return "delta_count_double", 512, 2
    return "delta_count_float", 512, 4


def delta_(
    base: torch.Tensor,
    trained: torch.Tensor,
    threshold_bits: Sequence[int],
    thresholds: Sequence[float],
    tables: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    maximum: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    """The operator, for contiguous tensors on one device."""
    device, n = base.device, base.numel()
    kernel, threads, values_per_thread = launch_shape(base.dtype, trained.dtype)
    float_type = np.float64 if kernel == "delta_count_double" else np.float32
    params = gpu.on_device(kernel_params(threshold_bits, thresholds, float_type), device)
    smem_rows = launch.smem_rows(device, WORK_ROWS)
    base_code, trained_code = DTYPE_CODES[base.dtype], DTYPE_CODES[trained.dtype]
    base, trained = base.view(-1), trained.view(-1)
    for start, size in gpu.slices(n):
        work = torch.zeros(WORK_ROWS, BINS, dtype=torch.int32, device=device)
        low_sums = torch.zeros(LOW_ROWS, BINS, dtype=torch.int64, device=device)
        launch.run(
            kernel,
            launch.num_blocks(device, size, threads, values_per_thread),
            threads,
            SMEM_HEADER_BYTES + smem_rows * SMEM_TABLE_BYTES,
            device,
            base.narrow(0, start, size),
            base_code,
            trained.narrow(0, start, size),
            trained_code,
            gpu.mask_from(mask, start),
            work,
            low_sums,
            params,
            tables,
            counts,
            sums,
            maximum,
            size,
            smem_rows,
        )
        launch.run(
            "delta_fold",
            BINS // MANTISSAS,
            MANTISSAS,
            0,
            device,
            work,
            low_sums,
            tables,
            sums,
            len(threshold_bits),
            kernel == "delta_count_bf16",
        )
    if n:
        launch.run("delta_propagate_carry", 1, WARP, 0, device, sums)


def delta_many_(
    base: Sequence[torch.Tensor], trained: Sequence[torch.Tensor], *arguments: Sequence[float] | torch.Tensor
) -> None:
    """The operator, by one launch per pair."""
    one_by_one(delta_, base, trained, *arguments)  # type: ignore[arg-type]
