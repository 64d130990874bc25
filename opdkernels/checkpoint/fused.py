"""Fused against split tensors: rows are contiguous, so each part of a fused tensor is a flat range of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from opdkernels.checkpoint.base import TensorInfo
from opdkernels.checkpoint.names import canonical

# Only what is concatenated along the rows, part after part. GPT-NeoX's query_key_value is interleaved by head and
# GPT-2's c_attn is concatenated along the columns: their parts are no ranges.
PARTS = {
    "qkv_proj": (("q_proj", "k_proj", "v_proj"),),
    "qkv": (("q_proj", "k_proj", "v_proj"), ("q", "k", "v")),
    "gate_up_proj": (("gate_proj", "up_proj"),),
}
MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def key(name: str) -> str:
    """The canonical name, with Mixtral's names for experts turned into those that every other model uses.

    >>> key("model.layers.0.block_sparse_moe.experts.3.w1.weight")
    'layers.0.mlp.experts.3.gate_proj.weight'
    """
    tokens = ["mlp" if token == "block_sparse_moe" else token for token in canonical(name).split(".")]
    for index in range(2, len(tokens)):
        if tokens[index - 2] == "experts" and tokens[index - 1].isdecimal():
            tokens[index] = MIXTRAL.get(tokens[index], tokens[index])
    return ".".join(tokens)


def split(fused: TensorInfo, others: Mapping[str, TensorInfo]) -> list[tuple[TensorInfo, int]] | str | None:
    """The tensors of `others` (by key) that make up `fused`, each with the element of `fused` it begins at.

    None where `others` has none of them; the reason, where it has some and they do not fit.
    """
    reason: str | None = None
    for groups in _candidates(fused, len(others)):
        names = [name for group in groups for name in group]
        found = [name for name in names if name in others]
        if not found:
            continue
        if len(found) < len(names):
            lost = next(name for name in names if name not in others)
            reason = f"fused from {len(names)} tensors, of which {lost} is not there"
            continue
        parts = [[others[name] for name in group] for group in groups]
        # Experts are a dimension of their own in front of the rows.
        row_dim = fused.shape[-2:] if len(groups) > 1 or len(fused.shape) == 3 else fused.shape
        if not all(_fits(row_dim, group) for group in parts):
            shapes = ", ".join(str(list(part.shape)) for part in parts[0])
            reason = f"its shape {list(fused.shape)} is not that of its parts {shapes} one after the other"
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
    """The keys that may make up `fused`, one list an expert (a single list where there are no experts)."""
    tokens = key(fused.name).split(".")
    parameter = tokens.pop() if tokens[-1] in ("weight", "bias") and len(tokens) > 1 else ""
    leaf, parents = tokens[-1], tokens[:-1]
    splits = PARTS.get(leaf, ())
    if parents[-1:] == ["experts"]:
        # `limit` first: the number of experts is whatever the header says.
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
