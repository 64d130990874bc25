"""`delta` in CUDA C++: the launches of csrc/delta/cuda.cu."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda import launch
from opdkernels.backends.layout import BINS, DTYPE_CODES, SMEM_BINS, SMEM_HEADER_BYTES, SMEM_TABLE_BYTES, WARP
from opdkernels.ops.delta.gpu_common import kernel_params, one_by_one
from opdkernels.ops.delta.layout import MANTISSAS, PARAM_COUNTS, PARAM_LIMITS, ULP_BINS

# csrc/delta/cuda.cu
WORK_ROWS = 10  # work tables
WORKSPACE_WORDS = WORK_ROWS * BINS + 4 * BINS + BINS // MANTISSAS // 32 + 1
PAIR_THREADS, WIDE_THREADS = 768, 512  # at most, per block

# csrc/delta/cuda_pair.inl: coordinates that a thread takes per step, and bytes of shared memory before the tables of
# classes
PAIR_STEP = 16
PADDED_BINS = SMEM_BINS + SMEM_BINS // 128
PAIR_BYTES = 4 * (ULP_BINS * WARP + 16 + 2 * SMEM_BINS + 2 * PADDED_BINS)
MIN_PAIR_WARPS = 8  # per block; with shared memory for fewer, the other kernel for bf16 pairs is used


def choose_launch(device: torch.device, base: torch.dtype, trained: torch.dtype, n_thresholds: int) -> launch.Shape:
    """The kernel for a pair of dtypes on a device; `smem_tables` of `delta_count_bf16` are those of classes."""
    bf16_pair = base == trained == torch.bfloat16
    classes = n_thresholds + 1
    pair_bytes = PAIR_BYTES + classes * SMEM_TABLE_BYTES
    queue_bytes = launch.change_queue_bytes(PAIR_STEP)
    warps = min(PAIR_THREADS // WARP, (launch.device_limits(device)[1] - pair_bytes) // queue_bytes)
    if bf16_pair and warps >= min(PAIR_THREADS // WARP, MIN_PAIR_WARPS):
        shared_bytes = pair_bytes + warps * queue_bytes
        return launch.Shape("delta_count_bf16", warps * WARP, PAIR_STEP, shared_bytes, classes)
    rows = launch.smem_rows(device, WORK_ROWS)
    shared_bytes = SMEM_HEADER_BYTES + rows * SMEM_TABLE_BYTES
    if bf16_pair:
        return launch.Shape("delta_count_bf16_limited", PAIR_THREADS, 8, shared_bytes, rows)
    if torch.float64 in (base, trained):
        return launch.Shape("delta_count_double", WIDE_THREADS, 2, shared_bytes, rows)
    return launch.Shape("delta_count_float", WIDE_THREADS, 4, shared_bytes, rows)


def packed_params(
    threshold_bits: Sequence[int], thresholds: Sequence[float], float_type: type[np.floating]
) -> list[int]:
    """The thresholds as arguments of a kernel: those of visible |delta| in one, the counts of the limits of stored
    |delta| in one, and the limits."""
    params = kernel_params(threshold_bits, thresholds, float_type)
    visible, limits, counts = params[:PARAM_LIMITS], params[PARAM_LIMITS:PARAM_COUNTS], params[PARAM_COUNTS:]
    packed = (
        sum(bits << 16 * k for k, bits in enumerate(visible)),
        sum(count << 6 * k for k, count in enumerate(counts)),
    )
    return [*packed, *limits]


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
    how = choose_launch(device, base.dtype, trained.dtype, len(threshold_bits))
    float_type = np.float64 if how.kernel == "delta_count_double" else np.float32
    params = packed_params(threshold_bits, thresholds, float_type)
    workspace = launch.workspace("delta", device, WORKSPACE_WORDS)
    base_code, trained_code = DTYPE_CODES[base.dtype], DTYPE_CODES[trained.dtype]
    base, trained = base.view(-1), trained.view(-1)
    for start, size in gpu.slices(n):
        launch.run(
            how.kernel,
            launch.num_blocks(device, size, how.threads, how.values_per_thread),
            how.threads,
            how.shared_bytes,
            device,
            base.narrow(0, start, size),
            base_code,
            trained.narrow(0, start, size),
            trained_code,
            gpu.mask_from(mask, start),
            workspace,
            tables,
            counts,
            sums,
            maximum,
            size,
            how.smem_tables,
            len(threshold_bits),
            *params,
        )


def delta_many_(
    base: Sequence[torch.Tensor], trained: Sequence[torch.Tensor], *arguments: Sequence[float] | torch.Tensor
) -> None:
    """The operator, by one launch per pair."""
    one_by_one(delta_, base, trained, *arguments)  # type: ignore[arg-type]
