"""A mask is the same however it is made and held, and refuses what is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdkernels.masks import Mask, MaskSet
from opdkernels.masks.mask import BLOCK

SIZES = (0, 1, 7, 8, 31, 1023, 2048, 2049, 70_001)


def flags_of(numel, density, seed=0):
    return torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < density


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 1.0])
def test_all_constructors_give_equal_masks(numel, density):
    flags = flags_of(numel, density)
    places = torch.nonzero(flags).view(-1)
    bits = torch.from_numpy(np.packbits(flags.numpy(), bitorder="little"))
    masks = [
        Mask.from_bool(flags),
        Mask.from_indices(places, (numel,)),
        Mask.from_indices(places.int(), (numel,)),
        Mask.from_bitmap(bits, (numel,)),
    ]
    for mask in masks:
        assert mask == masks[0]
        assert mask.digest == masks[0].digest
        assert mask.layout == masks[0].layout
        assert torch.equal(mask.to_bool(), flags)
        assert torch.equal(mask.indices.long(), places)
        assert (mask.num_active, mask.numel) == (len(places), numel)
        assert mask.density == (len(places) / numel if numel else 0)
        blocks = [int(flags[i : i + BLOCK].sum()) for i in range(0, numel, BLOCK)]
        assert mask.block_counts.tolist() == np.concatenate(([0], np.cumsum(blocks))).tolist()


def test_layout_is_the_smaller_one():
    sparse, dense = Mask.from_bool(flags_of(10_000, 0.02)), Mask.from_bool(flags_of(10_000, 0.2))
    assert (sparse.layout, dense.layout) == ("indices", "bitmap")
    assert sparse.nbytes == 4 * sparse.num_active
    assert dense.nbytes == 1250


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 300), st.floats(0, 1), st.integers(0, 10**6), st.data())
def test_flat_is_a_range_of_the_mask(numel, density, seed, data):
    flags = flags_of(numel, density, seed)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    shard = Mask.from_bool(flags).flat(start, stop)
    assert torch.equal(shard.to_bool(), flags[start:stop])
    assert shard.num_active == int(flags[start:stop].sum())
    assert shard == Mask.from_bool(flags[start:stop])


@pytest.mark.parametrize("numel", [1, 9, 1000])
@pytest.mark.parametrize("densities", [(0.3, 0.6), (0.01, 0.5), (0.0, 1.0), (0.01, 0.02)])
def test_operators_match_set_operations(numel, densities):
    a, b = (flags_of(numel, d, i).view(-1, 1) for i, d in enumerate(densities))
    one, other = Mask.from_bool(a), Mask.from_bool(b)
    for result, expected in (
        (one & other, a & b),
        (one | other, a | b),
        (one ^ other, a ^ b),
        (one - other, a & ~b),
        (~one, ~a),
    ):
        assert torch.equal(result.to_bool(), expected)
        assert result.shape == (numel, 1)


def test_digest_depends_on_shape_and_coordinates():
    flags = flags_of(60, 0.5)
    other = flags.clone()
    other[3] = ~other[3]
    masks = [Mask.from_bool(flags), Mask.from_bool(flags.view(6, 10)), Mask.from_bool(other)]
    assert len({mask.digest for mask in masks}) == 3
    assert masks[0] != masks[1]
    assert masks[0] != masks[2]


def test_invalid_masks_raise():
    for make, error, message in (
        (lambda: Mask.from_indices(torch.tensor([3, 1]), (5,)), ValueError, "index 1 comes after 3"),
        (lambda: Mask.from_indices(torch.tensor([1, 1]), (5,)), ValueError, "index 1 comes twice"),
        (lambda: Mask.from_indices(torch.tensor([0, 5]), (5,)), ValueError, "index 5 is outside of a tensor of 5"),
        (lambda: Mask.from_indices(torch.tensor([-1]), (5,)), ValueError, "index -1 is outside"),
        (lambda: Mask.from_indices(torch.tensor([0.0]), (5,)), TypeError, "give int32 or int64"),
        (lambda: Mask.from_indices(torch.tensor([[0]]), (5,)), TypeError, "one dimension"),
        (lambda: Mask.from_bool(torch.ones(4)), TypeError, "give a bool tensor"),
        (lambda: Mask.from_bitmap(torch.zeros(2, dtype=torch.uint8), (5,)), ValueError, r"uint8 \[1\]"),
        (lambda: Mask.from_bitmap(torch.tensor([32], dtype=torch.uint8), (5,)), ValueError, "beyond the last of 5"),
        (lambda: Mask.from_bool(flags_of(5, 0.5)) & Mask.from_bool(flags_of(6, 0.5)), ValueError, "do not combine"),
        (lambda: Mask.from_bool(flags_of(5, 0.5)).flat(2, 6), ValueError, "is not a range"),
    ):
        with pytest.raises(error, match=message):
            make()


def test_indices_beyond_two_to_the_31_are_int64():
    mask = Mask.from_indices(torch.tensor([5, 2**31, 2**31 + 7]), (2**31 + 9,))
    assert mask.indices.dtype == torch.int64
    assert mask.flat(2**31 - 1, 2**31 + 8).indices.tolist() == [1, 8]


@pytest.mark.parametrize(
    "build", [Mask.from_bool, lambda t: Mask.from_bitmap(t, (8,)), lambda t: Mask.from_indices(t, (8,))]
)
def test_values_that_are_no_dense_tensors_raise(build):
    for value, message in (
        ([True], "of type list; give a tensor"),
        (torch.ones(3, device="meta"), "on the meta device"),
        (torch.ones(3).to_sparse(), "of layout torch.sparse_coo"),
    ):
        with pytest.raises(TypeError, match=message):
            build(value)


def test_set_of_tensors_that_are_no_masks_raises():
    with pytest.raises(TypeError, match=r"the mask of w is of type Tensor; give a Mask, or bool tensors to from_bools"):
        MaskSet({"w": torch.ones(3, dtype=torch.bool)})
