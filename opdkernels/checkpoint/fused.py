"""Fused against split tensors: rows are contiguous, therefore each part of a fused tensor is a flat range of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

Shape = tuple[int, ...]

# Only tensors that are concatenated along the rows. GPT-NeoX's query_key_value is interleaved by head and GPT-2's
# c_attn is concatenated along the columns: their parts are not ranges.
PARTS = {
    "qkv_proj": (("q_proj", "k_proj", "v_proj"),),
    "qkv": (("q_proj", "k_proj", "v_proj"), ("q", "k", "v")),
    "gate_up_proj": (("gate_proj", "up_proj"),),
}

# How the fused experts of a model type are stored: "rows", [experts, out, in] with gate above up; "transposed",
# [experts, in, out]; "interleaved", transposed with gate and up in turns. Shapes tell unless a matrix is square.
ROWS = (
    "mixtral phimoe minimax qwen2_moe qwen3_moe qwen3_next deepseek_v2 deepseek_v3 glm4_moe glm4v_moe ernie4_5_moe"
    " hunyuan_v1_moe olmoe flex_olmo dots1 longcat_flash"
)
EXPERT_LAYOUTS = {
    **dict.fromkeys(ROWS.split(), "rows"),
    **dict.fromkeys(("llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"), "transposed"),
    "gpt_oss": "interleaved",
}


def split(
    canonical: str, shape: Shape, others: Mapping[str, tuple[str, Shape]], layout: str = ""
) -> list[tuple[str, Shape, int]] | str | None:
    """Finds the tensors that are concatenated in a fused one.

    Args:
        canonical: Canonical name of the tensor that may be fused.
        shape: Its shape.
        others: Names and shapes of the other checkpoint's tensors by canonical name.
        layout: How the model stores fused experts, see `EXPERT_LAYOUTS`.

    Returns:
        Name, shape, and first element in the fused tensor of each part, in order; None if `others` has none of them;
        the reason, for messages, if it has some and they do not fit.
    """
    reason: str | None = None
    for groups in _candidates(canonical, shape, len(others)):
        names = [name for group in groups for name in group]
        absent = [name for name in names if name not in others]
        if len(absent) == len(names):
            continue
        if absent:
            reason = f"fused from {len(names)} tensors, of which {absent[0]} is missing"
            continue
        parts = [[others[name] for name in group] for group in groups]
        # Experts are an additional dimension before the rows.
        stacked = len(groups) > 1 or len(shape) == 3
        row_dim = shape[-2:] if stacked else shape
        if not all(_fits(row_dim, [part for _, part in group]) for group in parts):
            shapes = ", ".join(str(list(part)) for _, part in parts[0])
            reason = f"its shape {list(shape)} is not the concatenation of its parts {shapes}"
            if stacked and all(_fits(row_dim[::-1], [part for _, part in group]) for group in parts):
                reason += "; its experts are stored transposed: transpose them on one side"
            continue
        if stacked and (refusal := _unknown_layout(row_dim, len(parts[0]), layout)):
            reason = refusal
            continue
        ranges, start = [], 0
        for name, part in (part for group in parts for part in group):
            ranges.append((name, part, start))
            start += math.prod(part)
        return ranges
    return reason


def _unknown_layout(row_dim: Shape, num_parts: int, layout: str) -> str:
    """Returns why experts whose shapes fit are not known to be stored as rows, or ""."""
    if layout == "interleaved" and num_parts > 1:
        return "its rows of gate_proj and up_proj are interleaved; split them on this side"
    if row_dim[0] != row_dim[1] or layout == "rows":
        return ""
    if layout:
        return "its experts are stored transposed, as this model type stores them; transpose them on one side"
    return (
        f"its experts of shape {list(row_dim)} may be stored transposed, which a square shape cannot show;"
        " put the model's config.json with its model_type next to the weights"
    )


def _fits(shape: Shape, parts: list[Shape]) -> bool:
    same_rows = all(len(part) == len(shape) and part[1:] == shape[1:] for part in parts)
    return same_rows and sum(part[0] for part in parts) == shape[0]


def _candidates(canonical: str, shape: Shape, limit: int) -> list[list[list[str]]]:
    """Returns lists of canonical names that may make up a tensor, one list per expert (one list without experts)."""
    tokens = canonical.split(".")
    parameter = tokens.pop() if tokens[-1] in ("weight", "bias") and len(tokens) > 1 else ""
    leaf, parents = tokens[-1], tokens[:-1]
    splits = PARTS.get(leaf, ())
    if parents[-1:] == ["experts"]:
        # Bounded by `limit` before the lists are made: the number of experts in the header is untrusted.
        if parameter == "bias" or len(shape) != 3 or not 0 < shape[0] <= limit:
            return []
        stem = ".".join(parents)
        every = [*splits, (leaf,)]
        return [[[f"{stem}.{expert}.{part}.weight" for part in parts] for expert in range(shape[0])] for parts in every]
    if not shape or math.prod(shape) == 0:
        return []
    tail = [parameter] if parameter else []
    return [[[".".join([*parents, part, *tail]) for part in parts]] for parts in splits]
