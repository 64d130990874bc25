"""`null` on the CPU: raw pointers to csrc/null/cpu.cpp. The public function validates the arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.backends import cpu
from opdkernels.backends.cpu import INT, PTR

KERNEL = cpu.declare(
    "opd_null",
    *(PTR, PTR, PTR, PTR, INT, INT, PTR),
    *(PTR, INT, PTR, INT, PTR, INT, INT),
    *(PTR, PTR, PTR, PTR, PTR, PTR, PTR),
)


def null_(
    starts: torch.Tensor,
    bin_bits: torch.Tensor,
    base: torch.Tensor,
    delta: torch.Tensor,
    uniform: torch.Tensor,
    ratios: Sequence[float],
    fractions: Sequence[float],
    limits: Sequence[int],
    fits: torch.Tensor,
    near_zero: torch.Tensor,
    chosen: torch.Tensor,
    top_energy: torch.Tensor,
    below: torch.Tensor,
    expected: torch.Tensor | None,
    visible: torch.Tensor | None,
) -> None:
    KERNEL(
        starts.data_ptr(),
        cpu.address(bin_bits),
        cpu.address(base),
        cpu.address(delta),
        bin_bits.numel(),
        uniform.numel(),
        cpu.address(uniform),
        cpu.doubles(ratios),
        len(ratios),
        cpu.doubles(fractions),
        len(fractions),
        cpu.int64s(limits),
        len(limits),
        torch.get_num_threads(),
        *map(cpu.address, (fits, near_zero, chosen, top_energy, below, expected, visible)),
    )
