"""`step` in CUDA C++: one launch of csrc/step/cuda.cu for all tensors of a group, whatever their dtypes and masks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda import launch
from opdkernels.ops.step.gpu_common import StepKind, step_rows

THREADS = 256  # a block
PARAM_BF16, GRAD_BF16, COMPACT, PLACES, WIDE_PLACES = (1 << i for i in range(5))  # what a row says of its tensor
COLUMNS = 16


def flags(kind: StepKind) -> int:
    of = (kind.param_bf16, kind.grad_bf16, kind.compact, kind.masks != torch.uint8, kind.masks == torch.int64)
    return sum(
        bit for bit, holds in zip((PARAM_BF16, GRAD_BF16, COMPACT, PLACES, WIDE_PLACES), of, strict=True) if holds
    )


def start(
    name: str,
    rows: Iterable[tuple[StepKind, list[int]]],
    device: torch.device,
    *arguments: torch.Tensor | int | None,
) -> None:
    """Starts a kernel on the tensors of a table, if it has any."""
    table = [[*row, flags(kind), 0] for kind, row in rows]
    if not table:
        return
    ends = list(itertools.accumulate(-(-row[13] // launch.QUEUE_SIZE) for row in table))
    numbers = gpu.on_device([*itertools.chain.from_iterable(table), *ends], device)
    launch.run(
        name,
        launch.num_queue_blocks(device, ends[-1], THREADS),
        THREADS,
        launch.queue_bytes(THREADS),
        device,
        numbers,
        numbers.narrow(0, COLUMNS * len(table), len(ends)),
        len(ends),
        *arguments,
    )


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
    table = step_rows(
        params,
        grads,
        masks,
        offsets,
        [exp_avgs, exp_avg_sqs, max_exp_avg_sqs],
        extras,
        inits,
        cohorts,
        rows,
        starts,
        ordinals,
    )
    if params:
        device = params[0].device
        start(
            "step_adamw",
            table,
            device,
            scalars_on(scalars, device),
            grad_scale,
            clip,
            found_inf,
            maximize,
            precision,
            seed,
        )


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
    table = step_rows(params, grads, masks, offsets, [momentum_buffers], extras, inits, cohorts, rows, starts, ordinals)
    if params:
        device = params[0].device
        start(
            "step_sgd",
            table,
            device,
            scalars_on(scalars, device),
            grad_scale,
            clip,
            found_inf,
            maximize,
            precision,
            seed,
            nesterov,
        )


def scalars_on(scalars: torch.Tensor, device: torch.device) -> torch.Tensor:
    return scalars.to(device, non_blocking=True).contiguous()


def row_of(values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, compact: torch.Tensor):
    """The table of one tensor and what is taken from it or put into it."""
    return step_rows([values], [values], [mask], [offsets], [[compact]], [], [], [], [0], [0], [0])


def masked_gather_(
    values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, into: torch.Tensor, add: bool
) -> None:
    start("step_take", row_of(values, mask, offsets, into), values.device, add)


def masked_scatter_(values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, compact: torch.Tensor) -> None:
    start("step_put", row_of(values, mask, offsets, compact), values.device)
