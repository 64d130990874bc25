"""How much of each side a comparison covers, and what follows from it."""

from __future__ import annotations

import pytest

from opdkernels.checkpoint.coverage import Coverage, coverage_sentence
from opdkernels.checkpoint.match import match
from tests.checkpoint.conftest import FakeCheckpoint


@pytest.mark.parametrize(
    ("base", "trained", "compared", "parameters", "sufficient"),
    [
        ({"a": (100,)}, {"a": (100,)}, 100, (100, 100), True),
        ({"a": (95,)}, {"a": (95,), "v_head": (5,)}, 95, (95, 100), True),
        ({"a": (90,)}, {"a": (90,), "v_head": (11,)}, 90, (90, 101), False),
        ({"a": (90,), "b": (11,)}, {"a": (90,)}, 90, (101, 90), False),
        # On both sides, however small: it may be one tensor under two names.
        ({"a": (990,), "b": (5,)}, {"a": (990,), "c": (5,)}, 990, (995, 995), False),
        ({"a": (990,), "b": (5,)}, {"a": (990,), "b": (6,)}, 990, (995, 996), False),
        ({"wte.weight": (95, 2)}, {"wte.weight": (100, 2)}, 190, (190, 200), True),
    ],
)
def test_parameters_compared_over_those_of_each_side(base, trained, compared, parameters, sufficient):
    for first, second, counts in ((base, trained, parameters), (trained, base, parameters[::-1])):
        coverage = match(FakeCheckpoint(first), FakeCheckpoint(second)).coverage
        assert coverage.compared == compared
        assert coverage.parameters == dict(zip(("base", "trained"), counts, strict=True))
        assert coverage.sufficient is sufficient
        assert coverage.complete is (first == second)
        sentence = coverage_sentence(coverage.to_dict())
        assert sentence.startswith("Only ") is not sufficient
        assert sentence.startswith("All ") is coverage.complete


def test_a_missing_shard_is_not_complete():
    shard = {"b": "model-00002-of-00002.safetensors"}
    coverage = match(FakeCheckpoint({"a": (9,)}, missing=shard), FakeCheckpoint({"a": (9,)})).coverage
    assert (coverage.complete, coverage.uncompared) == (False, ["base"])


def test_tensors_without_coordinates_are_compared_completely():
    assert Coverage(0, {"base": 0, "trained": 0}).sufficient
    assert not Coverage(0, {"base": 0, "trained": 1}, ["trained"]).sufficient
