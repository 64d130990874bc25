"""The order of modules on a page."""

from __future__ import annotations

# In the order of a layer's forward pass.
MODULE_ORDER = {
    name: i
    for i, name in enumerate(
        (
            "q_proj",
            "k_proj",
            "v_proj",
            "qkv_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "gate_up_proj",
            "down_proj",
            "w1",
            "w3",
            "w2",
            "fc1",
            "fc2",
            "router",
            "experts",
            "bias",
            "norm",
            "embed_tokens",
            "lm_head",
            "other",
        )
    )
}
