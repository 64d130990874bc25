"""Names are classified by whole tokens: a table of the names that model families use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdkernels.checkpoint.names import TensorRole, canonical_name, parse_tensor_name

MODULES = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2", "w1", "w2", "w3"),
    *("qkv_proj", "gate_up_proj", "experts", "router", "embed_tokens", "lm_head", "norm", "bias", "other"),
}
BLOCKS = {"attention", "mlp", "embedding", "lm_head", "norm", "vision", "router", "other"}

TABLE = [
    # Llama, Qwen
    ("model.embed_tokens.weight", -1, "embed_tokens", "embedding"),
    ("model.layers.12.self_attn.q_proj.weight", 12, "q_proj", "attention"),
    ("model.layers.12.self_attn.q_proj.bias", 12, "bias", "attention"),
    ("model.layers.12.self_attn.q_norm.weight", 12, "norm", "norm"),
    ("model.layers.0.self_attn.o_proj.weight", 0, "o_proj", "attention"),
    ("model.layers.0.mlp.gate_proj.weight", 0, "gate_proj", "mlp"),
    ("model.layers.0.mlp.down_proj.weight", 0, "down_proj", "mlp"),
    ("model.layers.0.input_layernorm.weight", 0, "norm", "norm"),
    ("model.layers.0.post_attention_layernorm.weight", 0, "norm", "norm"),
    ("model.norm.weight", -1, "norm", "norm"),
    ("lm_head.weight", -1, "lm_head", "lm_head"),
    ("_orig_mod.model.layers.3._fsdp_wrapped_module.self_attn.k_proj.weight", 3, "k_proj", "attention"),
    # Llama as Meta wrote it
    ("tok_embeddings.weight", -1, "embed_tokens", "embedding"),
    ("layers.1.attention.wq.weight", 1, "q_proj", "attention"),
    ("layers.1.feed_forward.w3.weight", 1, "w3", "mlp"),
    ("layers.1.ffn_norm.weight", 1, "norm", "norm"),
    ("output.weight", -1, "lm_head", "lm_head"),
    # GPT-2, with and without its prefix
    ("h.0.attn.c_attn.weight", 0, "qkv_proj", "attention"),
    ("transformer.h.11.attn.c_proj.weight", 11, "o_proj", "attention"),
    ("h.0.mlp.c_fc.weight", 0, "fc1", "mlp"),
    ("h.0.mlp.c_proj.weight", 0, "fc2", "mlp"),
    ("h.0.mlp.c_proj.bias", 0, "bias", "mlp"),
    ("h.0.ln_1.bias", 0, "norm", "norm"),
    ("wte.weight", -1, "embed_tokens", "embedding"),
    ("wpe.weight", -1, "other", "embedding"),
    ("transformer.ln_f.weight", -1, "norm", "norm"),
    # Phi, OPT, GPT-NeoX, BERT, T5
    ("model.layers.0.self_attn.qkv_proj.weight", 0, "qkv_proj", "attention"),
    ("model.layers.0.mlp.gate_up_proj.weight", 0, "gate_up_proj", "mlp"),
    ("model.layers.0.self_attn.dense.weight", 0, "o_proj", "attention"),
    ("model.layers.0.mlp.fc1.weight", 0, "fc1", "mlp"),
    ("model.decoder.layers.0.self_attn.out_proj.weight", 0, "o_proj", "attention"),
    ("gpt_neox.layers.5.attention.query_key_value.weight", 5, "qkv_proj", "attention"),
    ("gpt_neox.layers.5.mlp.dense_4h_to_h.weight", 5, "fc2", "mlp"),
    ("embed_out.weight", -1, "lm_head", "lm_head"),
    ("vocab_projector.weight", -1, "lm_head", "lm_head"),
    ("backbone.embeddings.weight", -1, "embed_tokens", "embedding"),
    ("emb.weight", -1, "embed_tokens", "embedding"),
    ("bert.encoder.layer.0.attention.self.query.weight", 0, "q_proj", "attention"),
    ("bert.encoder.layer.0.attention.output.dense.weight", 0, "o_proj", "attention"),
    ("bert.encoder.layer.0.intermediate.dense.weight", 0, "fc1", "mlp"),
    ("bert.encoder.layer.0.output.dense.weight", 0, "fc2", "mlp"),
    ("bert.encoder.layer.0.attention.self.value.bias", 0, "bias", "attention"),
    ("cls.predictions.decoder.weight", -1, "lm_head", "lm_head"),
    ("proj_out.weight", -1, "lm_head", "lm_head"),
    ("bert.embeddings.LayerNorm.gamma", -1, "norm", "norm"),
    ("bert.embeddings.LayerNorm.weight", -1, "norm", "norm"),
    ("encoder.block.3.layer.0.SelfAttention.q.weight", 3, "q_proj", "attention"),
    ("encoder.block.0.layer.1.DenseReluDense.wo.weight", 0, "fc2", "mlp"),
    ("encoder.block.0.layer.1.DenseGatedActDense.wo.weight", 0, "fc2", "mlp"),
    ("model.layers.0.ff.wo.weight", 0, "fc2", "mlp"),
    ("encoder.block.0.layer.0.LocalSelfAttention.o.weight", 0, "o_proj", "attention"),
    ("encoder.block.0.layer.0.TransientGlobalSelfAttention.q.weight", 0, "q_proj", "attention"),
    ("transformer.h.0.crossattention.c_attn.weight", 0, "qkv_proj", "attention"),
    ("xlnet.transformer.layer.0.rel_attn.q", 0, "q_proj", "attention"),
    ("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight", -1, "other", "mlp"),
    ("encoder.layers.0.feed_forward1.linear1.weight", 0, "other", "mlp"),
    ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0, "gate_proj", "mlp"),
    ("encoder.block.0.layer.1.DenseReluDense.wi.weight", 0, "fc1", "mlp"),
    ("decoder.block.0.layer.1.EncDecAttention.o.weight", 0, "o_proj", "attention"),
    ("model.layers.0.mlp.Wo.weight", 0, "fc2", "mlp"),
    ("model.layers.0.mlp.Wi.weight", 0, "fc1", "mlp"),
    ("model.layers.0.attn.Wo.weight", 0, "o_proj", "attention"),
    ("model.layers.0.attn.Wqkv.weight", 0, "qkv_proj", "attention"),
    ("layers.0.attention.wo.weight", 0, "o_proj", "attention"),
    ("blocks.0.ffn.v_proj.weight", 0, "v_proj", "mlp"),
    ("shared.weight", -1, "embed_tokens", "embedding"),
    # Mixture of experts: `gate` routes, `gate_proj` does not
    ("model.layers.0.mlp.gate.weight", 0, "router", "router"),
    ("model.layers.0.mlp.gate.e_score_correction_bias", 0, "router", "router"),
    ("model.layers.0.block_sparse_moe.gate.weight", 0, "router", "router"),
    ("model.layers.0.mlp.router.bias", 0, "router", "router"),
    ("model.layers.0.mlp.shared_expert_gate.weight", 0, "router", "router"),
    ("model.layers.0.mlp.shared_expert.gate_proj.weight", 0, "gate_proj", "mlp"),
    ("model.layers.7.mlp.experts.63.gate_proj.weight", 7, "experts", "mlp"),
    ("model.layers.7.block_sparse_moe.experts.3.w1.weight", 7, "experts", "mlp"),
    ("model.layers.7.mlp.experts.gate_up_proj", 7, "experts", "mlp"),
    ("model.layers.7.mlp.experts.down_proj_bias", 7, "experts", "mlp"),
    ("model.layers.0.self_attn.gate.weight", 0, "other", "attention"),
    # Whole tokens only
    ("my_q_proj_extra.weight", -1, "other", "other"),
    ("denormalize.weight", -1, "other", "other"),
    ("layers_x.3.q_projection.weight", -1, "other", "other"),
    ("networks.2.weight", -1, "other", "other"),
    ("", -1, "other", "other"),
    ("..", -1, "other", "other"),
    ("weight", -1, "other", "other"),
    ("layers.99999999999999999999.w1", -1, "w1", "mlp"),
]

VISION = [
    ("visual.blocks.3.attn.qkv.weight", 3, "qkv_proj"),
    ("model.visual.blocks.3.attn.proj.weight", 3, "o_proj"),
    ("model.visual.blocks.3.mlp.linear_fc1.bias", 3, "bias"),
    ("model.visual.merger.mlp.0.weight", -1, "other"),
    ("vision_tower.vision_model.encoder.layers.2.layer_norm1.weight", 2, "norm"),
    ("model.vision_tower.vision_model.encoder.layers.2.self_attn.q_proj.weight", 2, "q_proj"),
    ("multi_modal_projector.linear_1.weight", -1, "other"),
]


@pytest.mark.parametrize(("name", "layer", "module", "block"), TABLE)
def test_a_name_is_classified_by_its_tokens(name: str, layer: int, module: str, block: str) -> None:
    assert parse_tensor_name(name) == TensorRole(layer, module, block, "language")


@pytest.mark.parametrize(("name", "layer", "module"), VISION)
def test_vision_towers_are_a_separate_block(name: str, layer: int, module: str) -> None:
    assert parse_tensor_name(name) == TensorRole(layer, module, "vision", "vision")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.layers.0.w", "layers.0.w"),
        ("language_model.model.layers.0.w", "layers.0.w"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.visual.patch_embed.proj.weight", "visual.patch_embed.proj.weight"),
        ("module.model.layers.0.w", "layers.0.w"),
        ("base_model.model.model.layers.0.w", "layers.0.w"),
        ("transformer.h.0.w", "h.0.w"),
        ("model", "model"),
        ("_orig_mod", "_orig_mod"),
        ("", ""),
        ("encoder.model.w", "encoder.model.w"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "layers.0.q_proj.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("pretrained_model.model.layers.0.w", "layers.0.w"),
        ("_forward_module.model.layers.0.w", "layers.0.w"),
        ("model.layers.0.module.w", "layers.0.w"),
        ("embeddings.LayerNorm.gamma", "embeddings.LayerNorm.weight"),
        ("embeddings.LayerNorm.beta", "embeddings.LayerNorm.bias"),
        ("layers.0.layer_scale.gamma", "layers.0.layer_scale.gamma"),
        ("conv.parametrizations.weight.original0", "conv.weight_g"),
        ("conv.parametrizations.weight.original1", "conv.weight_v"),
        ("conv.parametrizations.weight.original", "conv.weight_orig"),
        ("layers.0.block_sparse_moe.experts.3.w2.weight", "layers.0.mlp.experts.3.down_proj.weight"),
    ],
)
def test_wrapper_prefixes_are_removed(name: str, expected: str) -> None:
    assert canonical_name(name) == expected


@given(
    st.lists(
        st.sampled_from(
            ["model", "layers", "7", "mlp", "gate", "q_proj", "norm", "visual", "weight", "bias", "", "\x1b", "é"]
        )
    )
)
def test_any_name_has_a_role_that_wrappers_do_not_change(tokens: list[str]) -> None:
    name = ".".join(tokens)
    role = parse_tensor_name(name)
    assert role.module in MODULES
    assert role.block in BLOCKS
    assert role == parse_tensor_name(canonical_name(name)) == parse_tensor_name("module._orig_mod." + name)
    assert canonical_name(canonical_name(name)) == canonical_name(name)
