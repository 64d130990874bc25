"""Validation of the arguments of the `divergence` operators: GPU kernels follow pointers, and slices beyond the end of
a head would be shorter without an error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opdkernels.ops.arguments import validate_dtype, validate_memory
from opdkernels.ops.divergence.logits import LogitParams

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
Side = Sequence[Tensor]


def validate_scan(
    student: Side,
    teacher: Side,
    ids: Tensor,
    tail_k: int,
    vocab: int,
    student_params: Sequence[float],
    teacher_params: Sequence[float],
    with_argmax: bool,
) -> None:
    """Validate the arguments of `divergence_scan`."""
    n = validate_sides(student, teacher, vocab, student_params, teacher_params)
    validate_matrix("ids", ids, (torch.int64,), ids.shape[1:], n, student[0].device)
    if not 0 <= tail_k <= ids.shape[1]:
        raise ValueError(f"tail_k must be in 0 .. {ids.shape[1]}, the number of ids of a token, not {tail_k}")
    validate_memory([], [*student, *teacher, ids])


def validate_means(
    student: Side,
    teacher: Side,
    moments: Tensor,
    vocab: int,
    student_params: Sequence[float],
    teacher_params: Sequence[float],
    beta: float,
    kind: int,
) -> None:
    """Validate the arguments of `divergence_means`."""
    n = validate_sides(student, teacher, vocab, student_params, teacher_params)
    validate_columns("moments", moments, (8,), n, student[0].device)
    if kind not in (2, 3):
        raise ValueError(f"kind must be 2 (jsd) or 3 (total_variation), not {kind}")
    validate_memory([], [*student, *teacher, moments])


def validate_backward(
    student: Side,
    teacher: Side,
    scalars: Tensor,
    ids: Tensor,
    grad_at_ids: Tensor,
    vocab: int,
    student_params: Sequence[float],
    teacher_params: Sequence[float],
    beta: float,
    kind: int,
    needs_grad: Sequence[bool],
) -> None:
    """Validate the arguments of `divergence_backward`."""
    n, device = validate_sides(student, teacher, vocab, student_params, teacher_params), student[0].device
    validate_columns("scalars", scalars, (7, 9), n, device)
    validate_matrix("ids", ids, (torch.int64,), ids.shape[1:], n, device)
    validate_matrix("grad_at_ids", grad_at_ids, DTYPES, ids.shape[1:], n, device)
    if not 0 <= kind <= 4 or len(needs_grad) != 3:
        raise ValueError(f"kind must be in 0 .. 4 and needs_grad have 3 elements, not {kind} and {len(needs_grad)}")
    validate_memory([], [*student, *teacher, scalars, ids, grad_at_ids])


def validate_top(side: Side, vocab: int, k: int, params: Sequence[float]) -> None:
    """Validate the arguments of `divergence_top`."""
    validate_side("side", side, vocab, params, None, None)
    if not 0 <= k <= vocab:
        raise ValueError(f"k must be in 0 .. {vocab}, the number of ids, not {k}")
    validate_memory([], side)


def validate_sides(
    student: Side, teacher: Side, vocab: int, student_params: Sequence[float], teacher_params: Sequence[float]
) -> int:
    """Raise TypeError or ValueError unless both sides fit. Returns the number of tokens."""
    n, device = validate_side("student", student, vocab, student_params, None, None)
    validate_side("teacher", teacher, vocab, teacher_params, n, device)
    return n


def validate_side(
    name: str, side: Side, vocab: int, params: Sequence[float], n: int | None, device: torch.device | None
) -> tuple[int, torch.device]:
    """Raise TypeError or ValueError unless a side is [hidden, weight] or [hidden, weight, bias] of `vocab` ids.

    Returns:
        The number of tokens and the device.
    """
    if not 2 <= len(side) <= 3 or len(params) != len(LogitParams._fields):
        raise ValueError(
            f"{name} must be hidden states, weight and perhaps bias, with {len(LogitParams._fields)} parameters of its "
            f"logits, not {len(side)} tensors and {len(params)} parameters"
        )
    hidden, weight, *bias = side
    device = hidden.device if device is None else device
    for part, tensor in zip(("hidden", "weight", "bias"), side, strict=False):
        validate_dtype(f"{name} {part}", tensor, DTYPES, device)
    if (
        hidden.ndim != 2
        or weight.ndim != 2
        or hidden.shape[1] != weight.shape[1]
        or (n is not None and len(hidden) != n)
        or any(tensor.shape != weight.shape[:1] for tensor in bias)
    ):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in side)
        raise ValueError(
            f"{name} must be hidden states [tokens, size], weight [rows, size] and perhaps bias [rows], of as many "
            f"tokens as the other side, not {shapes}"
        )
    if not 1 <= vocab <= len(weight):
        raise ValueError(f"vocab must be in 1 .. {len(weight)}, the rows of the weight of {name}, not {vocab}")
    return len(hidden), device


def validate_columns(name: str, tensor: Tensor, rows: Sequence[int], n: int, device: torch.device) -> None:
    """Raise TypeError or ValueError unless a tensor is fp32 or fp64 [one of rows, n]."""
    if tensor.ndim != 2 or tensor.shape[0] not in rows:
        raise ValueError(f"{name} must be [{' or '.join(map(str, rows))}, {n}], not {list(tensor.shape)}")
    validate_matrix(name, tensor, (torch.float32, torch.float64), (n,), tensor.shape[0], device)


def validate_matrix(
    name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], columns: Sequence[int], n: int, device: torch.device
) -> None:
    """Raise TypeError or ValueError unless a tensor is of one of the dtypes, [n, *columns] with two dimensions."""
    validate_dtype(name, tensor, dtypes, device)
    if tensor.ndim != 2 or tensor.shape != (n, *columns):
        raise ValueError(f"{name} must be {[n, *columns]} with two dimensions, not {list(tensor.shape)}")
