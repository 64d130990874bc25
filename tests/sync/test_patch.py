"""A patch changes a replica to the trainer's bits, all of it or nothing."""

from __future__ import annotations

import pytest
import torch

from opdkernels import InputError, UsageError
from opdkernels.sync import ChangeTracker, Patch, apply
from tests.patch.conftest import some
from tests.sync.conftest import RUN, consecutive, copied, make_model, oracle_digest, same


def rejected(model: dict[str, torch.Tensor], patch: Patch, match: str, digests: dict[str, int] | None = None) -> None:
    """Asserts that a patch is rejected with one line, and that no bit changes."""
    before = copied(model)
    with pytest.raises(InputError, match=match) as error:
        patch.apply_(model, digests)
    assert "\n" not in str(error.value)
    assert same(model, before)


@pytest.mark.parametrize("held", [False, True], ids=["computed", "held"])
def test_replica_gets_the_bits_of_the_model(held):
    model = make_model()
    replica = copied(model)
    digests = {name: oracle_digest(tensor) for name, tensor in model.items()}
    (patch,) = consecutive(model, 1)
    result = patch.apply_(replica, digests if held else None)
    assert same(replica, model)
    expected = {name: oracle_digest(tensor) for name, tensor in model.items()}
    assert result == (expected if held else {name: expected[name] for name in patch.names})


def test_layout_of_the_replica_does_not_matter():
    model = {"w": some((90, 100), torch.bfloat16, 0), "v": some((50, 60), torch.float32, 1)}
    replica = {"w": torch.empty(100, 90, dtype=torch.bfloat16).t(), "v": torch.empty(50, 60, 2)[..., 0]}
    for name, tensor in model.items():
        replica[name].copy_(tensor)
    (patch,) = consecutive(model, 1)
    assert {tensor.mode for tensor in patch.tensors} == {"sparse", "whole"}
    patch.apply_(replica)
    assert same(replica, model)
    assert not replica["w"].is_contiguous()


def test_module_is_changed_in_place():
    model = torch.nn.Linear(100, 80)
    replica = torch.nn.Linear(100, 80)
    replica.load_state_dict(model.state_dict())
    addresses, version = [tensor.data_ptr() for tensor in replica.parameters()], replica.weight._version
    tracker = ChangeTracker(model)
    with torch.no_grad():
        model.weight[7] *= 2
    tracker.take().apply_(replica)
    assert same(replica.state_dict(), model.state_dict())
    assert [tensor.data_ptr() for tensor in replica.parameters()] == addresses
    assert replica.weight._version > version
    assert replica.weight.requires_grad


def test_applied_patch_changes_nothing():
    model = make_model()
    replica = copied(model)
    digests = ChangeTracker(model).digests
    (patch,) = consecutive(model, 1)
    after = patch.apply_(replica, digests)
    for held in (None, after):
        patch.apply_(replica, held)
        assert same(replica, model)


def test_unchanged_tensors_may_be_absent():
    model = {"w": some((9000,), torch.float32, 0), "v": some((9000,), torch.float32, 1)}
    replica = {"w": model["w"].clone()}
    tracker = ChangeTracker(model)
    model["w"][5] = 3.0
    tracker.take().apply_(replica)
    assert same(replica, {"w": model["w"]})


def test_wrong_base_is_rejected():
    model = make_model()
    base = copied(model)
    first, second = consecutive(model, 2)
    rejected(copied(base), second, "the model holds other weights; apply the patches in between")
    for name in first.names:  # one bit of one tensor, whether it is in a changed coordinate or not
        other = copied(base)
        raw = other[name].view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[base[name].itemsize])
        raw[(-1,) * raw.ndim] ^= 1
        rejected(other, first, "other weights")


