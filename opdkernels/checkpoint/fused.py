"""Fused against split tensors: rows are contiguous, therefore each part of a fused tensor is a flat range of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from opdkernels.checkpoint.base import TensorInfo
from opdkernels.checkpoint.names import canonical_name

# Only tensors that are concatenated along the rows. GPT-NeoX's query_key_value is interleaved by head and GPT-2's
# c_attn is concatenated along the columns: their parts are not ranges.
PARTS = {
    "qkv_proj": (("q_proj", "k_proj", "v_proj"),),
    "qkv": (("q_proj", "k_proj", "v_proj"), ("q", "k", "v")),
    "gate_up_proj": (("gate_proj", "up_proj"),),
}


def split(fused: TensorInfo, others: Mapping[str, TensorInfo]) -> list[tuple[TensorInfo, int]] | str | None:
    """Finds the tensors that are concatenated in a fused one.

    Args:
        fused: The tensor that may be fused.
        others: Tensors of the other checkpoint by canonical name (`unify_experts=True`).

    Returns:
        The parts in order, each with the element of `fused` at which it begins; None if `others` has none of them; the
        reason, for messages, if it has some and they do not fit.
    """
    reason: str | None = None
    for groups in _candidates(fused, len(others)):
        names = [name for group in groups for name in group]
        absent = [name for name in names if name not in others]
        if len(absent) == len(names):
            continue
        if absent:
            reason = f"fused from {len(names)} tensors, of which {absent[0]} is missing"
            continue
        parts = [[others[name] for name in group] for group in groups]
        # Experts are an additional dimension before the rows.
        row_dim = fused.shape[-2:] if len(groups) > 1 or len(fused.shape) == 3 else fused.shape
        if not all(_fits(row_dim, group) for group in parts):
            shapes = ", ".join(str(list(part.shape)) for part in parts[0])
            reason = f"its shape {list(fused.shape)} is not the concatenation of its parts {shapes}"
            continue
        ranges, start = [], 0
        for part in (part for group in parts for part in group):
            ranges.append((part, start))
            start += part.numel
        return ranges
    return reason


def _fits(shape: tuple[int, ...], parts: list[TensorInfo]) -> bool:
    same_rows = all(len(part.shape) == len(shape) and part.shape[1:] == shape[1:] for part in parts)
    return same_rows and sum(part.shape[0] for part in parts) == shape[0]


def _candidates(fused: TensorInfo, limit: int) -> list[list[list[str]]]:
    """Returns lists of canonical names that may make up `fused`, one list per expert (one list without experts)."""
    tokens = canonical_name(fused.name, unify_experts=True).split(".")
    parameter = tokens.pop() if tokens[-1] in ("weight", "bias") and len(tokens) > 1 else ""
    leaf, parents = tokens[-1], tokens[:-1]
    splits = PARTS.get(leaf, ())
    if parents[-1:] == ["experts"]:
        # Bounded by `limit` before the lists are made: the number of experts in the header is untrusted.
        if parameter == "bias" or len(fused.shape) != 3 or not 0 < fused.shape[0] <= limit:
            return []
        stem = ".".join(parents)
        every = [*splits, (leaf,)]
        return [
            [[f"{stem}.{expert}.{part}.weight" for part in parts] for expert in range(fused.shape[0])]
            for parts in every
        ]
    if not fused.shape or math.prod(fused.shape) == 0:
        return []
    tail = [parameter] if parameter else []
    return [[[".".join([*parents, part, *tail]) for part in parts]] for parts in splits]
