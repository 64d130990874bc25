"""A tracker finds every change of bits, however it was made, and gives it once."""

from __future__ import annotations

import pytest
import torch

from opdkernels import InputError, UsageError
from opdkernels.sync import ChangeTracker, additive_digest, model_digest
from tests.patch.conftest import some
from tests.sync.conftest import as_bytes, change, copied, make_model, oracle_digest, same


def test_patches_hold_exactly_the_changes():
    model = make_model()
    before = copied(model)
    tracker = ChangeTracker(model)
    change(model, 5)
    patch = tracker.take()
    stored = {name: (shape, dtype, positions, values) for name, shape, dtype, positions, values in patch.flat()}
    for name, tensor in model.items():
        width = tensor.element_size()
        old, new = (as_bytes(side[name]) for side in (before, model))
        differs = [i for i in range(tensor.numel()) if old[i * width : (i + 1) * width] != new[i * width :][:width]]
        assert (name in stored) == bool(differs)
        if not differs:
            continue
        shape, dtype, positions, values = stored[name]
        assert (shape, dtype, values.dtype) == (tuple(tensor.shape), tensor.dtype, tensor.dtype)
        if positions is None:
            assert tensor.numel() < 4096
            assert as_bytes(values) == new
        else:
            assert positions.dtype == torch.int32
            assert positions.tolist() == differs
            assert as_bytes(values) == as_bytes(tensor.flatten()[positions.long()])
    assert {tensor.mode for tensor in patch.tensors} == {"sparse", "whole"}


def test_digests_are_those_of_both_sides():
    model = make_model()
    before = copied(model)
    tracker = ChangeTracker(model)
    assert tracker.digests == {name: oracle_digest(tensor) for name, tensor in before.items()}
    change(model, 6)
    patch = tracker.take()
    for tensor in patch.tensors:
        assert tensor.base_digest == oracle_digest(before[tensor.name])
        assert tensor.digest == oracle_digest(model[tensor.name])
    assert tracker.digests == {name: oracle_digest(tensor) for name, tensor in model.items()}
    assert patch.base_digest == model_digest({name: additive_digest(tensor) for name, tensor in before.items()})
    assert patch.digest == model_digest(tracker.digests)


def test_second_take_without_a_change_is_empty():
    model = make_model()
    tracker = ChangeTracker(model)
    assert tracker.take().tensors == ()
    change(model, 7)
    first = tracker.take()
    second = tracker.take()
    assert first.changed > 0
    assert (second.tensors, second.changed, second.nbytes) == ((), 0, 0)
    assert second.base_digest == second.digest == first.digest


def test_patches_do_not_change_with_the_model():
    model = {"w": some((80_000,), torch.bfloat16, 0), "b": some((5,), torch.bfloat16, 1)}
    tracker = ChangeTracker(model)
    change(model, 8)
    patch = tracker.take()
    values = [as_bytes(tensor.changes.values) for tensor in patch.tensors]
    change(model, 9, fraction=1.0)
    tracker.take()
    assert [as_bytes(tensor.changes.values) for tensor in patch.tensors] == values


@pytest.mark.parametrize(("old", "new"), [(0x0000, -0x8000), (0x7FC0, 0x7FC1), (0x7F81, 0x7FC1)], ids=hex)
def test_changes_of_sign_of_zero_and_of_nan_payload_are_found(old, new):
    bits = torch.full((5000,), old, dtype=torch.int16)
    tracker = ChangeTracker({"w": bits.view(torch.bfloat16)})
    assert tracker.take().tensors == ()
    bits[4321] = new
    ((_, _, _, positions, values),) = tracker.take().flat()
    assert positions.tolist() == [4321]
    assert values.view(torch.int16).tolist() == [new]


def test_densely_changed_tensors_are_stored_whole():
    model = {"w": some((70_000,), torch.bfloat16, 0)}
    tracker = ChangeTracker(model)
    change(model, 1, fraction=0.5)
    assert tracker.take().tensors[0].mode == "sparse"
    change(model, 2, fraction=0.9)
    (tensor,) = tracker.take().tensors
    assert tensor.mode == "whole"
    assert tensor.nbytes == model["w"].nbytes


