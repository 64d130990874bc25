"""Tensors that a model stores and does not train: constants, statistics and positions, which are no parameters."""

from __future__ import annotations

from collections.abc import Sequence

from opdkernels.checkpoint.names import ATTENTION, canonical_name, word_set

# By the last part of the name. Constants: rotary frequencies and their caches, causal masks, absolute and relative
# positions. State: running statistics of BatchNorm, power iterations of spectral norm.
BUFFERS = word_set(
    "inv_freq original_inv_freq freqs_cis freqs_cos freqs_sin cos_cached sin_cached cos_cache sin_cache _cos_cached"
    " _sin_cached position_ids token_type_ids causal_mask attn_mask attention_mask masked_bias tril"
    " relative_position_index relative_coords_table relative_position_bucket _float_tensor"
    " running_mean running_var num_batches_tracked weight_u"
)
ROTARY_LEAVES = frozenset({"cos", "sin", "freqs", "scale"})
ROTARY = frozenset({"rotary_emb", "rotary_pos_emb", "rotary", "rope", "rotary_embedding"})

LEAVES = BUFFERS | ROTARY_LEAVES | {"bias"}


def is_buffer(name: str, shape: Sequence[int], dtype: str = "") -> bool:
    """Whether a tensor is a buffer of the model and not a parameter.

    Decided by the name, for GPT-2's `attn.bias`, a causal mask that is called like a parameter, by the shape, and for
    tables of indices and flags by the dtype. Smaller integers may be quantised weights and are no buffers.

    Args:
        name: Name of the tensor.
        shape: Its shape.
        dtype: Its dtype as in `TensorInfo`, or "" if it is not known.

    >>> is_buffer("h.0.attn.bias", (1, 1, 1024, 1024)), is_buffer("h.0.attn.c_attn.bias", (2304,))
    (True, False)
    >>> is_buffer("model.layers.0.self_attn.rotary_emb.inv_freq", (64,)), is_buffer("bn1.running_mean", (64,))
    (True, True)
    """
    if dtype in ("i64", "u64", "bool"):
        return True
    if name.rpartition(".")[2] not in LEAVES and "original_module" not in name:
        return False
    tokens = canonical_name(name).split(".")
    leaf, parent = tokens[-1], tokens[-2].lower() if len(tokens) > 1 else ""
    if leaf in BUFFERS or "original_module" in tokens:  # what PEFT keeps of a module that `modules_to_save` replaces
        return True
    if parent in ROTARY and leaf in ROTARY_LEAVES:
        return True
    is_mask = len(shape) == 4 and tuple(shape[:2]) == (1, 1) and shape[2] == shape[3]
    return leaf == "bias" and parent in ATTENTION and is_mask
