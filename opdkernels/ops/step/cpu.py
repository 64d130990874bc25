"""`step` on the CPU: passes raw pointers to csrc/step/cpu.cpp. The operators validate the arguments."""

from __future__ import annotations

import torch

from opdkernels.backends import cpu
from opdkernels.backends.cpu import INT, PTR
from opdkernels.ops.step.args import StepArgs, adamw_operator, sgd_operator
from opdkernels.ops.step.layout import STEP_ROW
from opdkernels.ops.step.rows import compact_args, step_rows

ADAMW, SGD, GATHER, GATHER_ADD, SCATTER = range(5)  # StepKind in csrc/step/step.h

KERNEL = cpu.declare("opd_masked_step", PTR, INT, INT, PTR, INT, PTR, PTR, INT, INT, INT, INT, INT, INT)


@adamw_operator
def masked_adamw_(args: StepArgs) -> None:
    run(ADAMW, args)


@sgd_operator
def masked_sgd_(args: StepArgs) -> None:
    run(SGD, args)


def masked_gather_(
    values: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor, out: torch.Tensor, add: bool
) -> None:
    run(GATHER_ADD if add else GATHER, compact_args(values, mask, block_counts, out))


def masked_scatter_(
    values: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor, compact: torch.Tensor
) -> None:
    run(SCATTER, compact_args(values, mask, block_counts, compact))


def run(kind: int, args: StepArgs) -> None:
    """Run one kind of kernel on all tensors, unless an infinite gradient was found."""
    if args.found_inf is not None and bool(args.found_inf):
        return
    rows, scalars = step_rows(args), args.scalars.contiguous()
    KERNEL(
        rows.ctypes.data,
        len(rows),
        STEP_ROW.itemsize,
        cpu.address(scalars),
        len(scalars),
        cpu.address(args.grad_scale),
        cpu.address(args.clip),
        args.maximize,
        kind,
        args.nesterov,
        args.precision,
        args.seed,
        torch.get_num_threads(),
    )
