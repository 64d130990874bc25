"""Fused against split: parts are flat ranges of the fused tensor, checked against torch.split and torch.chunk."""

from __future__ import annotations

import pytest
import torch

from opdkernels.checkpoint.match import Match, match
from opdkernels.checkpoint.names import canonical_name
from tests.checkpoint.conftest import FakeCheckpoint

Q, K, V = 6, 2, 2
ATTN, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def as_checkpoint(tensors: dict[str, torch.Tensor]) -> FakeCheckpoint:
    return FakeCheckpoint({name: tuple(tensor.shape) for name, tensor in tensors.items()})


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def assert_ranges_are_equal(fused: dict[str, torch.Tensor], parts: dict[str, torch.Tensor]) -> list[Match]:
    """Asserts that every matched range has the same values on both sides, in both directions, and no tensor is left."""
    a, b = as_checkpoint(fused), as_checkpoint(parts)
    forward, backward = match(a, b), match(b, a)
    for pair, base, trained in ((forward, fused, parts), (backward, parts, fused)):
        assert not pair.unmatched
        for m in pair.matches:
            flat_base = base[m.base.name].reshape(-1)[m.base_start : m.base_start + m.numel]
            other = trained[m.trained.name].reshape(-1)[m.trained_start : m.trained_start + m.numel]
            assert torch.equal(flat_base, other), m.name
    names = set(parts) if len(parts) > len(fused) else set(fused)
    assert {m.name for m in forward.matches} == {m.name for m in backward.matches} == names
    return forward.matches


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_qkv_is_split_by_rows(prefix: str) -> None:
    weight, bias = numbered(Q + K + V, 5), numbered(Q + K + V)
    parts = {}
    for n, w, b in zip("qkv", weight.split([Q, K, V]), bias.split([Q, K, V]), strict=True):
        parts[f"{prefix}{ATTN}.{n}_proj.weight"], parts[f"{prefix}{ATTN}.{n}_proj.bias"] = w, b
    matches = assert_ranges_are_equal({f"{ATTN}.qkv_proj.weight": weight, f"{ATTN}.qkv_proj.bias": bias}, parts)
    assert [m.match_kind for m in matches] == ["fused"] * 6
    assert [m.shape for m in matches][:3] == [(Q, 5), (K, 5), (V, 5)]


def test_gate_up_is_split_in_halves() -> None:
    gate, up = numbered(8, 3).chunk(2)
    parts = {f"{MLP}.up_proj.weight": up, f"{MLP}.gate_proj.weight": gate}
    assert_ranges_are_equal({f"{MLP}.gate_up_proj.weight": numbered(8, 3)}, parts)


@pytest.mark.parametrize("mixtral", [False, True])
def test_3d_experts_are_split_by_expert(mixtral: bool) -> None:
    count, hidden, inner = 5, 3, 4
    fused, down = numbered(count, 2 * inner, hidden), numbered(count, hidden, inner)
    full = {f"{MLP}.experts.gate_up_proj": fused, f"{MLP}.experts.down_proj": down}
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    stem = "model.layers.0.block_sparse_moe" if mixtral else MLP
    parts = {}
    for expert in reversed(range(count)):
        for name, part in zip(names, (*fused[expert].chunk(2), down[expert]), strict=True):
            parts[f"{stem}.experts.{expert}.{name}.weight"] = part
    assert_ranges_are_equal(full, parts)


def test_experts_fused_one_by_one_are_matched() -> None:
    full = numbered(3, 8, 2)
    parts = {f"{MLP}.experts.{e}.gate_up_proj.weight": full[e] for e in range(3)}
    assert_ranges_are_equal({f"{MLP}.experts.gate_up_proj": full}, parts)


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"q_proj": (6, 5), "k_proj": (2, 5)}, "of which layers.0.self_attn.v_proj.weight is missing"),
        (
            {"q_proj": (6, 5), "k_proj": (2, 5), "v_proj": (3, 5)},
            "its shape [10, 5] is not the concatenation of its parts",
        ),
        (
            {"q_proj": (6, 4), "k_proj": (2, 4), "v_proj": (2, 4)},
            "its shape [10, 5] is not the concatenation of its parts",
        ),
        ({"q_proj": (6,), "k_proj": (2,), "v_proj": (2,)}, "its shape [10, 5] is not the concatenation of its parts"),
        ({"q_proj": (), "k_proj": (), "v_proj": ()}, "its shape [10, 5] is not the concatenation of its parts"),
    ],
)
def test_parts_of_wrong_shape_are_listed_with_the_reason(shapes: dict[str, tuple[int, ...]], says: str) -> None:
    full = FakeCheckpoint({f"{ATTN}.qkv_proj.weight": (10, 5), "x": (1,)})
    parts = FakeCheckpoint({**{f"{ATTN}.{name}.weight": shape for name, shape in shapes.items()}, "x": (1,)})
    pair = match(full, parts)
    assert [m.name for m in pair.matches] == ["x"]
    reasons = {u.name: u.reason for u in pair.unmatched}
    assert says in reasons[f"{ATTN}.qkv_proj.weight"]
    assert len(reasons) == 1 + len(shapes)


@pytest.mark.parametrize("shape", [(2**62, 0, 4), (2**62, 4, 4), (0, 4, 4)])
def test_a_header_with_a_huge_number_of_experts_costs_nothing(shape: tuple[int, ...]) -> None:
    full = FakeCheckpoint({f"{MLP}.experts.gate_up_proj": shape, "x": (1,)})
    pair = match(full, FakeCheckpoint({f"{MLP}.experts.0.gate_proj.weight": (2, 4), "x": (1,)}))
    assert [m.name for m in pair.matches] == ["x"]


@pytest.mark.parametrize("name", ["query_key_value", "c_attn"])
def test_tensors_not_concatenated_by_rows_are_not_split(name: str) -> None:
    shapes = {f"{ATTN}.{part}_proj.weight": (2, 6) for part in "qkv"}
    pair = match(FakeCheckpoint({f"{ATTN}.{name}.weight": (6, 6), "x": (1,)}), FakeCheckpoint({**shapes, "x": (1,)}))
    assert [m.name for m in pair.matches] == ["x"]


def test_canonical_names_of_experts_are_the_same_for_every_model_family() -> None:
    assert (
        canonical_name("model.layers.0.block_sparse_moe.experts.3.w2.weight")
        == "layers.0.mlp.experts.3.down_proj.weight"
    )
    assert canonical_name("layers.0.feed_forward.w2.weight") == "layers.0.feed_forward.w2.weight"
