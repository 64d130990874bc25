"""The arguments of a masked step as one structure, and the operator schemas that are composed from it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Tensors = Sequence[torch.Tensor]


class StepArgs(NamedTuple):
    """The arguments of `masked_adamw_` and `masked_sgd_`, in the order of the schemas.

    Lists have one element per tensor. A list is empty where no tensor has such a value; a tensor is empty where its
    parameter has none.
    """

    params: Tensors  # fp32 or bf16
    grads: Tensors  # of the shape of the param, or fp32 [num_active]
    masks: Tensors  # uint8 [ceil(numel / 8)], or int32 or int64 [num_active]
    block_counts: Tensors  # int64 [ceil(numel / BLOCK) + 1] of a bitmap, else [0]
    exp_avgs: Tensors = ()  # fp32 [num_active]
    exp_avg_sqs: Tensors = ()  # fp32 [num_active]
    max_exp_avg_sqs: Tensors = ()  # fp32 [num_active]
    momentum_buffers: Tensors = ()  # fp32 [num_active]
    residuals: Tensors = ()  # int16 (split_master) or bf16 (kahan) [num_active]
    init_values: Tensors = ()  # dtype of the param [num_active]
    step_groups: Tensors = ()  # uint8 [num_active]
    changed: Tensors = ()  # uint8 [ceil(numel / 8)] for a bitmap, [ceil(num_active / 8)] for indices
    scalars: torch.Tensor = torch.empty(0)  # fp32 [rows, NUM_SCALARS]
    scalar_rows: Sequence[int] = ()
    shard_offsets: Sequence[int] = ()
    param_ids: Sequence[int] = ()
    grad_scale: torch.Tensor | None = None  # fp32, one element
    clip: torch.Tensor | None = None  # fp32, one element
    found_inf: torch.Tensor | None = None  # fp32, one element
    maximize: bool = False
    nesterov: bool = False
    precision: int = 0  # position in PRECISIONS
    seed: int = 0


SCHEMA_TYPES = {
    "params": "Tensor(a!)[]",
    "grads": "Tensor[]",
    "masks": "Tensor[]",
    "block_counts": "Tensor[]",
    "exp_avgs": "Tensor(b!)[]",
    "exp_avg_sqs": "Tensor(c!)[]",
    "max_exp_avg_sqs": "Tensor(d!)[]",
    "momentum_buffers": "Tensor(e!)[]",
    "residuals": "Tensor(f!)[]",
    "init_values": "Tensor[]",
    "step_groups": "Tensor[]",
    "changed": "Tensor(g!)[]",
    "scalars": "Tensor",
    "scalar_rows": "int[]",
    "shard_offsets": "int[]",
    "param_ids": "int[]",
    "grad_scale": "Tensor?",
    "clip": "Tensor?",
    "found_inf": "Tensor?",
    "maximize": "bool",
    "nesterov": "bool",
    "precision": "int",
    "seed": "int",
}
ADAMW_FIELDS = tuple(f for f in StepArgs._fields if f not in ("momentum_buffers", "nesterov"))
SGD_FIELDS = tuple(f for f in StepArgs._fields if f not in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"))


def schema(operator: str, fields: Sequence[str]) -> str:
    """The torch.library schema of an operator that takes these fields and returns nothing."""
    return f"{operator}({', '.join(f'{SCHEMA_TYPES[field]} {field}' for field in fields)}) -> ()"


def flatten(args: StepArgs, fields: Sequence[str]) -> list:
    """The operator's flat arguments."""
    values = (getattr(args, field) for field in fields)
    return [list(value) if isinstance(value, (list, tuple)) else value for value in values]


def unflatten(flat: Sequence[object], fields: Sequence[str]) -> StepArgs:
    """The arguments of an operator that takes these fields."""
    return StepArgs(**dict(zip(fields, flat, strict=True)))  # type: ignore[arg-type]


def takes_fields(fields: Sequence[str]) -> Callable[[Callable[[StepArgs], None]], Callable[..., None]]:
    """A decorator: a kernel that takes StepArgs becomes one that takes the operator's flat arguments."""

    def decorate(kernel: Callable[[StepArgs], None]) -> Callable[..., None]:
        @functools.wraps(kernel)
        def operator(*flat: object) -> None:
            kernel(unflatten(flat, fields))

        return operator

    return decorate


adamw_operator = takes_fields(ADAMW_FIELDS)
sgd_operator = takes_fields(SGD_FIELDS)
