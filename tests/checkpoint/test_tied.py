"""Tied tensors are counted once, independent of how each side stored them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opdkernels.checkpoint.match import match
from opdkernels.checkpoint.tied import copies, tie_word_embeddings
from tests.checkpoint.conftest import FakeCheckpoint

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BOTH = {EMBED: (9, 4), HEAD: (9, 4)}
LONE = {EMBED: (9, 4)}
YES, NO, SILENT = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {}


def match_both_ways(a: FakeCheckpoint, b: FakeCheckpoint) -> Any:
    """Matches a and b, and asserts that matching b and a gives the same."""
    one, other = match(a, b), match(b, a)
    assert [m.base.name for m in one.matches] == [m.trained.name for m in other.matches]
    assert (set(one.tied), len(one.unmatched)) == (set(other.tied), len(other.unmatched))
    return one


@pytest.mark.parametrize(("a", "b"), [(YES, YES), (YES, SILENT), (SILENT, SILENT)])
def test_two_heads_with_the_bits_of_the_embedding_are_counted_once(a: dict[str, Any], b: dict[str, Any]) -> None:
    pair = match_both_ways(FakeCheckpoint(BOTH, config=a), FakeCheckpoint(BOTH, config=b))
    assert ([m.name for m in pair.matches], pair.tied, pair.unmatched) == ([EMBED], [HEAD], [])


@pytest.mark.parametrize(("a", "b"), [(NO, NO), (YES, NO), (NO, SILENT)])
def test_two_heads_that_may_be_untied_are_compared(a: dict[str, Any], b: dict[str, Any]) -> None:
    pair = match_both_ways(FakeCheckpoint(BOTH, config=a), FakeCheckpoint(BOTH, config=b))
    assert ([m.name for m in pair.matches], pair.tied, pair.unmatched) == ([EMBED, HEAD], [], [])
    assert any("not" in note and HEAD in note for note in pair.notes) == (YES in (a, b))


@pytest.mark.parametrize(("a", "b"), [(YES, YES), (YES, SILENT), (SILENT, SILENT)])
@pytest.mark.parametrize("differing", ["a", "b", "both"])
def test_a_head_that_differs_from_its_embedding_is_a_parameter(
    a: dict[str, Any], b: dict[str, Any], differing: str
) -> None:
    bits = {side: {HEAD: 1} if differing in (side, "both") else {} for side in "ab"}
    pair = match_both_ways(
        FakeCheckpoint(BOTH, config=a, bits=bits["a"]), FakeCheckpoint(BOTH, config=b, bits=bits["b"])
    )
    assert ([m.name for m in pair.matches], pair.tied, pair.unmatched) == ([EMBED, HEAD], [], [])
    assert any("differ" in note and HEAD in note for note in pair.notes) == (YES in (a, b))


@pytest.mark.parametrize("config", [YES, SILENT])
def test_a_single_head_that_differs_from_its_embedding_is_excluded(config: dict[str, Any]) -> None:
    pair = match_both_ways(FakeCheckpoint(LONE, config=config), FakeCheckpoint(BOTH, config=config, bits={HEAD: 1}))
    assert ([m.name for m in pair.matches], pair.tied) == ([EMBED], [])
    assert [(u.side, u.name, u.kind) for u in pair.unmatched] == [("trained", HEAD, "untied")]
    assert any("differ" in note and HEAD in note for note in pair.notes)
    assert pair.coverage.parameters == {"base": 36, "trained": 72}


SHARED, ENCODER, DECODER = "shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"


@pytest.mark.parametrize("tie", [YES, SILENT])
@pytest.mark.parametrize("first", [[SHARED], [SHARED, ENCODER, DECODER, HEAD], [ENCODER, DECODER], [ENCODER], [HEAD]])
@pytest.mark.parametrize("second", [[SHARED], [ENCODER, SHARED, DECODER, HEAD], [DECODER]])
def test_one_embedding_under_several_names_is_counted_once(
    first: list[str], second: list[str], tie: dict[str, Any]
) -> None:
    x = {"x": (3,)}
    pair = match_both_ways(
        FakeCheckpoint({**dict.fromkeys(first, (9, 4)), **x}, config=tie),
        FakeCheckpoint({**dict.fromkeys(second, (9, 4)), **x}, config=tie),
    )
    assert [m.numel for m in pair.matches if m.name != "x"] == [36]
    assert (pair.unmatched, pair.coverage.parameters) == ([], {"base": 39, "trained": 39})
    assert set(pair.tied) | {pair.matches[0].name, pair.matches[0].trained_name} >= {*first, *second} - {"x"}


def test_an_embedding_that_was_trained_apart_is_compared_and_its_copies_are_not() -> None:
    names = dict.fromkeys([SHARED, ENCODER, DECODER], (9, 4))
    pair = match_both_ways(FakeCheckpoint(names), FakeCheckpoint(names, bits={ENCODER: 1}))
    assert ([m.name for m in pair.matches], pair.tied, pair.unmatched) == ([SHARED, ENCODER], [DECODER], [])


def test_copies_of_one_checkpoint() -> None:
    names = dict.fromkeys([ENCODER, SHARED, DECODER, HEAD], (9, 4))
    assert copies(FakeCheckpoint(names, config=YES)) == dict.fromkeys([ENCODER, DECODER, HEAD], SHARED)
    assert copies(FakeCheckpoint(BOTH, config=NO)) == {}
    assert copies(FakeCheckpoint(BOTH, config=YES, bits={HEAD: 1})) == {}


@pytest.mark.parametrize(("with_head", "without"), [(YES, YES), (SILENT, YES), (YES, SILENT), (SILENT, SILENT)])
def test_a_single_head_is_a_copy_if_the_other_side_is_tied(with_head: dict[str, Any], without: dict[str, Any]) -> None:
    pair = match_both_ways(FakeCheckpoint(LONE, config=without), FakeCheckpoint(BOTH, config=with_head))
    assert ([m.name for m in pair.matches], pair.tied, pair.unmatched) == ([EMBED], [HEAD], [])


@pytest.mark.parametrize(("with_head", "without"), [(NO, YES), (NO, SILENT), (SILENT, NO), (YES, NO)])
def test_a_single_untied_head_is_listed(with_head: dict[str, Any], without: dict[str, Any]) -> None:
    pair = match_both_ways(FakeCheckpoint(LONE, config=without), FakeCheckpoint(BOTH, config=with_head))
    assert ([m.name for m in pair.matches], pair.tied) == ([EMBED], [])
    (head,) = pair.unmatched
    assert (head.side, head.name) == ("trained", HEAD)
    assert ("is tied to" in head.reason) == (without is not NO)


def test_a_resized_vocabulary_may_be_tied() -> None:
    pair = match_both_ways(
        FakeCheckpoint(LONE, config=YES), FakeCheckpoint({EMBED: (12, 4), HEAD: (12, 4)}, config=YES)
    )
    assert ([m.match_kind for m in pair.matches], pair.tied) == (["common rows"], [HEAD])
    assert [u.kind for u in pair.unmatched] == ["rows"]


def test_an_unpaired_embedding_and_head_are_compared() -> None:
    pair = match_both_ways(FakeCheckpoint({EMBED: (9, 4)}, config=YES), FakeCheckpoint({HEAD: (9, 4)}, config=YES))
    assert [(m.base.name, m.trained.name, m.match_kind) for m in pair.matches] == [(EMBED, HEAD, "tied")]
    pair = match_both_ways(FakeCheckpoint(BOTH, config=YES), FakeCheckpoint({HEAD: (9, 4)}, config=YES))
    assert ([m.name for m in pair.matches], pair.tied, pair.unmatched) == ([HEAD], [EMBED], [])


def test_tensors_that_share_a_storage_are_counted_once() -> None:
    shared = FakeCheckpoint(BOTH, aliases={HEAD: EMBED})
    for other in (shared, FakeCheckpoint(LONE), FakeCheckpoint(BOTH, config=YES)):
        pair = match_both_ways(shared, other)
        assert ([m.name for m in pair.matches], pair.tied, pair.unmatched) == ([EMBED], [HEAD], [])


def test_a_shared_storage_has_the_name_that_the_other_side_stored() -> None:
    names = {"shared.weight": (9, 4), "encoder.embed_tokens.weight": (9, 4), "decoder.embed_tokens.weight": (9, 4)}
    first, *rest = names
    shared = FakeCheckpoint(names, aliases=dict.fromkeys(rest, first))
    pair = match_both_ways(shared, FakeCheckpoint({rest[1]: (9, 4)}))
    assert ([m.name for m in pair.matches], set(pair.tied)) == ([rest[1]], {first, rest[0]})


def test_a_tensor_that_only_one_side_shares_is_listed_with_the_reason() -> None:
    names = {"a.weight": (2, 2), "b.weight": (2, 2)}
    pair = match_both_ways(FakeCheckpoint(names, aliases={"b.weight": "a.weight"}), FakeCheckpoint(names))
    (entry,) = pair.unmatched
    assert (entry.side, entry.name) == ("trained", "b.weight")
    assert "holds it as one with a.weight" in entry.reason


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        (YES, True),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
        ({"tie_word_embeddings": "yes", "text_config": []}, None),
    ],
)
def test_tie_word_embeddings_may_be_absent_or_nested(config: dict[str, Any], expected: bool | None) -> None:
    assert tie_word_embeddings(config) is expected


@pytest.mark.parametrize(
    "head", ["cls.predictions.decoder.weight", "proj_out.weight", "lm_head.decoder.weight", "out.w"]
)
def test_a_copy_that_one_side_stores_is_counted_once(head: str) -> None:
    embedding = "bert.embeddings.word_embeddings.weight"
    names = {embedding: (9, 4), "lm_head.dense.weight": (4, 4)}
    ramp = RampCheckpoint({**names, head: (9, 4)})
    pair = match_both_ways(RampCheckpoint(names), ramp)
    assert ([m.name for m in pair.matches], pair.tied, pair.unmatched) == (list(names), [head], [])
    other = RampCheckpoint({**names, head: (9, 4)}, bits={head: 1})
    assert [u.name for u in match_both_ways(RampCheckpoint(names), other).unmatched] == [head]


@pytest.mark.parametrize(("kept", "extra"), [(EMBED, "b.weight"), ("layers.0.up.weight", "layers.1.up.weight")])
def test_constant_tensors_and_copied_layers_are_no_copies(kept: str, extra: str) -> None:
    kind = FakeCheckpoint if kept == EMBED else RampCheckpoint
    pair = match_both_ways(kind({kept: (4, 4)}), kind({kept: (4, 4), extra: (4, 4)}))
    assert ([u.name for u in pair.unmatched], pair.coverage.sufficient) == ([extra], False)


class RampCheckpoint(FakeCheckpoint):
    """Each tensor has the elements 0, 1, 2, ..., plus the value in `bits`."""

    def read_bits(self, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.arange(start, stop) + self.bits.get(name, 0)
