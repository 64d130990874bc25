"""`overlap` in CUDA C++: the launches of csrc/overlap/cuda.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda import launch
from opdkernels.backends.layout import BINS, DTYPE_CODES, SMEM_HEADER_BYTES, SMEM_TABLE_BYTES
from opdkernels.ops.overlap.gpu_common import change_limit, fold_overlap
from opdkernels.ops.overlap.layout import GROUP, GROUP_SETS

THREADS = 1024  # per block
VALUES_PER_THREAD = 8  # coordinates that a thread takes per step


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
    groups = -(-n_runs // GROUP)
    smem_rows = launch.smem_rows(device, min(1 << n_runs, GROUP_SETS))
    dtypes = gpu.on_device([DTYPE_CODES[tensor.dtype] for tensor in trained], device)
    base, trained = base.view(-1), [tensor.view(-1) for tensor in trained]
    for start, size in gpu.slices(base.numel()):
        joint = torch.zeros(groups, GROUP_SETS, BINS, dtype=torch.int32, device=device)
        sets = torch.zeros(1 << n_runs, dtype=torch.int32, device=device) if groups > 1 else None
        launch.run(
            "overlap_count",
            launch.num_blocks(device, size, THREADS, VALUES_PER_THREAD),
            THREADS,
            SMEM_HEADER_BYTES + smem_rows * SMEM_TABLE_BYTES,
            device,
            base.narrow(0, start, size),
            DTYPE_CODES[base.dtype],
            [tensor.narrow(0, start, size) for tensor in trained],
            dtypes,
            joint,
            sets,
            counts,
            size,
            n_runs,
            change_limit(threshold_bits),
            smem_rows,
        )
        fold_overlap(
            joint.long(), None if sets is None else sets.long(), (hist_base, hist_changed, both, hist_num_runs)
        )
