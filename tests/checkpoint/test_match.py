"""Matching: every coordinate at most once, everything else listed with the reason."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdkernels.checkpoint.match import Pair, match, open_pair
from opdkernels.errors import InputError
from tests.checkpoint.conftest import FakeCheckpoint

Shapes = dict[str, tuple[int, ...]]


def ranges(pair: Pair) -> set[tuple[str, int, str, int, int]]:
    return {(m.base.name, m.base_start, m.trained.name, m.trained_start, m.numel) for m in pair.matches}


def only(pair: Pair, kind: str) -> list[tuple[str, str]]:
    return [(u.side, u.name) for u in pair.unmatched if u.kind == kind]


def test_equal_names_match_in_the_order_of_the_base() -> None:
    shapes: Shapes = {"z": (2, 3), "a": (4,), "m": ()}
    pair = match(FakeCheckpoint(shapes), FakeCheckpoint(dict(reversed(shapes.items()))))
    assert [(m.name, m.match_kind, m.numel) for m in pair.matches] == [
        ("z", "exact", 6),
        ("a", "exact", 4),
        ("m", "exact", 1),
    ]
    assert (pair.unmatched, pair.tied, pair.notes, pair.nbytes) == ([], [], [], 2 * 2 * 11)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("model.layers.0.q_proj.weight", "model.language_model.layers.0.q_proj.weight"),
        ("model.layers.0.q_proj.weight", "language_model.model.layers.0.q_proj.weight"),
        ("visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"),
        ("h.0.ln_1.weight", "transformer.h.0.ln_1.weight"),
        ("layers.0._fsdp_wrapped_module.w", "module.layers.0.w"),
        ("model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
    ],
)
def test_names_match_without_wrapper_prefixes(name: str, other: str) -> None:
    pair = match(FakeCheckpoint({name: (2, 2)}), FakeCheckpoint({other: (2, 2)}))
    assert [(m.name, m.trained_name, m.match_kind) for m in pair.matches] == [(name, other, "prefix")]
    assert any(name in note and other in note for note in pair.notes)


@pytest.mark.parametrize("name", ["model.layers.0._flat_param", "_fsdp_wrapped_module.flat_param"])
def test_flat_parameters_of_fsdp1_are_named_in_a_note(name: str) -> None:
    flat = match(FakeCheckpoint({name: (12,)}), FakeCheckpoint({name: (12,)}))
    assert [note for note in flat.notes if name in note and "full state dict" in note]
    assert match(FakeCheckpoint({"flat_params": (12,)}), FakeCheckpoint({"flat_params": (12,)})).notes == []


def test_an_equal_name_takes_precedence_over_a_prefix_match() -> None:
    pair = match(FakeCheckpoint({"model.w": (2,)}), FakeCheckpoint({"language_model.w": (2,), "model.w": (2,)}))
    assert ranges(pair) == {("model.w", 0, "model.w", 0, 2)}
    assert only(pair, "missing") == [("trained", "language_model.w")]


def test_an_ambiguous_prefix_match_is_an_error_that_names_the_candidates() -> None:
    with pytest.raises(InputError) as caught:
        match(
            FakeCheckpoint({"model.w": (2,)}),
            FakeCheckpoint({"language_model.w": (2,), "transformer.w\x1b": (2,), "w": (2,)}),
        )
    message = str(caught.value)
    assert message.isprintable()
    assert all(name in message for name in ("model.w", "language_model.w", "w is ambiguous", "rename"))


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(InputError, match=r"no tensor in common \(a against b\); give"):
        match(FakeCheckpoint({"a": (2,)}), FakeCheckpoint({"b": (2,)}))
    with pytest.raises(InputError, match=r"a: shape \[2\].*\[3\]"):
        match(FakeCheckpoint({"a": (2,)}), FakeCheckpoint({"a": (3,)}))


@pytest.mark.parametrize(
    "name",
    [
        *("model.embed_tokens.weight", "wte.weight", "lm_head.weight", "lm_head.bias"),
        *("cls.predictions.bias", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
        *("decoder.weight", "decoder.bias", "model.language_model.embed_tokens_per_layer.weight"),
        *("backbone.embeddings.weight", "backbone.embedding.weight", "embeddings.weight"),  # Mamba
        *("rwkv.embeddings.weight", "emb.weight", "transformer.embeddings.weight"),  # RWKV, XLM
        *("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight", "vocab_projector.bias"),
        *("shared.weight", "encoder.embed_tokens.weight", "gpt_neox.embed_in.weight", "embed_out.weight"),
        *("generator_lm_head.weight", "transformer.output_layer.weight"),  # ELECTRA, ChatGLM
    ],
)
def test_a_resized_vocabulary_is_compared_on_the_common_rows(name: str) -> None:
    rest = () if name.endswith("bias") else (4,)
    small, large = FakeCheckpoint({name: (100, *rest)}), FakeCheckpoint({name: (104, *rest)})
    width = math.prod(rest)
    for a, b, side in ((small, large, "trained"), (large, small, "base")):
        pair = match(a, b)
        (result,) = pair.matches
        assert (result.match_kind, result.shape, result.numel) == ("common rows", (100, *rest), 100 * width)
        (added,) = pair.unmatched
        assert (added.side, added.kind, added.shape, added.numel) == (side, "rows", (4, *rest), 4 * width)
        assert "4 rows beyond the vocabulary of 100" in added.reason


@pytest.mark.parametrize(
    "name",
    [
        *("embeddings.position_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"),
        *("vocab_transform.weight", "vision_model.embeddings.weight", "layers.0.embedding.weight", "classifier.weight"),
    ],
)
def test_tensors_without_a_row_per_token_are_not_compared_in_part(name: str) -> None:
    pair = match(
        FakeCheckpoint({name: (100, 4), "x": (2,)}),
        FakeCheckpoint({name: (104, 4), "x": (2,)}),
    )
    assert [result.name for result in pair.matches] == ["x"]


@pytest.mark.parametrize(
    ("name", "a", "b", "says"),
    [
        ("h.0.mlp.c_fc.weight", (4, 8), (8, 4), "it fits transposed"),
        ("layers.0.q_proj.weight", (4, 8), (5, 8), "shape [4, 8] in the base against [5, 8]"),
        ("wpe.weight", (100, 4), (104, 4), "shape [100, 4]"),
        ("model.embed_tokens.weight", (100, 4), (104, 8), "shape [100, 4]"),
        ("model.embed_tokens.weight", (0, 4), (104, 4), "shape [0, 4]"),
        ("visual.embed_tokens.weight", (100, 4), (104, 4), "shape [100, 4]"),
        ("w", (), (1,), "shape [] in the base against [1]"),
    ],
)
def test_shape_mismatches_are_listed_on_both_sides(
    name: str, a: tuple[int, ...], b: tuple[int, ...], says: str
) -> None:
    pair = match(FakeCheckpoint({name: a, "x": (1,)}), FakeCheckpoint({name: b, "x": (1,)}))
    assert [(u.side, u.name, u.shape) for u in pair.unmatched] == [("base", name, a), ("trained", name, b)]
    assert all(says in u.reason and u.kind == "shape" for u in pair.unmatched)


def test_dtypes_without_a_delta_are_listed_and_mixed_floats_are_noted() -> None:
    shapes: Shapes = {"w": (2,), "token_map": (3,)}
    a = FakeCheckpoint(shapes, dtypes={"token_map": "i32", "w": "fp32"})
    pair = match(a, FakeCheckpoint(shapes, dtypes={"token_map": "i32"}))
    assert only(pair, "dtype") == [("base", "token_map"), ("trained", "token_map")]
    assert pair.notes == ["1 tensors are fp32 in the base and bf16 in the trained checkpoint"]
    assert pair.nbytes == 2 * (4 + 2)


@pytest.mark.parametrize("integers", ["i8", "u8", "i32"])
def test_integers_against_floating_values_are_rejected_by_name(integers: str) -> None:
    shapes: Shapes = {"model.up.codes": (2, 2), "x": (1,)}
    a, b = FakeCheckpoint(shapes, path="a"), FakeCheckpoint({"up.codes": (2, 1)}, dtypes={"up.codes": integers})
    for first, second in ((a, b), (b, a)):
        with pytest.raises(InputError, match=rf"up.codes is {integers} in fake and bf16 .* dequantise"):
            match(first, second)


def test_tensors_of_a_missing_shard_are_listed_on_both_sides() -> None:
    a = FakeCheckpoint({"x": (1,)}, missing={"model.w": "model-00002-of-00002.safetensors"})
    pair = match(a, FakeCheckpoint({"x": (1,), "w": (2,)}))
    assert only(pair, "shard") == [("base", "model.w"), ("trained", "w")]
    assert all("model-00002-of-00002.safetensors" in u.reason for u in pair.unmatched)


def test_read_returns_the_same_range_of_both_sides(tmp_path: Path) -> None:
    a = {
        "model.layers.0.self_attn.qkv_proj.weight": torch.arange(24.0).reshape(8, 3),
        "model.embed_tokens.weight": torch.arange(15.0).reshape(5, 3),
    }
    q, k, v = a["model.layers.0.self_attn.qkv_proj.weight"].split([4, 2, 2])
    parts = zip("qkv", (q, k, v), strict=True)
    b = {f"model.layers.0.self_attn.{n}_proj.weight": part.clone() + 1 for n, part in parts}
    b["model.embed_tokens.weight"] = torch.cat([a["model.embed_tokens.weight"], torch.zeros(2, 3)])
    for name, tensors in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        safetensors.torch.save_file(tensors, tmp_path / name / "model.safetensors")
    for first, second in (("a", "b"), ("b", "a")):
        pair = open_pair(tmp_path / first, tmp_path / second, io="read")
        assert len(pair.matches) == 4
        for m in pair.matches:
            for start, stop in [(0, m.numel), (1, m.numel - 1), (m.numel, m.numel)]:
                base, trained = pair.read(m, start, stop)
                # The parts were written with 1 added to the fused tensor; the embedding unchanged.
                expected = 0 if m.match_kind != "fused" else 1 if first == "a" else -1
                assert (trained - base == expected).all()
        pair.check()
        pair.close()


def test_a_failed_open_leaves_no_file_open(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    safetensors.torch.save_file({"v": torch.ones(2)}, tmp_path / "b.safetensors")
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("the system does not list open files")
    before = len(list(descriptors.iterdir()))
    for other in ("b.safetensors", "nothing"):
        with pytest.raises(InputError):
            open_pair(tmp_path / "a.safetensors", tmp_path / other)
    assert len(list(descriptors.iterdir())) == before


# Any mixture of names that may be aliases, fused, split, tied, resized or absent.
DIMS = st.sampled_from([0, 1, 2, 3, 4])
NAMES = [
    *("lm_head.weight", "model.embed_tokens.weight", "embed_tokens.weight", "model.norm.weight", "norm.weight"),
    *(f"model.layers.0.self_attn.{n}.weight" for n in ("qkv_proj", "q_proj", "k_proj", "v_proj")),
    *(f"layers.0.self_attn.{n}.weight" for n in ("qkv_proj", "q_proj", "k_proj")),
    *(f"model.layers.0.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj", "0.gate_proj.weight")),
    *("model.layers.0.mlp.experts.0.up_proj.weight", "model.layers.0.mlp.experts.0.down_proj.weight"),
    *("model.layers.0.mlp.experts.0.gate_up_proj.weight", "model.layers.0.mlp.gate_up_proj.bias", "i"),
]


@st.composite
def arbitrary_checkpoints(draw: st.DrawFn) -> FakeCheckpoint:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    shapes: Shapes = {}
    for name in names:
        dims = 3 if "experts." in name and not name.endswith("weight") else 1 if name.endswith("bias") else 2
        shapes[name] = tuple(draw(st.tuples(*[DIMS] * dims)))
    tie = draw(st.sampled_from([{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}]))
    plain = [name for name in names[1:] if name != "i"]  # of one dtype
    same = [name for name in plain if shapes[name] == shapes[plain[0]]]
    aliases = dict.fromkeys(same[1:], same[0]) if same and draw(st.booleans()) else {}
    dtypes = {"i": "i32", **({names[0]: "fp32"} if names else {})}
    return FakeCheckpoint(shapes, config=tie, aliases=aliases, dtypes=dtypes)


def draw_layout(draw: st.DrawFn, layouts: list[Shapes]) -> Shapes:
    return draw(st.sampled_from([*layouts, {}]))


@st.composite
def saved_layouts(draw: st.DrawFn) -> FakeCheckpoint:
    """One model in the layouts of different programs: prefixes, fused or split, tied or not, vocabulary of 5 or 6."""
    prefix = draw(st.sampled_from(["model.", "", "model.language_model.", "language_model.model."]))
    rows, columns, experts = draw(st.sampled_from([5, 6])), 4, 3
    attn, mlp, moe = (f"{prefix}layers.0.{part}" for part in ("self_attn", "mlp", "block_sparse_moe"))
    qkv: Shapes = {f"{attn}.q_proj.weight": (4, 4), f"{attn}.k_proj.weight": (2, 4), f"{attn}.v_proj.weight": (2, 4)}
    fused: Shapes = {f"{mlp}.experts.gate_up_proj": (experts, 6, 4), f"{mlp}.experts.down_proj": (experts, 4, 3)}
    split: Shapes = {}
    mixtral: Shapes = {}
    halves: Shapes = {f"{mlp}.experts.down_proj": (experts, 4, 3)}
    for e in range(experts):
        split |= {f"{mlp}.experts.{e}.{n}_proj.weight": (3, 4) for n in ("gate", "up")}
        split[f"{mlp}.experts.{e}.down_proj.weight"] = (4, 3)
        mixtral |= {f"{moe}.experts.{e}.{n}.weight": (3, 4) for n in ("w3", "w1")}
        mixtral[f"{moe}.experts.{e}.w2.weight"] = (4, 3)
        halves[f"{mlp}.experts.{e}.gate_up_proj.weight"] = (6, 4)
    shapes: Shapes = {"x": (2,)}
    shapes |= draw_layout(draw, [qkv, {f"{attn}.qkv_proj.weight": (8, 4)}])
    shapes |= draw_layout(draw, [fused, split, mixtral, halves])
    shapes |= draw_layout(draw, [{f"{prefix}embed_tokens.weight": (rows, columns)}])
    shapes |= draw_layout(draw, [{"lm_head.weight": (rows, columns)}])
    for name in draw(st.lists(st.sampled_from(sorted(shapes)), max_size=1)):
        shapes[name] = shapes[name][::-1]
    names = draw(st.permutations(sorted(shapes)))
    tie = draw(st.sampled_from([{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}]))
    return FakeCheckpoint({name: shapes[name] for name in names}, config=tie)


PAIRS = st.one_of(arbitrary_checkpoints(), saved_layouts()), st.one_of(arbitrary_checkpoints(), saved_layouts())


def attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except InputError as error:
        message = str(error)
        if not message.isprintable():
            raise AssertionError(message) from error
        return None


@settings(max_examples=600, deadline=None)
@given(*PAIRS)
def test_every_coordinate_is_used_once_or_listed(a: FakeCheckpoint, b: FakeCheckpoint) -> None:
    pair = attempt(lambda: match(a, b))
    if pair is None:
        return
    for side, checkpoint in (("base", a), ("trained", b)):
        used: dict[str, list[tuple[int, int]]] = {name: [] for name in checkpoint.tensors}
        for m in pair.matches:
            info, start = (m.base, m.base_start) if side == "base" else (m.trained, m.trained_start)
            assert info is checkpoint.tensors[info.name]
            assert 0 <= start <= start + m.numel <= info.numel
            assert m.numel == math.prod(m.shape)
            used[info.name].append((start, start + m.numel))
        listed = {u.name for u in pair.unmatched if u.side == side}
        for name, spans in used.items():
            spans.sort()
            assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
            accounted = sum(stop - start for start, stop in spans)
            accounted += sum(u.numel for u in pair.unmatched if u.side == side and u.name == name)
            assert accounted == checkpoint.tensors[name].numel or (name in pair.tied and not spans)
            assert spans or name in listed or name in pair.tied
    order = list(a.tensors)
    positions = [(order.index(m.base.name), m.base_start) for m in pair.matches]
    assert positions == sorted(positions)


@settings(max_examples=600, deadline=None)
@given(*PAIRS)
def test_matching_is_symmetric(a: FakeCheckpoint, b: FakeCheckpoint) -> None:
    one, other = attempt(lambda: match(a, b)), attempt(lambda: match(b, a))
    assert (one is None) == (other is None)
    if one is None:
        return
    assert ranges(one) == {(s, i, t, j, n) for t, j, s, i, n in ranges(other)}
    assert {m.match_kind for m in one.matches} == {m.match_kind for m in other.matches}
    assert set(one.tied) == set(other.tied)
    flipped = {"base": "trained", "trained": "base"}
    assert {(u.side, u.name, u.kind) for u in one.unmatched} == {
        (flipped[u.side], u.name, u.kind) for u in other.unmatched
    }


@given(st.one_of(arbitrary_checkpoints(), saved_layouts()))
def test_a_checkpoint_matches_itself_completely(a: FakeCheckpoint) -> None:
    pair = attempt(lambda: match(a, a))
    if pair is not None:
        assert all((m.name, m.match_kind) == (m.trained_name, "exact") for m in pair.matches)
        assert {u.kind for u in pair.unmatched} <= {"dtype"}
