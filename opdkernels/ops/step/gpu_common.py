"""What the Triton and the CUDA launchers of `step` share: one row per tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from opdkernels.backends import gpu


class StepKind(NamedTuple):
    """What tensors of one kind have in common: how their masks, parameters and gradients are held, and what goes with them."""

    masks: torch.dtype  # uint8 of bits, else of places
    param_bf16: bool
    grad_bf16: bool
    compact: bool
    inits: bool
    cohorts: bool


def at(tensors: Sequence[torch.Tensor], i: int) -> torch.Tensor | None:
    """The i-th of a list that may be empty, unless it has no elements."""
    return tensors[i] if tensors and tensors[i].numel() else None


def step_size(values: torch.Tensor, mask: torch.Tensor) -> int:
    """How many coordinates a mask has bits for, or how many places it holds."""
    return values.numel() if mask.dtype == torch.uint8 else mask.numel()


def step_rows(
    params, grads, masks, offsets, moments, extras, inits, cohorts, rows, starts, ordinals
) -> Iterator[tuple[StepKind, list[int]]]:
    """The kind of each tensor that has coordinates or places, and the first fourteen columns of its row in a table: addresses of the
    parameter, gradient, mask, offsets, three moments, extra, init and cohort, then row, start, ordinal and size."""
    for i, (param, grad, mask) in enumerate(zip(params, grads, masks, strict=True)):
        size = step_size(param, mask)
        if not size:
            continue
        held = [at(one, i) for one in (*moments, *[()] * (3 - len(moments)), extras, inits, cohorts)]
        *_, init, cohort = held
        bf16, grad_bf16 = (one.dtype == torch.bfloat16 for one in (param, grad))
        kind = StepKind(
            mask.dtype, bf16, grad_bf16, grad.numel() != param.numel(), init is not None, cohort is not None
        )
        yield (
            kind,
            [
                *(gpu.address(tensor) for tensor in (param, grad, mask, offsets[i], *held)),
                rows[i],
                starts[i],
                ordinals[i],
                size,
            ],
        )
