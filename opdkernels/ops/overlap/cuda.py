"""`overlap` in CUDA C++: the launch of csrc/overlap/cuda.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda import launch
from opdkernels.backends.layout import DTYPE_CODES, SMEM_TABLE_BYTES, WARP
from opdkernels.ops.overlap.layout import MAX_RUNS

# csrc/overlap/cuda.cu
BF16_THREADS, MIXED_THREADS = 640, 1024  # at most, per block
BF16_STEP, MIXED_STEP = 16, 8  # coordinates that a thread takes per step
ROWS_OFFSET = 6416  # bytes of shared memory before the rows
MAX_BF16_RUNS = 4  # of the kernels for bf16
MIN_BF16_WARPS = 8  # per block; with shared memory for fewer, the kernel for all dtypes is used


def choose_launch(device: torch.device, dtypes: set[torch.dtype], n_runs: int) -> launch.Shape:
    """The kernel for a base and runs of some dtypes on a device. A row is the table of the base or of a run."""
    space = launch.device_limits(device)[1] - ROWS_OFFSET
    max_warps, rows_bytes = BF16_THREADS // WARP, (n_runs + 1) * SMEM_TABLE_BYTES
    queue_bytes = launch.change_queue_bytes(BF16_STEP)
    warps = min(max_warps, (space - rows_bytes) // queue_bytes)
    if dtypes == {torch.bfloat16} and n_runs <= MAX_BF16_RUNS and warps >= min(max_warps, MIN_BF16_WARPS):
        shared_bytes = ROWS_OFFSET + rows_bytes + warps * queue_bytes
        return launch.Shape(f"overlap_count_bf16_{n_runs}", warps * WARP, BF16_STEP, shared_bytes, n_runs + 1)
    queues = MIXED_THREADS // WARP * launch.change_queue_bytes(MIXED_STEP)
    rows = max(0, min(n_runs + 1, (space - queues) // SMEM_TABLE_BYTES))
    shared_bytes = ROWS_OFFSET + rows * SMEM_TABLE_BYTES + queues
    return launch.Shape("overlap_count", MIXED_THREADS, MIXED_STEP, shared_bytes, rows)


def overlap_(
    base: torch.Tensor,
    trained: Sequence[torch.Tensor],
    threshold_bits: int,
    hist_base: torch.Tensor,
    hist_changed: torch.Tensor,
    both: torch.Tensor,
    hist_num_runs: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """The operator, for contiguous tensors on one device."""
    device, n_runs = base.device, len(trained)
    tensors = [tensor.view(-1) for tensor in (base, *trained)]
    shape = choose_launch(device, {tensor.dtype for tensor in tensors}, n_runs)
    dtypes = sum(DTYPE_CODES[tensor.dtype] << 2 * k for k, tensor in enumerate(tensors))
    for start, size in gpu.slices(base.numel()):
        launch.run(
            shape.kernel,
            launch.num_blocks(device, size, shape.threads, shape.values_per_thread),
            shape.threads,
            shape.shared_bytes,
            device,
            tensors[0].narrow(0, start, size),
            dtypes,
            hist_base,
            hist_changed,
            both,
            hist_num_runs,
            counts,
            size,
            n_runs,
            threshold_bits,
            shape.smem_tables,
            *(tensor.narrow(0, start, size) for tensor in tensors[1:]),
            *[None] * (MAX_RUNS - n_runs),
        )
