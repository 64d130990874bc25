"""Tensors that a model stores and does not train: constants, statistics and positions, which are no parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from opdkernels.checkpoint.names import ATTENTION, canonical_name, word_set

# By the last part of the name. Constants: rotary frequencies and their caches, causal masks, absolute and relative
# positions, masks of torch.nn.utils.prune, BART's constant that is added to the logits, tables of indices. State:
# running statistics of BatchNorm, power iterations of spectral norm.
BUFFERS = word_set(
    "inv_freq original_inv_freq freqs_cis freqs_cos freqs_sin cos_cached sin_cached cos_cache sin_cache _cos_cached"
    " _sin_cached position_ids token_type_ids causal_mask attn_mask attention_mask masked_bias tril"
    " future_mask weight_mask bias_mask relative_position_index relative_coords_table relative_position_bucket"
    " attention_bias_idxs token_rp_bucket image_rp_bucket image_position_idx master_layout codebook_offsets tid2eid"
    " alibi_slopes final_logits_bias _float_tensor"
    " running_mean running_var num_batches_tracked weight_u"
)
ROTARY_LEAVES = frozenset({"cos", "sin", "freqs", "scale"})
ROTARY = frozenset({"rotary_emb", "rotary_pos_emb", "rotary", "rope", "rotary_embedding"})

# Sinusoidal positions: PyTorch's tutorial has `pos_encoder.pe`, fairseq and M2M-100 `embed_positions.weights`.
POSITION_LEAVES = frozenset({"pe", "weights"})
POSITION_WORDS = frozenset({"pos", "position", "positions", "positional"})

LEAVES = BUFFERS | ROTARY_LEAVES | POSITION_LEAVES | {"bias", "mask"}
MIN_PACKED = 1024


def is_buffer(name: str, shape: Sequence[int], dtype: str = "") -> bool:
    """Whether a tensor is a buffer of the model and not a parameter.

    Decided by the name, for GPT-2's `attn.bias` and minGPT's `attn.mask`, which are called like a parameter, by the
    shape, and for tables of indices and flags by the dtype. Integers of other dtypes may be quantised weights, and so
    may those for which `is_packed` is true: they are no buffers.

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
        return not is_packed(name, shape, dtype)
    if name.rpartition(".")[2] not in LEAVES and "original_module" not in name:
        return False
    tokens = canonical_name(name).split(".")
    leaf, parent = tokens[-1], tokens[-2].lower() if len(tokens) > 1 else ""
    if leaf in BUFFERS or "original_module" in tokens:  # what PEFT keeps of a module that `modules_to_save` replaces
        return True
    if parent in ROTARY and leaf in ROTARY_LEAVES:
        return True
    if leaf in POSITION_LEAVES:
        return not POSITION_WORDS.isdisjoint(parent.split("_"))
    is_mask = len(shape) >= 2 and shape[-2] == shape[-1] and set(shape[:-2]) <= {1}
    return is_mask and (leaf == "mask" or (leaf == "bias" and parent in ATTENTION and len(shape) == 4))


def is_packed(name: str, shape: Sequence[int], dtype: str) -> bool:
    """Whether a tensor of 64-bit integers holds packed weights, as QuIP#'s `Qidxs` does, and no indices.

    Indices are known by their names, or are few, or have one dimension, as positions of shape [1, length] do.

    Args:
        name: Name of the tensor.
        shape: Its shape.
        dtype: Its dtype as in `TensorInfo`.

    >>> is_packed("layers.0.q_proj.codes", (64, 64), "i64"), is_packed("embeddings.position_ids", (1, 4096), "i64")
    (True, False)
    """
    if dtype not in ("i64", "u64") or sum(size > 1 for size in shape) < 2 or math.prod(shape) < MIN_PACKED:
        return False
    return canonical_name(name).rpartition(".")[2] not in BUFFERS
