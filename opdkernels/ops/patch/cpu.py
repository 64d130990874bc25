"""`patch` on the CPU: passes raw pointers to csrc/patch/cpu.cpp. The public functions validate the arguments."""

from __future__ import annotations

import torch

from opdkernels.backends import cpu
from opdkernels.backends.cpu import INT, PTR
from opdkernels.ops.patch.layout import blocks_of

GATHER = cpu.declare("opd_patch_gather", PTR, PTR, INT, INT, INT, INT, PTR, PTR, PTR, PTR)
SCATTER = cpu.declare("opd_patch_scatter", PTR, INT, INT, INT, PTR, PTR, INT, PTR, INT, INT, PTR, PTR, PTR)
CHECK = cpu.declare("opd_patch_check", PTR, PTR, INT, INT, INT, INT, PTR)
DIGEST = cpu.declare("opd_patch_digest", PTR, INT, INT, INT, PTR)


def patch_gather_(
    base: torch.Tensor,
    trained: torch.Tensor,
    difference: bool,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    digests: torch.Tensor,
) -> None:
    """The operator, for contiguous integers."""
    base, trained, stored = cpu.aligned(base), cpu.aligned(trained), cpu.aligned(values)
    GATHER(
        base.data_ptr(),
        trained.data_ptr(),
        base.element_size(),
        base.numel(),
        difference,
        torch.get_num_threads(),
        counts.data_ptr(),
        positions.data_ptr(),
        stored.data_ptr(),
        digests.data_ptr(),
    )
    if stored is not values:
        values.copy_(stored)


def patch_scatter_(
    base: torch.Tensor,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    difference: bool,
    out: torch.Tensor,
    digests: torch.Tensor,
) -> torch.Tensor:
    """The operator, for contiguous integers."""
    target = cpu.aligned(out)
    base = target if base.data_ptr() == out.data_ptr() else cpu.aligned(base)
    values = cpu.aligned(values)
    status = torch.empty(1, dtype=torch.int64)
    SCATTER(
        base.data_ptr(),
        base.element_size(),
        base.numel(),
        difference,
        counts.data_ptr(),
        positions.data_ptr(),
        positions.numel(),
        values.data_ptr(),
        values.numel(),
        torch.get_num_threads(),
        target.data_ptr(),
        digests.data_ptr(),
        status.data_ptr(),
    )
    if target is not out:
        out.copy_(target)
    return status


def patch_check(counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int) -> torch.Tensor:
    """The operator, for contiguous tensors."""
    status = torch.empty(1, dtype=torch.int64)
    CHECK(
        counts.data_ptr(),
        positions.data_ptr(),
        positions.numel(),
        numel,
        stored,
        torch.get_num_threads(),
        status.data_ptr(),
    )
    return status


def patch_digest(values: torch.Tensor) -> torch.Tensor:
    """The operator, for contiguous integers."""
    values = cpu.aligned(values)
    digests = torch.empty(blocks_of(values.numel()), 2, dtype=torch.int64)
    DIGEST(values.data_ptr(), values.element_size(), values.numel(), torch.get_num_threads(), digests.data_ptr())
    return digests
