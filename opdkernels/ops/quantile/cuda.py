"""`quantile` in CUDA C++: the launches of csrc/quantile/cuda.cu, two per digit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda import launch
from opdkernels.backends.layout import DTYPE_CODES, SMEM_HEADER_BYTES
from opdkernels.ops.quantile.gpu_common import select_by_digits
from opdkernels.ops.quantile.layout import DIGIT_BITS, DIGITS, NUM_COUNTS, SMEM_DIGIT_BYTES

THREADS = 1024  # per block

# csrc/quantile/cuda.cu
MAX_RANKS = 8
RANK_STATES = 5


def count_digit(
    values: torch.Tensor,
    mask: torch.Tensor | None,
    states: torch.Tensor | None,
    tables: torch.Tensor,
    shift: int,
    n_prefixes: int,
) -> None:
    """Add the counts of a digit to tables, int32 [n_prefixes, 2, DIGITS]; `states` None: of the first digit."""
    device, n = values.device, values.numel()
    smem_rows = launch.smem_rows(device, 1 if mask is None else 2, SMEM_DIGIT_BYTES) if states is None else 0
    launch.run(
        f"quantile_count_{values.itemsize}",
        launch.num_blocks(device, n, THREADS, 16 // values.itemsize),
        THREADS,
        SMEM_HEADER_BYTES + smem_rows * SMEM_DIGIT_BYTES,
        device,
        values,
        mask,
        states,
        tables,
        n,
        shift,
        n_prefixes,
        smem_rows,
    )


def select(
    values: torch.Tensor, k: Sequence[int], largest: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator for at most MAX_RANKS ranks of at most gpu.SLICE values, which 32-bit tables can count."""
    device, n_ranks = values.device, len(k)
    first = 8 * values.itemsize - DIGIT_BITS
    # Not a workspace: another thread may launch on the same stream between counting and finding.
    tables = torch.zeros(n_ranks, 2, DIGITS, dtype=torch.int32, device=device)
    states = torch.empty(n_ranks, RANK_STATES, dtype=torch.int64, device=device)
    thresholds = torch.empty(n_ranks, dtype=torch.float64, device=device)
    counts = torch.empty(n_ranks, NUM_COUNTS, dtype=torch.int64, device=device)
    for shift in range(first, -1, -DIGIT_BITS):
        n_tables = 1 if shift == first else n_ranks
        if values.numel():
            count_digit(values, mask, None if shift == first else states, tables, shift, n_tables)
        launch.run(
            "quantile_find",
            n_tables,
            THREADS,
            3 * 8 * (THREADS + 1),
            device,
            tables,
            states,
            thresholds,
            counts,
            n_ranks,
            largest,
            DTYPE_CODES[values.dtype],
            shift == first,
            shift == 0,
            *k,
            *[0] * (MAX_RANKS - n_ranks),
        )
    return thresholds, counts


def digit_table(values: torch.Tensor, mask: torch.Tensor | None, prefixes: torch.Tensor, shift: int) -> torch.Tensor:
    """Counts of the digit at `shift`, int64 [len(prefixes), 2, DIGITS], outside and inside the mask."""
    n_prefixes, device = len(prefixes), values.device
    states = None
    if shift != 8 * values.itemsize - DIGIT_BITS:
        states = torch.zeros(n_prefixes, RANK_STATES, dtype=torch.int64, device=device)
        states[:, 0] = prefixes
    total = torch.zeros(n_prefixes, 2, DIGITS, dtype=torch.int64, device=device)
    for start, size in gpu.slices(values.numel()):
        table = torch.zeros(n_prefixes, 2, DIGITS, dtype=torch.int32, device=device)
        part = values.narrow(0, start, size)
        count_digit(part, gpu.mask_from(mask, start), states, table, shift, n_prefixes)
        total += table
    return total


def quantile(
    values: torch.Tensor, k: Sequence[int], largest: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator, for contiguous tensors on one device."""
    if not k or values.numel() > gpu.SLICE:  # the counts of several slices are added by torch
        return select_by_digits(digit_table, values, k, largest, mask)
    results = [select(values.view(-1), k[i : i + MAX_RANKS], largest, mask) for i in range(0, len(k), MAX_RANKS)]
    thresholds, counts = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*results, strict=True))
    return thresholds, counts
