"""`step` on the CPU: raw pointers to csrc/step/cpu.cpp. The public functions check the arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.backends import cpu
from opdkernels.backends.layout import DTYPE_CODES

ADAMW, SGD, TAKE, ADD, PUT = range(5)  # StepKind in csrc/common/cpu/kernels.h


def masked_adamw_(
    params,
    grads,
    masks,
    offsets,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    extras,
    inits,
    cohorts,
    scalars,
    rows,
    starts,
    ordinals,
    grad_scale,
    clip,
    found_inf,
    maximize,
    precision,
    seed,
) -> None:
    table = step_table(
        params,
        grads,
        masks,
        offsets,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        extras,
        inits,
        cohorts,
        rows,
        starts,
        ordinals,
    )
    masked_step(table, scalars, grad_scale, clip, found_inf, maximize, ADAMW, False, precision, seed)


def masked_sgd_(
    params,
    grads,
    masks,
    offsets,
    momentum_buffers,
    extras,
    inits,
    cohorts,
    scalars,
    rows,
    starts,
    ordinals,
    grad_scale,
    clip,
    found_inf,
    maximize,
    nesterov,
    precision,
    seed,
) -> None:
    table = step_table(
        params, grads, masks, offsets, momentum_buffers, (), (), extras, inits, cohorts, rows, starts, ordinals
    )
    masked_step(table, scalars, grad_scale, clip, found_inf, maximize, SGD, nesterov, precision, seed)


def masked_gather_(
    values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, into: torch.Tensor, add: bool
) -> None:
    table = step_table([values], [values], [mask], [offsets], [into], (), (), (), (), (), [0], [0], [0])
    masked_step(table, into, None, None, None, False, ADD if add else TAKE, False, 0, 0)


def masked_scatter_(values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, compact: torch.Tensor) -> None:
    table = step_table([values], [values], [mask], [offsets], [compact], (), (), (), (), (), [0], [0], [0])
    masked_step(table, compact, None, None, None, False, PUT, False, 0, 0)


def step_table(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
    most: Sequence[torch.Tensor],
    extras: Sequence[torch.Tensor],
    inits: Sequence[torch.Tensor],
    cohorts: Sequence[torch.Tensor],
    rows: Sequence[int],
    starts: Sequence[int],
    ordinals: Sequence[int],
) -> torch.Tensor:
    """int64 [tensors, 20]: what csrc/bindings.cpp reads of each tensor."""
    table = []
    for i, (param, grad, mask, offset) in enumerate(zip(params, grads, masks, offsets, strict=True)):
        at, bits = mask.data_ptr(), mask.dtype == torch.uint8
        active = int(offset[-1]) if bits else mask.numel()
        compact = grad.numel() == active != param.numel()
        table.append(
            (
                param.data_ptr(),
                grad.data_ptr(),
                at if bits else 0,
                offset.data_ptr(),
                0 if bits else at,
                *(cpu.address(one[i] if one else None) for one in (first, second, most, extras, inits, cohorts)),
                param.numel(),
                active,
                starts[i],
                DTYPE_CODES[param.dtype],
                DTYPE_CODES[grad.dtype],
                mask.dtype == torch.int64,
                compact,
                rows[i],
                ordinals[i],
            )
        )
    return torch.tensor(table, dtype=torch.int64)


def masked_step(
    table: torch.Tensor,
    scalars: torch.Tensor,
    grad_scale: torch.Tensor | None,
    clip: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    maximize: bool,
    kind: int,
    nesterov: bool,
    precision: int,
    seed: int,
) -> None:
    if found_inf is not None and bool(found_inf):
        return
    scalars = scalars.contiguous()
    cpu._C.masked_step(
        table.data_ptr(),
        len(table),
        scalars.data_ptr(),
        cpu.address(grad_scale),
        cpu.address(clip),
        maximize,
        kind,
        nesterov,
        precision,
        seed,
        torch.get_num_threads(),
    )
