"""`quantile` in CUDA C++: the launches of csrc/quantile/cuda.cu, one pass per digit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda import launch
from opdkernels.backends.layout import SMEM_HEADER_BYTES
from opdkernels.ops.quantile.gpu_common import select_by_digits
from opdkernels.ops.quantile.layout import DIGIT_BITS, DIGITS, SMEM_DIGIT_BYTES

THREADS = 1024  # per block


def digit_table(values: torch.Tensor, mask: torch.Tensor | None, prefixes: torch.Tensor, shift: int) -> torch.Tensor:
    """Counts of the digit at `shift`, int64 [len(prefixes), 2, DIGITS], outside and inside the mask."""
    n_prefixes, device, values_per_thread = len(prefixes), values.device, 16 // values.itemsize
    first = shift == 8 * values.itemsize - DIGIT_BITS
    smem_rows = launch.smem_rows(device, 1 if mask is None else 2, SMEM_DIGIT_BYTES) if first else 0
    total = torch.zeros(n_prefixes, 2, DIGITS, dtype=torch.int64, device=device)
    for start, size in gpu.slices(values.numel()):
        table = torch.zeros(n_prefixes, 2, DIGITS, dtype=torch.int32, device=device)
        launch.run(
            f"quantile_count_{values.itemsize}",
            launch.num_blocks(device, size, THREADS, values_per_thread),
            THREADS,
            SMEM_HEADER_BYTES + smem_rows * SMEM_DIGIT_BYTES,
            device,
            values.narrow(0, start, size),
            gpu.mask_from(mask, start),
            prefixes,
            table,
            size,
            shift,
            n_prefixes,
            smem_rows,
        )
        total += table
    return total


def quantile(
    values: torch.Tensor, k: Sequence[int], largest: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator, for contiguous tensors on one device."""
    return select_by_digits(digit_table, values, k, largest, mask)
