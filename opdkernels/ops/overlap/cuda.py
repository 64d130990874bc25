"""`overlap` in CUDA C++: the launches of csrc/overlap/cuda.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda import launch
from opdkernels.ops.overlap.gpu_common import GROUP, GROUP_SETS, change_limit, fold_overlap

THREADS = 1024  # a block
EIGHT = 8  # coordinates that a thread takes at a time


def overlap_(
    source: torch.Tensor,
    trained: Sequence[torch.Tensor],
    cut: int,
    source_table: torch.Tensor,
    changed: torch.Tensor,
    both: torch.Tensor,
    runs: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    device, n_runs = source.device, len(trained)
    groups = -(-n_runs // GROUP)
    rows = launch.near_rows(device, min(1 << n_runs, GROUP_SETS))
    dtypes = gpu.on_device([launch.DTYPE_CODES[tensor.dtype] for tensor in trained], device)
    source, trained = source.view(-1), [tensor.view(-1) for tensor in trained]
    for start, size in gpu.slices(source.numel()):
        joint = torch.zeros(groups, GROUP_SETS, launch.BINS, dtype=torch.int32, device=device)
        sets = torch.zeros(1 << n_runs, dtype=torch.int32, device=device) if groups > 1 else None
        launch.run(
            "overlap_count",
            launch.blocks_for(device, size, THREADS, EIGHT),
            THREADS,
            launch.SMALL_BYTES + rows * launch.TABLE_BYTES,
            device,
            source.narrow(0, start, size),
            launch.DTYPE_CODES[source.dtype],
            [tensor.narrow(0, start, size) for tensor in trained],
            dtypes,
            joint,
            sets,
            counts,
            size,
            n_runs,
            change_limit(cut),
            rows,
        )
        fold_overlap(joint.long(), None if sets is None else sets.long(), (source_table, changed, both, runs))