def test_wrong_base_is_rejected_by_held_digests():
    """Also if an unchanged tensor differs, which the patch does not hold."""
    model = {"w": some((9000,), torch.float32, 0), "v": some((9000,), torch.float32, 1)}
    replica, tracker = copied(model), ChangeTracker(model)
    digests = tracker.digests
    model["w"][5] = 3.0
    patch = tracker.take()
    rejected(replica, patch, "the model has digest", digests | {"v": digests["v"] ^ 1})
    rejected(replica, patch, "the model has digest", digests | {"w": digests["w"] ^ 1})
    rejected(replica, patch, "the model has digest", {"w": digests["w"]})
    altered = copied(replica)
    altered["w"].view(torch.int32)[5] ^= 1  # at a coordinate that the patch changes
    rejected(altered, patch, "would get digest", digests)
    assert patch.apply_(replica, digests) == tracker.digests


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda model: model.pop("w"), "the model has no tensor w"),
        (lambda model: model.update(w=model["w"].view(100, 90)), r"w is F32 \[100, 90\] in the model and F32 \[90, 1"),
        (lambda model: model.update(w=model["w"].bfloat16()), r"w is BF16 \[90, 100\] in the model"),
        (lambda model: model.update(w=model["w"][:, :99]), r"w is F32 \[90, 99\]"),
        (lambda model: model.update(x=model["w"]), "are one tensor in the model and two in the patch's model"),
        (lambda model: model.update(x=model["w"][3:]), "share memory"),
        (lambda model: model.update(w=model["w"].to("meta")), "meta device"),
    ],
)
def test_other_models_are_rejected(edit, match):
    model = {"v": some((9000,), torch.float32, 1), "w": some((90, 100), torch.float32, 0)}
    replica = copied(model)
    (patch,) = consecutive(model, 1)
    edit(replica)
    before = {name: tensor.clone() for name, tensor in replica.items() if not tensor.is_meta}
    with pytest.raises(InputError, match=match) as error:
        patch.apply_(replica)
    assert "\n" not in str(error.value)
    assert same({name: replica[name] for name in before}, before)


def test_tied_weights_are_written_once_or_to_both():
    model = {"embed": some((9000,), torch.bfloat16, 0)}
    model["head"] = model["embed"]
    tied, apart = copied({"embed": model["embed"]}), copied(model)
    tied["head"] = tied["embed"]
    only_alias = {"head": model["head"].clone()}
    (patch,) = consecutive(model, 1)
    for replica in (tied, apart, only_alias):
        patch.apply_(replica)
        assert same(replica, {name: model[name] for name in replica})
    apart["head"][0] += 1
    apart["embed"].copy_(some((9000,), torch.bfloat16, 0))
    rejected(apart, patch, "other weights")


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_failed_writes_are_undone(monkeypatch, fails_at):
    model = {f"t{i}": some((90, 100), torch.bfloat16, i) for i in range(3)}
    model["whole"] = some((50, 60), torch.float32, 9).t()
    replica = copied(model)
    before = copied(replica)
    (patch,) = consecutive(model, 1)
    write_at, calls = apply.write_at, []

    def failing(tensor, positions, values):
        calls.append(tensor)
        write_at(tensor, None if positions is None else positions[::2], values if positions is None else values[::2])
        if len(calls) == fails_at + 1:
            raise MemoryError("in the middle of a write")
        write_at(tensor, positions, values)

    monkeypatch.setattr(apply, "write_at", failing)
    with pytest.raises(MemoryError):
        patch.apply_(replica)
    assert len(calls) == 2 * (fails_at + 1)
    assert same(replica, before)


def test_numbers_are_validated():
    (patch,) = consecutive({"w": some((9,), torch.bfloat16, 0)}, 1)
    for run, base_version, version in (
        ("x" * 32, 0, 1),
        ("0" * 31, 0, 1),
        (RUN, 1, 1),
        (RUN, -1, 1),
        (RUN, 0, 1 << 63),
    ):
        with pytest.raises(UsageError, match="; give "):
            patch.numbered(run=run, base_version=base_version, version=version)
    with pytest.raises(UsageError, match="is of type list; give a module"):
        patch.apply_([])
