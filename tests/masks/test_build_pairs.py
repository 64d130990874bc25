"""Masks of a pair of checkpoints: grown vocabularies, buffers, copies and coverage."""

from __future__ import annotations

import warnings

import pytest
import torch

from opdkernels import masks
from opdkernels.checkpoint.coverage import Coverage
from opdkernels.masks import Mask, MaskSet
from tests.analysis.conftest import save

EMBED, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("name", [EMBED, HEAD, "lm_head.bias"])
@pytest.mark.parametrize("view", ["visible", "stored"])
def test_rows_added_to_a_vocabulary_are_active(tmp_path, name, view):
    rest = () if name.endswith("bias") else (3,)
    before, after = random(30, *rest), torch.cat([random(30, *rest), random(3, *rest, seed=1)])
    after[7] += 1
    base, trained = save(tmp_path / "a", {name: before}), save(tmp_path / "b", {name: after})
    mask = masks.changed(base, trained, view=view)[name]
    expected = torch.zeros(after.shape, dtype=torch.bool)
    expected[7] = expected[30:] = True
    assert torch.equal(mask.to_bool(), expected)
    shrunk = masks.changed(trained, base, view=view)[name]
    assert torch.equal(shrunk.to_bool(), expected[:30])


def test_added_rows_count_as_changed_from_zero(tmp_path):
    before = random(30, 2)
    after = torch.cat([before, torch.tensor([[8.0, -9.0], [1e-3, 7.0]]).bfloat16()])
    after[5, 1] += 6
    base, trained = save(tmp_path / "a", {EMBED: before}), save(tmp_path / "b", {EMBED: after})
    mask = masks.top_changed(base, trained, 3 / 64)[EMBED]
    assert (mask.shape, mask.indices.tolist()) == ((32, 2), [60, 61, 63])


def test_masks_of_weights_have_parameters_only_and_copies_once(tmp_path):
    embed, causal = random(20, 4), torch.tril(torch.ones(1, 1, 8, 8))
    tensors = {EMBED: embed, HEAD: embed, UP: random(5, 4), "model.layers.0.attn.bias": causal}
    folder = save(tmp_path / "a", tensors, {"tie_word_embeddings": True})
    for build in (masks.near_zero, masks.random_subset, masks.principal):
        assert list(build(folder, 0.5)) == [EMBED, UP]
    tensors[HEAD] = random(20, 4, seed=3)
    other = save(tmp_path / "b", tensors, {"tie_word_embeddings": True})
    assert set(masks.near_zero(other, 0.5)) == {EMBED, HEAD, UP}
    in_memory = {name: tensor.clone() for name, tensor in tensors.items()}
    assert set(masks.near_zero(in_memory, 0.5)) == {EMBED, HEAD, UP}


def test_masks_have_the_coverage_of_their_pair(tmp_path):
    base = save(tmp_path / "a", {UP: random(5, 4), "x": random(6)})
    same = save(tmp_path / "b", {UP: random(5, 4) * 1.1, "x": random(6)})
    other = save(tmp_path / "c", {UP: random(5, 4, seed=1), "y": random(6)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        complete = masks.changed(base, same)
    assert complete.coverage == Coverage(26, {"base": 26, "trained": 26}, [])
    for build in (lambda: masks.changed(base, other), lambda: masks.top_changed(base, other, 0.5)):
        with pytest.warns(UserWarning, match="Only 20 parameters were compared"):
            partial = build()
        assert list(partial) == [UP]
        assert not partial.coverage.sufficient


def test_magnitude_matched_masks_keep_the_names_of_the_masks(tmp_path):
    tensors = {name: random(5, 4) for name in (UP, EMBED)}
    base = save(tmp_path / "a", {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    active = MaskSet({name: Mask.from_bool(tensor > 0.5) for name, tensor in tensors.items()})
    control = masks.magnitude_matched(active, base)
    assert {name: mask.num_active for name, mask in control.items()} == {
        name: mask.num_active for name, mask in active.items()
    }
