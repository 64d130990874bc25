"""`delta` on the CPU: raw pointers to csrc/delta/cpu.cpp. The public function validates the arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.backends import cpu
from opdkernels.backends.cpu import INT, PTR
from opdkernels.backends.layout import DTYPE_CODES

KERNEL = cpu.declare("opd_delta", PTR, INT, PTR, INT, INT, PTR, INT, PTR, INT, INT, PTR, PTR, PTR, PTR, PTR)
KERNEL_MANY = cpu.declare("opd_delta_many", *[PTR] * 5, INT, PTR, INT, PTR, INT, INT, INT, PTR, PTR, PTR, PTR, PTR, PTR)


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
    base, trained = cpu.aligned(base), cpu.aligned(trained)
    KERNEL(
        cpu.address(base),
        DTYPE_CODES[base.dtype],
        cpu.address(trained),
        DTYPE_CODES[trained.dtype],
        base.numel(),
        cpu.int64s(threshold_bits),
        len(threshold_bits),
        cpu.doubles(thresholds),
        len(thresholds),
        torch.get_num_threads(),
        tables.data_ptr(),
        counts.data_ptr(),
        sums.data_ptr(),
        maximum.data_ptr(),
        cpu.address(mask),
    )


def delta_many_(
    base: Sequence[torch.Tensor],
    trained: Sequence[torch.Tensor],
    threshold_bits: Sequence[int],
    thresholds: Sequence[float],
    num_bins: torch.Tensor,
    bin_bits: torch.Tensor,
    tables: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    maximum: torch.Tensor,
) -> None:
    base, trained = [cpu.aligned(tensor) for tensor in base], [cpu.aligned(tensor) for tensor in trained]
    KERNEL_MANY(
        cpu.int64s([cpu.address(tensor) for tensor in base]),
        cpu.int64s([DTYPE_CODES[tensor.dtype] for tensor in base]),
        cpu.int64s([cpu.address(tensor) for tensor in trained]),
        cpu.int64s([DTYPE_CODES[tensor.dtype] for tensor in trained]),
        cpu.int64s([tensor.numel() for tensor in base]),
        len(base),
        cpu.int64s(threshold_bits),
        len(threshold_bits),
        cpu.doubles(thresholds),
        len(thresholds),
        torch.get_num_threads(),
        bin_bits.numel(),
        cpu.address(num_bins),
        cpu.address(bin_bits),
        cpu.address(tables),
        cpu.address(counts),
        cpu.address(sums),
        cpu.address(maximum),
    )
