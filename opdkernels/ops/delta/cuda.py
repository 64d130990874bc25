"""`delta` in CUDA C++: the launches of csrc/delta/cuda.cu."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda import launch
from opdkernels.ops.delta.gpu_common import rules_of

WORK_ROWS, LOW_ROWS = 10, 2  # work tables, sums of low halves
MANTISSAS = 128


def shape_of(source: torch.dtype, trained: torch.dtype) -> tuple[str, int, int]:
    """The kernel of a pair, its threads a block, and the coordinates a thread takes at a time."""
    if source == trained == torch.bfloat16:
        return "delta_count_bf16", 768, 8
    if torch.float64 in (source, trained):
        return "delta_count_double", 512, 2
    return "delta_count_float", 512, 4


def delta_(
    source: torch.Tensor,
    trained: torch.Tensor,
    cuts: Sequence[int],
    thresholds: Sequence[float],
    tables: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    maximum: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    device, n = source.device, source.numel()
    name, threads, each = shape_of(source.dtype, trained.dtype)
    kind = np.float64 if name == "delta_count_double" else np.float32
    rules = gpu.on_device(rules_of(cuts, thresholds, kind), device)
    rows = launch.near_rows(device, WORK_ROWS)
    codes = launch.DTYPE_CODES[source.dtype], launch.DTYPE_CODES[trained.dtype]
    source, trained = source.view(-1), trained.view(-1)
    for start, size in gpu.slices(n):
        work = torch.zeros(WORK_ROWS, launch.BINS, dtype=torch.int32, device=device)
        low_sums = torch.zeros(LOW_ROWS, launch.BINS, dtype=torch.int64, device=device)
        launch.run(
            name,
            launch.blocks_for(device, size, threads, each),
            threads,
            launch.SMALL_BYTES + rows * launch.TABLE_BYTES,
            device,
            source.narrow(0, start, size),
            codes[0],
            trained.narrow(0, start, size),
            codes[1],
            gpu.mask_from(mask, start),
            work,
            low_sums,
            rules,
            tables,
            counts,
            sums,
            maximum,
            size,
            rows,
        )
        launch.run(
            "delta_fold",
            launch.BINS // MANTISSAS,
            MANTISSAS,
            0,
            device,
            work,
            low_sums,
            tables,
            sums,
            len(cuts),
            name == "delta_count_bf16",
        )
    if n:
        launch.run("delta_carry", 1, 32, 0, device, sums)
