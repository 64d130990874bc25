"""What a tensor's name says: layer, module, block and tower, from whole tokens of the name (metrics.md, 7)."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Dropped wherever they stand: torch.compile, FSDP, activation checkpointing.
TRANSPARENT = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Dropped from the front: DDP, PEFT, and the names under which a model with a head, or with a vision tower, holds the rest.
PREFIXES = frozenset({"module", "base_model", "model", "transformer", "language_model", "gpt_neox"})

LAYERS = frozenset({"layers", "layer", "h", "blocks", "block", "resblocks"})
VISION = _words(
    "visual vision_tower vision_model vision_encoder vision_backbone vision_embed_tokens vision_embedder vision_proj"
    " image_encoder image_newline img_processor vit vpm resampler multi_modal_projector mm_projector"
    " multimodal_projector visual_projection"
)
ATTENTION = _words(
    "attn self_attn attention self_attention selfattention cross_attn cross_attention encoder_attn encdecattention"
    " linear_attn attn1 attn2"
)
MLP = _words(
    "mlp ffn feed_forward feedforward block_sparse_moe moe densereludense shared_expert shared_experts experts"
    " intermediate"
)
PARAMETERS = frozenset({"weight", "bias", "gamma", "beta", "scale"})
NORM_WORDS = frozenset({"norm", "layernorm", "layrnorm", "rmsnorm", "batchnorm", "groupnorm", "ln", "bn"})
EMBEDDINGS = _words("embed_tokens wte word_embeddings tok_embeddings embed_in token_embedding shared")
OTHER_EMBEDDINGS = _words(
    "wpe position_embeddings position_embedding embed_positions token_type_embeddings pos_embed pos_embedding"
    " positional_embedding class_embedding cls_token embed_tokens_per_layer"
)
HEADS = frozenset({"lm_head", "embed_out"})

# One name for what the model families call differently; names that mean one thing wherever they stand.
MODULES = {
    **{name: name for name in _words("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj fc1 fc2 w1 w2 w3")},
    **{name: name for name in ("qkv_proj", "gate_up_proj")},
    **dict.fromkeys(("wqkv", "qkv", "query_key_value", "c_attn"), "qkv_proj"),
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    **dict.fromkeys(("c_fc", "dense_h_to_4h", "linear_fc1"), "fc1"),
    **dict.fromkeys(("dense_4h_to_h", "linear_fc2"), "fc2"),
}
# Names that mean something only inside attention: GPT-2's c_proj, Phi's dense, BERT's query, T5's single letters.
IN_ATTENTION = {
    **dict.fromkeys(("c_proj", "dense", "proj", "out_proj", "o"), "o_proj"),
    **dict.fromkeys(("query", "q"), "q_proj"),
    **dict.fromkeys(("key", "k"), "k_proj"),
    **dict.fromkeys(("value", "v"), "v_proj"),
    "in_proj": "qkv_proj",
}
ATTENTION_MODULES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"})


@dataclass(frozen=True)
class TensorRole:
    """Where a tensor belongs: `layer` is -1 outside the layers, `tower` is "language" or "vision"."""

    layer: int
    module: str
    block: str
    tower: str


def canonical(name: str) -> str:
    """The name without the prefixes of wrappers, so that one tensor has one name in every checkpoint.

    >>> canonical("model.language_model.layers.0.mlp.gate.weight")
    'layers.0.mlp.gate.weight'
    """
    tokens = [token for token in name.split(".") if token not in TRANSPARENT]
    front = 0
    while front < len(tokens) - 1 and tokens[front] in PREFIXES:
        front += 1
    return ".".join(tokens[front:]) or name


def match_names(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Of each name the other that is the same tensor's: the same, or the only one that differs by prefixes of wrappers and is no other
    name's.

    >>> match_names(["model.norm.weight", "head"], ["model.language_model.norm.weight", "norm.bias"])
    {'model.norm.weight': 'model.language_model.norm.weight'}
    >>> match_names(["model.norm.weight", "norm.weight"], ["model.norm.weight"])
    {'model.norm.weight': 'model.norm.weight'}
    """
    names, others = list(names), list(others)
    held: set[str] = set(others)
    by_canonical: dict[str, list[str]] = defaultdict(list)
    for other in others:
        by_canonical[canonical(other)].append(other)
    found = {name: name for name in names if name in held}
    alike = defaultdict(list)
    for name in names:
        others = by_canonical.get(canonical(name), [])
        if name not in held and len(others) == 1 and others[0] not in found:
            alike[others[0]].append(name)
    return found | {claims[0]: other for other, claims in alike.items() if len(claims) == 1}


def parse_tensor_name(name: str) -> TensorRole:
    """Layer, module, block and tower of a tensor. `mlp.gate` is a router, `gate_proj` is not.

    >>> parse_tensor_name("model.layers.3.self_attn.qkv_proj.weight")
    TensorRole(layer=3, module='qkv_proj', block='attention', tower='language')
    """
    tokens = [token.lower() for token in canonical(name).split(".")]
    parameter = tokens[-1] if tokens[-1] in PARAMETERS and len(tokens) > 1 else ""
    path = tokens[:-1] if parameter else tokens
    module, block = _module(path, tokens)
    if parameter == "bias" and module not in ("norm", "router", "experts"):
        module = "bias"
    if VISION.intersection(tokens):
        return TensorRole(_layer(tokens), module, "vision", "vision")
    return TensorRole(_layer(tokens), module, block, "language")


def _layer(tokens: list[str]) -> int:
    for container, token in itertools.pairwise(tokens):
        if container in LAYERS and token.isascii() and token.isdecimal() and len(token) <= 9:
            return int(token)
    return -1


def _module(path: list[str], tokens: list[str]) -> tuple[str, str]:
    """Module and block, before biases are set apart. `path` is the name without `weight` or `bias`."""
    leaf = path[-1]
    if _is_router(path):
        return "router", "router"
    if "experts" in path:
        return "experts", "mlp"
    if NORM_WORDS.intersection(re.sub(r"\d+$", "", word) for word in leaf.split("_")):
        return "norm", "norm"
    if HEADS.intersection(path) or path == ["output"]:
        return "lm_head", "lm_head"
    if leaf in EMBEDDINGS:
        return "embed_tokens", "embedding"
    if leaf in OTHER_EMBEDDINGS:
        return "other", "embedding"
    in_attention, in_mlp = not ATTENTION.isdisjoint(path), not MLP.isdisjoint(path)
    module = MODULES.get(leaf, "other")
    if in_attention and module == "other":
        module = IN_ATTENTION.get(leaf, "other")
    elif module == "other" and leaf in ("c_proj", "dense"):
        # GPT-2's mlp.c_proj; BERT's intermediate.dense, and its output.dense beside the attention.
        module = "fc1" if "intermediate" in path else "fc2" if in_mlp or path[-2:-1] == ["output"] else "other"
    return module, _block(module, in_attention, in_mlp)


def _block(module: str, in_attention: bool, in_mlp: bool) -> str:
    if in_attention or module in ATTENTION_MODULES:
        return "attention"
    return "mlp" if in_mlp or module != "other" else "other"


def _is_router(path: list[str]) -> bool:
    if "router" in path or "shared_expert_gate" in path:
        return True
    # `gate` alone routes only as a child of the feed-forward part: other models gate attention with that name.
    return any(parent in MLP and token == "gate" for parent, token in itertools.pairwise(path))
