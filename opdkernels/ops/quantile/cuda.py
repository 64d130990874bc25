"""`quantile` in CUDA C++: the launches of csrc/quantile/cuda.cu, one a digit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda import launch
from opdkernels.ops.quantile.gpu_common import DIGIT_BITS, DIGITS, cut_by_digits

THREADS = 1024  # a block
DIGIT_BYTES = 4 << 14  # of a table in shared memory: one for values outside the mask, one for those inside


def digit_table(values: torch.Tensor, mask: torch.Tensor | None, prefixes: torch.Tensor, shift: int) -> torch.Tensor:
    """Counts of the digit at `shift`, int64 [prefixes, 2, 2^16], outside and inside the mask."""
    ranks, device, each = len(prefixes), values.device, 16 // values.itemsize
    first = shift == 8 * values.itemsize - DIGIT_BITS
    rows = launch.near_rows(device, 1 if mask is None else 2, DIGIT_BYTES) if first else 0
    total = torch.zeros(ranks, 2, DIGITS, dtype=torch.int64, device=device)
    for start, size in gpu.slices(values.numel()):
        table = torch.zeros(ranks, 2, DIGITS, dtype=torch.int32, device=device)
        launch.run(
            f"quantile_count_{values.itemsize}",
            launch.blocks_for(device, size, THREADS, each),
            THREADS,
            launch.SMALL_BYTES + rows * DIGIT_BYTES,
            device,
            values.narrow(0, start, size),
            gpu.mask_from(mask, start),
            prefixes,
            table,
            size,
            shift,
            ranks,
            rows,
        )
        total += table
    return total


def quantile(
    values: torch.Tensor, k: Sequence[int], largest: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return cut_by_digits(digit_table, values, k, largest, mask)