def test_optimizer_steps_of_a_module_arrive():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(80, 70), torch.nn.ReLU(), torch.nn.Linear(70, 3)).bfloat16()
    replica = copied(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tracker = ChangeTracker(model)
    digests = tracker.digests
    for _ in range(3):
        model(torch.randn(4, 80).bfloat16()).square().mean().backward()
        optimizer.step()
        digests = tracker.take().apply_(replica, digests)
        assert same(replica, model.state_dict())
        assert digests == tracker.digests


def test_tied_weights_are_one_tensor_with_an_alias():
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(100, 50), "head": torch.nn.Linear(50, 100)})
    model["head"].weight = model["embed"].weight
    tracker = ChangeTracker(model)
    assert list(tracker.digests) == ["embed.weight", "head.bias"]
    with torch.no_grad():
        model["head"].weight[5] += 1
    (tensor,) = tracker.take().tensors
    assert (tensor.name, tensor.aliases, tensor.changed) == ("embed.weight", ("head.weight",), 50)


def test_empty_tensors_are_not_tied():
    model = {"w": torch.zeros(0), "v": torch.zeros(0)}
    tracker = ChangeTracker(model)
    tracker.touch()
    assert [(tensor.name, tensor.aliases) for tensor in tracker.take().tensors] == [("w", ()), ("v", ())]


def test_touched_tensors_are_stored_whole_once():
    model = {"w": some((80_000,), torch.bfloat16, 0), "v": some((9000,), torch.float32, 1)}
    model["alias"] = model["w"]
    tracker = ChangeTracker(model)
    tracker.touch("alias")
    (tensor,) = tracker.take().tensors
    assert (tensor.name, tensor.mode) == ("w", "whole")
    assert tensor.base_digest == tensor.digest == oracle_digest(model["w"])
    assert tracker.take().names == []
    tracker.touch()
    assert tracker.take().names == ["w", "v"]
    with pytest.raises(UsageError, match=r"has no tensor x\\x1b; give a name"):
        tracker.touch("x\x1b")


def test_changes_stay_until_take_succeeds():
    model = {"w": some((9000,), torch.float32, 0), "v": some((9000,), torch.float32, 1)}
    tracker = ChangeTracker(model)
    change(model, 3)
    other = model.pop("v")
    with pytest.raises(InputError, match=r"v was torch.float32 \[9000\] and is absent; make a new tracker"):
        tracker.take()
    model["v"] = other
    assert tracker.take().names == ["w", "v"]


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda model: model.update(w=model["w"].view(90, 100)), r"w was torch.float32 \[9000\] and is"),
        (lambda model: model.update(w=model["w"].double()), "is torch.float64"),
        (lambda model: model.update(x=torch.zeros(3)), "x was absent and is"),
        (lambda model: model.update(v=model["w"]), "other tensors of the model are tied"),
    ],
)
def test_other_layouts_are_rejected(edit, match):
    model = {"w": some((9000,), torch.float32, 0), "v": some((9000,), torch.float32, 1)}
    tracker = ChangeTracker(model)
    edit(model)
    with pytest.raises(InputError, match=match) as error:
        tracker.take()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"w": torch.zeros(3, device="meta")}, "w is on the meta device"),
        ({"w": torch.zeros(3, dtype=torch.complex128)}, "does not support"),
        ({"w": torch.eye(3).to_sparse()}, "does not support"),
        ({"w": torch.zeros(1).expand(5)}, "share memory"),
        ({"w": (w := torch.zeros(9)), "v": w[3:]}, "share memory"),
        ({"\ud800": torch.zeros(3)}, "not Unicode text"),
    ],
)
def test_unsupported_tensors_are_rejected(model, match):
    with pytest.raises(InputError, match=match) as error:
        ChangeTracker(model)
    assert "\n" not in str(error.value)


def test_wrong_use_is_reported():
    with pytest.raises(UsageError, match="is of type list; give a module"):
        ChangeTracker([torch.zeros(3)])
    with pytest.raises(UsageError, match="source 'bits' is not available; give source='snapshot'"):
        ChangeTracker({}, source="bits")
