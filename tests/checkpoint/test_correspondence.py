"""Two sets of names and shapes: renamings of transformers, prefixes of any kind, and hostile names."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdkernels.checkpoint import conversions
from opdkernels.checkpoint.conversions import expert_layout, model_types_of, renamer
from opdkernels.checkpoint.correspondence import match_tensors
from opdkernels.checkpoint.names import canonical_name

VIT = {"architectures": ["ViTForImageClassification"], "model_type": "vit"}
VIT_LAYOUTS = [  # transformers 4 and 5
    {
        "vit.encoder.layer.0.attention.attention.query.weight": (4, 4),
        "vit.encoder.layer.0.attention.attention.value.weight": (4, 4),
        "vit.encoder.layer.0.output.dense.weight": (4, 8),
        "vit.layernorm.weight": (4,),
    },
    {
        "vit.layers.0.attention.q_proj.weight": (4, 4),
        "vit.layers.0.attention.v_proj.weight": (4, 4),
        "vit.layers.0.mlp.fc2.weight": (4, 8),
        "vit.layernorm.weight": (4,),
    },
]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_names_of_transformers_4_match_those_of_transformers_5(order: tuple[int, int]) -> None:
    pytest.importorskip("transformers.conversion_mapping")
    first, second = (VIT_LAYOUTS[i] for i in order)
    result = match_tensors(first, second, model_types=model_types_of(VIT))
    assert {(name, other) for name, other, _ in result.pairs} == set(zip(first, second, strict=True))


def test_without_transformers_names_are_canonical_and_nothing_is_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    conversions._transforms.cache_clear()
    for name in ("transformers", "transformers.conversion_mapping"):
        monkeypatch.setitem(sys.modules, name, None)
    assert renamer(["ViTModel"])("module.model.layers.0.attention.query") == "layers.0.attention.query"
    conversions._transforms.cache_clear()


@pytest.mark.parametrize("prefix", ["actor.", "policy.actor_module.", "a.b.c.d."])
def test_one_prefix_of_any_kind_is_removed(prefix: str) -> None:
    shapes = {f"layers.{i}.up": (i + 1, 2) for i in range(3)} | {"model.embed.weight": (9, 2)}
    wrapped = {prefix + name: shape for name, shape in shapes.items()}
    for first, second in ((shapes, wrapped), (wrapped, shapes)):
        pairs = match_tensors(first, second).pairs
        assert {(a.removeprefix(prefix), b.removeprefix(prefix)) for a, b, _ in pairs} == {(n, n) for n in shapes}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # Two models in one file; few of the names; other shapes; encoder against decoder.
        ({"a.x": (2,), "b.x": (2,)}, {"x": (2,)}),
        ({"a.x": (2,)}, {"x": (2,), "y": (3,)}),
        ({"a.x": (2,)}, {"x": (3,)}),
        ({"encoder.layers.0.x": (2,)}, {"decoder.layers.0.x": (2,)}),
    ],
)
def test_a_prefix_of_something_else_is_kept(first: dict, second: dict) -> None:
    assert match_tensors(first, second).pairs == match_tensors(second, first).pairs == []


TOKENS = st.sampled_from(
    [
        *("model", "module", "base_layer", "modules_to_save", "default", "parametrizations", "weight", "original0"),
        *("gamma", "norm", "experts", "0", "w1", "qkv_proj", "q_proj", "lm_head", "actor", "\x1b", "é", ""),
    ]
)
NAMES = st.lists(TOKENS, max_size=7).map(".".join)
SETS = st.dictionaries(NAMES, st.lists(st.integers(0, 3), max_size=3).map(tuple), max_size=8)


@settings(max_examples=300, deadline=None)
@given(SETS, SETS, st.sampled_from([[], ["gpt_oss"], ["qwen3_moe"]]))
def test_each_name_is_used_once_and_matching_is_symmetric(first: dict, second: dict, model_types: list[str]) -> None:
    result = match_tensors(first, second, model_types=model_types)
    names = [name for name, _, _ in result.pairs]
    others = [other for _, other, _ in result.pairs]
    assert len(set(names)) == len(names)
    assert len(set(others)) == len(others)
    assert not {part.name for part in result.parts}.intersection(names)
    assert not {part.other for part in result.parts}.intersection(others)
    swapped = match_tensors(second, first, model_types=model_types)
    assert {(a, b) for a, b, _ in result.pairs} == {(b, a) for a, b, _ in swapped.pairs}
    assert {(p.name, p.other, p.start, p.other_start) for p in result.parts} == {
        (p.other, p.name, p.other_start, p.start) for p in swapped.parts
    }


@given(NAMES)
def test_canonical_names_are_stable(name: str) -> None:
    assert canonical_name(canonical_name(name)) == canonical_name(name)


@pytest.mark.parametrize(
    ("model_types", "layout"),
    [
        (["qwen3_moe"], "rows"),
        (["gpt_oss", "gpt_oss"], "interleaved"),
        (["llama4", "llama4_text"], "transposed"),
        (["gpt_oss", "qwen3_moe"], ""),
        (["llama"], ""),
        ([], ""),
    ],
)
def test_the_layout_of_experts_follows_from_the_model_type(model_types: list[str], layout: str) -> None:
    assert expert_layout(model_types) == layout


@pytest.mark.parametrize(("model_type", "num_parts"), [("gpt_oss", 0), ("qwen3_moe", 4)])
def test_interleaved_rows_of_gate_and_up_are_no_parts(model_type: str, num_parts: int) -> None:
    stem = "model.layers.0.mlp.experts"
    split = {f"{stem}.{expert}.{part}_proj.weight": (3, 4) for expert in range(2) for part in ("gate", "up")}
    result = match_tensors({f"{stem}.gate_up_proj": (2, 6, 4)}, split, model_types=[model_type])
    assert len(result.parts) == num_parts
    assert ("are interleaved; split them" in result.reasons.get(f"{stem}.gate_up_proj", "")) == (not num_parts)


@pytest.mark.parametrize("model_type", ["sarvam_moe", "granitemoe", "exaone_moe", "jamba"])
def test_the_layout_of_other_experts_is_that_of_transformers(model_type: str) -> None:
    mapping = pytest.importorskip("transformers.conversion_mapping")
    transforms = mapping.get_checkpoint_conversion_mapping(model_type) or []
    merges = any(
        type(operation).__name__ == "MergeModulelist" for t in transforms for operation in getattr(t, "operations", ())
    )
    assert expert_layout([model_type]) == ("rows" if merges else "")
