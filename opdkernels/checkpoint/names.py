"""Tensor names: the canonical form that is the same in every checkpoint, and roles.

Names are compared by tokens (the parts between dots), never by substrings.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# Removed at any position: torch.compile, FSDP, FairScale, activation checkpointing, DDP, DeepSpeed, Lightning Fabric,
# and the layer that a PEFT adapter wraps.
WRAPPERS = word_set(
    "_orig_mod _fsdp_wrapped_module _fpw_module _checkpoint_wrapped_module module _forward_module base_layer"
)
# Removed at the front: PEFT, TRL's value head, and the names under which a model with a head or with a vision tower has
# its body.
PREFIXES = word_set("base_model pretrained_model model transformer language_model gpt_neox")

LAYERS = frozenset({"layers", "layer", "h", "blocks", "block", "resblocks"})
VISION = word_set(
    "visual vision_tower vision_model vision_encoder vision_backbone vision_embed_tokens vision_embedder vision_proj"
    " image_encoder image_newline img_processor vit vpm resampler multi_modal_projector mm_projector"
    " multimodal_projector visual_projection"
)
ATTENTION = word_set(
    "attn self_attn attention self_attention selfattention cross_attn cross_attention encoder_attn encdecattention"
    " linear_attn attn1 attn2 crossattention rel_attn multi_head_attention localselfattention"
    " transientglobalselfattention"
)
MLP = word_set(
    "mlp ffn feed_forward feedforward block_sparse_moe moe densereludense shared_expert shared_experts experts"
    " intermediate ff ff_layer t5layerff denseactdense densegatedactdense feed_forward1 feed_forward2 ffn1 ffn2"
    " ffn_output"
)
PARAMETERS = frozenset({"weight", "bias", "gamma", "beta", "scale"})
NORM_WORDS = frozenset({"norm", "layernorm", "layrnorm", "rmsnorm", "batchnorm", "groupnorm", "ln", "bn"})
EMBEDDINGS = word_set("embed_tokens wte word_embeddings tok_embeddings embed_in token_embedding shared")
OTHER_EMBEDDINGS = word_set(
    "wpe position_embeddings position_embedding embed_positions token_type_embeddings pos_embed pos_embedding"
    " positional_embedding class_embedding cls_token embed_tokens_per_layer"
)
# Modules that are an embedding of tokens only at these paths: of Mamba, RWKV and XLM.
EMBEDDING_PATHS = {
    (*container, name) for container in ((), ("backbone",), ("rwkv",)) for name in ("embeddings", "embedding", "emb")
}
HEADS = frozenset({"lm_head", "embed_out", "vocab_projector", "generator_lm_head"})  # two of GPT, DistilBERT, ELECTRA
HEAD_PATHS = {("output",), ("output_layer",), ("proj_out",), ("decoder",)}

# One name per module that model families name differently; these names mean the same at any position.
MODULES = {
    **{name: name for name in word_set("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj fc1 fc2 w1 w2 w3")},
    **{name: name for name in ("qkv_proj", "gate_up_proj")},
    **dict.fromkeys(("wqkv", "qkv", "query_key_value", "c_attn"), "qkv_proj"),
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    **dict.fromkeys(("c_fc", "dense_h_to_4h", "linear_fc1"), "fc1"),
    **dict.fromkeys(("dense_4h_to_h", "linear_fc2"), "fc2"),
}
# Names with a meaning only inside attention: GPT-2's c_proj, Phi's dense, BERT's query, T5's single letters.
IN_ATTENTION = {
    **dict.fromkeys(("c_proj", "dense", "proj", "out_proj", "o"), "o_proj"),
    **dict.fromkeys(("query", "q"), "q_proj"),
    **dict.fromkeys(("key", "k"), "k_proj"),
    **dict.fromkeys(("value", "v"), "v_proj"),
    "in_proj": "qkv_proj",
}
# Names with a meaning only inside the feed-forward block: T5's and ModernBERT's.
IN_MLP = {"wi": "fc1", "wi_0": "gate_proj", "wi_1": "up_proj", "wo": "fc2"}
OLD_NORM_PARAMETERS = {"gamma": "weight", "beta": "bias"}
PARAMETRIZED = {"original0": "_g", "original1": "_v", "original": "_orig"}
MIXTRAL_EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
ATTENTION_MODULES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"})


@dataclass(frozen=True)
class TensorRole:
    """What a tensor is in the model.

    Attributes:
        layer: Index of the layer; -1 outside the layers.
        module: Kind of module, such as "q_proj", "norm" or "other".
        block: Kind of block, such as "attention", "mlp" or "vision".
        tower: "language" or "vision".
    """

    layer: int
    module: str
    block: str
    tower: str


def unwrap_name(name: str) -> str:
    """Returns the name that a parameter has in the model that a trainer wrapped.

    Removes the tokens of `WRAPPERS`, and those that PEFT adds to a module that is trained as a whole.

    >>> unwrap_name("_orig_mod.model.layers.0._fsdp_wrapped_module.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> unwrap_name("base_model.model.lm_head.modules_to_save.default.weight")
    'base_model.model.lm_head.weight'
    """
    tokens = name.split(".")
    # The token after `modules_to_save` is the name of the adapter.
    kept = [
        token
        for previous, token in zip(["", *tokens], tokens, strict=False)
        if token not in WRAPPERS and "modules_to_save" not in (previous, token)
    ]
    return ".".join(kept) or name


def canonical_name(name: str) -> str:
    """Returns the name that a tensor has in every checkpoint, whatever program saved it.

    Tokens of wrappers and prefixes of the model's body are removed. Experts have the names of all models but Mixtral,
    norms have `weight` and `bias` instead of `gamma` and `beta`, and a parametrized weight has the names of
    `torch.nn.utils.weight_norm` or `spectral_norm`.

    Args:
        name: Name of a tensor or a parameter.

    >>> canonical_name("model.language_model.layers.0.mlp.gate.weight")
    'layers.0.mlp.gate.weight'
    >>> canonical_name("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    'layers.0.self_attn.q_proj.weight'
    >>> canonical_name("model.layers.0.block_sparse_moe.experts.3.w1.weight")
    'layers.0.mlp.experts.3.gate_proj.weight'
    >>> canonical_name("bert.embeddings.LayerNorm.gamma")
    'bert.embeddings.LayerNorm.weight'
    >>> canonical_name("conv.parametrizations.weight.original0")
    'conv.weight_g'
    """
    tokens = unwrap_name(name).split(".")
    front = 0
    while front < len(tokens) - 1 and tokens[front] in PREFIXES:
        front += 1
    tokens = ["mlp" if token == "block_sparse_moe" else token for token in tokens[front:]]
    for index in range(2, len(tokens)):
        if tokens[index - 2] == "experts" and tokens[index - 1].isdecimal():
            tokens[index] = MIXTRAL_EXPERTS.get(tokens[index], tokens[index])
    if tokens[-1] in OLD_NORM_PARAMETERS and len(tokens) > 1 and _is_norm(tokens[-2]):
        tokens[-1] = OLD_NORM_PARAMETERS[tokens[-1]]
    if len(tokens) > 2 and tokens[-3] == "parametrizations" and tokens[-1] in PARAMETRIZED:
        tokens[-3:] = [tokens[-2] + PARAMETRIZED[tokens[-1]]]
    return ".".join(tokens) or name


def parse_tensor_name(name: str) -> TensorRole:
    """Returns layer, module, block and tower of a tensor. `mlp.gate` is a router, `gate_proj` is not.

    >>> parse_tensor_name("model.layers.3.self_attn.qkv_proj.weight")
    TensorRole(layer=3, module='qkv_proj', block='attention', tower='language')
    """
    tokens = [token.lower() for token in canonical_name(name).split(".")]
    parameter = tokens[-1] if tokens[-1] in PARAMETERS and len(tokens) > 1 else ""
    path = tokens[:-1] if parameter else tokens
    module, block = _module(path, tokens)
    if parameter == "bias" and module not in ("norm", "router", "experts"):
        module = "bias"
    if VISION.intersection(tokens):
        return TensorRole(_layer(tokens), module, "vision", "vision")
    return TensorRole(_layer(tokens), module, block, "language")


def _is_norm(module: str) -> bool:
    """Whether a module's own name says that it is a norm.

    >>> _is_norm("LayerNorm"), _is_norm("ln_1"), _is_norm("denormalize")
    (True, True, False)
    """
    return not NORM_WORDS.isdisjoint(re.sub(r"\d+$", "", word) for word in module.lower().split("_"))


def _layer(tokens: list[str]) -> int:
    for container, token in itertools.pairwise(tokens):
        if container in LAYERS and token.isascii() and token.isdecimal() and len(token) <= 9:
            return int(token)
    return -1


def _module(path: list[str], tokens: list[str]) -> tuple[str, str]:
    """Returns module and block, before biases become separate modules; `path` excludes `weight` or `bias`."""
    leaf = path[-1]
    if _is_router(path):
        return "router", "router"
    if "experts" in path:
        return "experts", "mlp"
    if _is_norm(leaf):
        return "norm", "norm"
    if HEADS.intersection(path) or tuple(path) in HEAD_PATHS:
        return "lm_head", "lm_head"
    if path[-2:] == ["predictions", "decoder"] or (leaf == "predictions" and tokens[-1] == "bias"):  # BERT's
        return "lm_head", "lm_head"
    if leaf in EMBEDDINGS or tuple(path) in EMBEDDING_PATHS:
        return "embed_tokens", "embedding"
    if leaf in OTHER_EMBEDDINGS:
        return "other", "embedding"
    container = next((token for token in reversed(path) if token in ATTENTION or token in MLP), "")
    in_attention, in_mlp = container in ATTENTION, container in MLP
    # The container decides: `wo` is the output of attention in Llama's files and of the feed-forward block in T5's.
    module = IN_MLP.get(leaf, "other") if in_mlp else "other"
    module = MODULES.get(leaf, "other") if module == "other" else module
    if in_attention and module == "other":
        module = IN_ATTENTION.get(leaf, "other")
    elif module == "other" and leaf in ("c_proj", "dense"):
        # GPT-2's mlp.c_proj; BERT's intermediate.dense, and its output.dense outside the attention.
        module = "fc1" if "intermediate" in path else "fc2" if in_mlp or path[-2:-1] == ["output"] else "other"
    return module, _block(module, in_attention, in_mlp)


def _block(module: str, in_attention: bool, in_mlp: bool) -> str:
    if in_attention or (module in ATTENTION_MODULES and not in_mlp):
        return "attention"
    return "mlp" if in_mlp or module != "other" else "other"


def _is_router(path: list[str]) -> bool:
    if "router" in path or "shared_expert_gate" in path:
        return True
    # `gate` alone is a router only as a child of the feed-forward block: other models have such a gate in attention.
    return any(parent in MLP and token == "gate" for parent, token in itertools.pairwise(path))
