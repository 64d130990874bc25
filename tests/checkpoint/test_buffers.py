"""Buffers are no parameters: left out of the matches and of coverage, compared bit by bit, and listed."""

from __future__ import annotations

import pytest

from opdkernels.checkpoint.buffers import is_buffer
from opdkernels.checkpoint.match import BufferMatch, match
from tests.checkpoint.conftest import FakeCheckpoint

MASK, FREQUENCIES = "h.0.attn.bias", "h.0.attn.rotary_emb.inv_freq"


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (MASK, (1, 1, 64, 64), True),
        ("transformer.h.0.attn.masked_bias", (), True),
        ("transformer.h.0.attn.attention.bias", (1, 1, 64, 64), True),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 64, 64), True),
        ("blocks.0.sa.heads.1.tril", (8, 8), True),
        ("module.model.layers.0._fsdp_wrapped_module.self_attn.rotary_emb.inv_freq", (8,), True),
        ("model.rotary_emb.inv_freq", (8,), True),
        ("bert.embeddings.position_ids", (1, 512), True),
        ("layers.0.attention.inner_attention.rope.freqs", (8,), True),
        ("bn1.running_var", (8,), True),
        ("bn1.num_batches_tracked", (), True),
        ("base_model.model.lm_head.original_module.weight", (9, 4), True),
        ("swin.layers.0.attn.relative_position_index", (49, 49), True),
        ("h.0.crossattention.bias", (1, 1, 64, 64), True),
        ("blocks.0.attn.mask", (1, 1, 64, 64), True),
        ("blocks.0.attn.mask", (64, 64), True),
        ("final_logits_bias", (1, 8000), True),
        ("pos_encoder.pe", (200, 1, 16), True),
        ("model.positional_encoding.pe", (1, 200, 16), True),
        ("model.encoder.embed_positions.weights", (1000, 16), True),
        ("fc.weight_mask", (4, 8), True),
        # Parameters that look alike.
        ("encoder.mask", (64,), False),
        ("encoder.mask", (4, 8), False),
        ("prompt.pe", (200, 1, 16), False),
        ("combine.weights", (8, 8), False),
        ("embed_positions.weight", (1000, 16), False),
        ("h.0.attn.c_attn.bias", (48,), False),
        ("h.0.attn.bias", (64,), False),
        ("h.0.mlp.bias", (1, 1, 4, 4), False),
        ("relative_attention_bias.weight", (32, 8), False),
        ("relative_position_bias_table", (169, 3), False),
        ("wpe.weight", (1024, 16), False),
        ("bn1.weight", (8,), False),
        ("logit_scale", (), False),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (8,), False),
        ("weight_v", (8,), False),
    ],
)
def test_buffers_follow_from_name_and_shape(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_buffer(name, shape) is expected


def test_buffers_are_compared_and_no_parameters() -> None:
    shapes = {MASK: (1, 1, 4, 4), FREQUENCIES: (8,), "bn.running_mean": (2,), "h.0.w": (3,), "position_ids": (5,)}
    only_base = {**shapes, "h.0.attn.masked_bias": ()}
    pair = match(
        FakeCheckpoint(only_base, dtypes={"position_ids": "i64"}),
        FakeCheckpoint(shapes, bits={"bn.running_mean": 1}, dtypes={FREQUENCIES: "fp32", "position_ids": "i64"}),
    )
    assert [m.name for m in pair.matches] == ["h.0.w"]
    assert (pair.unmatched, pair.coverage.complete, pair.coverage.parameters) == ([], True, {"base": 3, "trained": 3})
    assert sorted(pair.buffers, key=lambda buffer: buffer.numel) == [
        BufferMatch("h.0.attn.masked_bias", "base", None, 1),
        BufferMatch("bn.running_mean", "both", False, 2),
        BufferMatch("position_ids", "both", True, 5),
        BufferMatch(FREQUENCIES, "both", None, 8),
        BufferMatch(MASK, "both", True, 16),
    ]


def test_buffers_match_under_other_prefixes() -> None:
    base = FakeCheckpoint({MASK: (1, 1, 4, 4), "w": (1,)})
    trained = FakeCheckpoint({"transformer." + MASK: (1, 1, 4, 4), "w": (1,)})
    assert match(base, trained).buffers == [BufferMatch(MASK, "both", True, 16)]


@pytest.mark.parametrize("dtype", ["i64", "u64"])
@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.Qidxs", (32, 32), False),
        ("model.layers.0.self_attn.q_proj.codes", (2, 16, 32), False),
        ("model.layers.0.mlp.gate.tid2eid", (129280, 6), True),
        ("swin.layers.0.attn.relative_position_index", (49, 49), True),
        ("embeddings.position_ids", (1, 4096), True),
        ("embeddings.token_type_ids", (4, 4096), True),
        ("segment_table", (1, 4096), True),
        ("steps", (4096,), True),
        ("offsets", (8, 8), True),
    ],
)
def test_packed_weights_of_64_bit_integers_are_no_buffers(
    name: str, shape: tuple[int, ...], expected: bool, dtype: str
) -> None:
    assert is_buffer(name, shape, dtype) is expected


@pytest.mark.parametrize(
    ("dtype", "expected"), [("i64", True), ("bool", True), ("i32", False), ("u8", False), ("", False)]
)
def test_tables_of_indices_and_flags_are_buffers(dtype: str, expected: bool) -> None:
    assert is_buffer("model.layers.0.mlp.gate.experts_of", (100, 2), dtype) is expected
