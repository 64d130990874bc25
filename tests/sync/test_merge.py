"""A merged patch equals the application of both, in every mode of their tensors."""

from __future__ import annotations

import pytest
import torch

from opdkernels import InputError
from opdkernels.ops.patch import gather
from opdkernels.sync import ChangeTracker, Patch
from opdkernels.sync.tensor_patch import encode_positions
from tests.patch.conftest import some
from tests.sync.conftest import RUN, change, consecutive, copied, make_model, same


@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.3, 0.9])
def test_merged_patch_equals_two_applications(fraction):
    model = make_model()
    one_by_one, at_once = copied(model), copied(model)
    digests = ChangeTracker(model).digests
    first, second, third = consecutive(model, 3, fraction)
    after = digests
    for patch in (first, second, third):
        after = patch.apply_(one_by_one, after)
    merged = Patch.merge(Patch.merge(first, second), third)
    assert (merged.run, merged.base_version, merged.version) == (RUN, 0, 3)
    assert merged.apply_(at_once, digests) == after
    assert same(one_by_one, model)
    assert same(at_once, model)
    other_order = Patch.merge(first, Patch.merge(second, third))
    assert other_order.changed == merged.changed
    for a, b in zip(merged.flat(), other_order.flat(), strict=True):
        assert a[:3] == b[:3]
        assert (a[3] is None and b[3] is None) or torch.equal(a[3], b[3])
        assert same({"": a[4]}, {"": b[4]})


def test_merge_of_sparse_and_whole_tensors():
    for touched in ((True, False), (False, True), (True, True)):
        model = {"w": some((80_000,), torch.bfloat16, 0), "v": some((9000,), torch.float32, 1)}
        replica, tracker, patches = copied(model), ChangeTracker(model), []
        for seed, touch in enumerate(touched):
            change({"w": model["w"]}, seed + 5)
            model["v"][seed] = 1.0
            if touch:
                tracker.touch("w")
            patches.append(tracker.take())
        merged = Patch.merge(*patches)
        assert [tensor.mode for tensor in merged.tensors] == ["whole", "sparse"]
        merged.apply_(replica)
        assert same(replica, model)


def test_merge_keeps_coordinates_that_changed_back():
    """They are a superset of the changes, with the same digests."""
    model = {"w": torch.zeros(9000)}
    replica, tracker = copied(model), ChangeTracker(model)
    digests = tracker.digests
    model["w"][[3, 8000]] = 1.0
    first = tracker.take()
    model["w"][3] = 0.0
    merged = Patch.merge(first, tracker.take())
    ((_, _, _, positions, values),) = merged.flat()
    assert (positions.tolist(), values.tolist()) == ([3, 8000], [0.0, 1.0])
    assert merged.apply_(replica, digests) == tracker.digests
    assert same(replica, model)


def test_patches_that_do_not_follow_each_other_are_not_merged():
    first, second, third = consecutive({"w": some((9000,), torch.bfloat16, 0)}, 3)
    other = second.numbered(run="f" * 32, base_version=1, version=2)
    skipped = third.numbered(run=RUN, base_version=1, version=2)
    for a, b, match in (
        (second, first, "merge consecutive patches in their order"),
        (first, third, "makes version 1 of run"),
        (first, other, "run f"),
        (first, skipped, "ends with weights of digest"),
    ):
        with pytest.raises(InputError, match=match) as error:
            Patch.merge(a, b)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("n", [0, 1, 1025, 65_536, 200_001, (1 << 23) + 70_000])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.2, 1.0])
def test_encoded_positions_are_those_of_gather(n, density):
    changed = torch.rand(n, generator=torch.Generator().manual_seed(n)) < density
    changes, _ = gather(torch.zeros(n, dtype=torch.bool), changed)
    counts, positions = encode_positions(changed.nonzero().flatten(), n)
    assert torch.equal(counts, changes.counts)
    assert torch.equal(positions, changes.positions)
