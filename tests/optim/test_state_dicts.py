"""Saved state finds its parameter by name, whatever the order, or is refused; nothing is dropped in silence."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch

from opdkernels.errors import InputError
from opdkernels.optim import MaskedAdamW, MaskedParameters, MaskedSGD

KINDS = {
    "adamw": (MaskedAdamW, torch.optim.AdamW, {}, "exp_avg"),
    "sgd": (MaskedSGD, torch.optim.SGD, {"momentum": 0.9}, "momentum_buffer"),
}
NAMES = ["q", "k", "v", "o"]
with_kinds = pytest.mark.parametrize("kind", KINDS)


def params_of(names) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.zeros(4, 4)) for name in names}


def stepped(optimizer, params):
    """One step, whose gradient tells the parameters apart."""
    for name, param in params.items():
        param.grad = torch.full((4, 4), 1.0 + NAMES.index(name.rpartition(".")[2]))
    optimizer.step()
    return optimizer


def masked(kind, groups, **options):
    """An optimizer of named parameters with masks of all coordinates; state tells nothing but the order."""
    cls, _, defaults, _ = KINDS[kind]
    masks = {name: torch.ones(4, 4, dtype=torch.bool) for group in groups for name in group}
    params = [{"params": list(group.items())} for group in groups]
    return cls(params, masks=masks, **defaults, **options)


@with_kinds
@pytest.mark.parametrize("rename", [str, lambda n: f"_orig_mod.{n}", lambda n: f"module.{n}", lambda n: f"model.{n}"])
def test_state_in_another_order_is_matched_by_names(kind, rename):
    moment = KINDS[kind][3]
    params = params_of(NAMES)
    saved = stepped(masked(kind, [params]), params).state_dict()
    others = params_of([rename(name) for name in ("v", "o", "q", "k")])
    optimizer = masked(kind, [others])
    optimizer.load_state_dict(saved)
    for name, param in others.items():
        wanted = saved["state"][NAMES.index(name.rpartition(".")[2])][moment]
        assert torch.equal(optimizer.state[param][moment], wanted)
    assert optimizer.param_groups[0]["param_names"] == list(others)


@with_kinds
def test_groups_in_another_order_keep_their_options(kind):
    moment = KINDS[kind][3]
    first, second = params_of("qk"), params_of("vo")
    optimizer = masked(kind, [first, second])
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.5, 0.25
    saved = stepped(optimizer, {**first, **second}).state_dict()
    swapped, other = params_of("ov"), params_of("kq")
    resumed = masked(kind, [swapped, other])
    resumed.load_state_dict(saved)
    assert [group["lr"] for group in resumed.param_groups] == [0.25, 0.5]
    assert torch.equal(resumed.state[other["q"]][moment], saved["state"][0][moment])
    before = copy.deepcopy(resumed.state_dict())
    with pytest.raises(InputError, match="in other groups of the optimizer state"):
        masked(kind, [params_of("qv"), params_of("ko")]).load_state_dict(saved)
    for names in ("qkvx", "qkv", "qkvox"):
        groups = [{name: torch.nn.Parameter(torch.zeros(4, 4)) for name in names}]
        with pytest.raises(InputError, match="load the state of the same parameters"):
            masked(kind, groups).load_state_dict(saved)
    assert resumed.state_dict()["param_groups"] == before["param_groups"]


@with_kinds
def test_state_without_names_is_checked_by_masks_and_sizes(kind):
    cls, _, defaults, _ = KINDS[kind]
    masks = [torch.arange(16).view(4, 4) % (i + 2) == 0 for i in range(2)]
    params = params_of("qk")
    saved = stepped(cls(params.values(), masks=masks, **defaults), params).state_dict()
    other = cls(params_of("kq").values(), masks=masks[::-1], **defaults)
    with pytest.raises(InputError, match="parameter 0 belongs to another mask"):
        other.load_state_dict(saved)
    with pytest.raises(InputError, match=r"groups of \[2\] parameters, this optimizer of \[1\]"):
        cls(params_of("q").values(), masks=masks[:1], **defaults).load_state_dict(saved)
    assert not other.state


@with_kinds
def test_state_with_names_as_keys_loads(kind):
    """As torch.distributed.checkpoint.state_dict.get_optimizer_state_dict returns it."""
    moment = KINDS[kind][3]
    params = params_of(NAMES)
    saved = stepped(masked(kind, [params]), params).state_dict()
    named = {
        "state": {NAMES[key]: value for key, value in saved["state"].items()},
        "param_groups": [
            {**{k: v for k, v in g.items() if k != "param_names"}, "params": NAMES} for g in saved["param_groups"]
        ],
    }
    others = params_of(NAMES[::-1])
    optimizer = masked(kind, [others])
    optimizer.load_state_dict(named)
    assert all(torch.equal(optimizer.state[others[n]][moment], named["state"][n][moment]) for n in NAMES)


@with_kinds
@pytest.mark.parametrize("keys", ["numbers", "names", "offset"])
def test_dense_state_in_another_order_or_with_other_keys_loads(kind, keys):
    cls, theirs, defaults, moment = KINDS[kind]
    dense = params_of(NAMES)
    saved = stepped(theirs(list(dense.items()), **defaults), dense).state_dict()
    rename = {"numbers": lambda i: i, "names": lambda i: NAMES[i], "offset": lambda i: i + 10}[keys]
    saved["state"] = {rename(key): value for key, value in saved["state"].items()}
    for group in saved["param_groups"]:
        group["params"] = [rename(i) for i in group["params"]]
    params, mask = params_of(NAMES[::-1]), torch.arange(16).view(4, 4) % 3 == 0
    optimizer = cls(params.items(), masks=dict.fromkeys(params, mask), **defaults)
    optimizer.load_dense_state_dict(saved)
    for name, param in params.items():
        assert torch.equal(optimizer.state[param][moment], saved["state"][rename(NAMES.index(name))][moment][mask])


@with_kinds
def test_foreign_state_dicts_raise_and_change_nothing(kind):
    params = params_of(NAMES)
    optimizer = stepped(masked(kind, [params]), params)
    good, dense = optimizer.state_dict(), optimizer.dense_state_dict()
    before = copy.deepcopy(good)
    wrong_keys = {**good, "state": {f"{key}.weight": value for key, value in good["state"].items()}}
    text_keys = {**good, "state": {str(key): value for key, value in good["state"].items()}}
    for load in (optimizer.load_state_dict, optimizer.load_dense_state_dict):
        for given in (
            {},
            None,
            [],
            {"model": {}},
            {"state": {}},
            {"state": {}, "param_groups": 3},
            {"state": []},
        ):
            with pytest.raises(InputError, match="no optimizer state"):
                load(given)
        for given in (wrong_keys, text_keys):
            with pytest.raises(InputError, match="of no parameter in its groups"):
                load(given)
        with pytest.raises(InputError, match="is str, not a dict"):
            load({**good, "state": {0: "moments"}})
        rmsprop = {"params": list(range(4)), "lr": 0.1, "alpha": 0.9}
        with pytest.raises(InputError, match="another optimizer's"):
            load({"state": {}, "param_groups": [rmsprop]})
    with pytest.raises(InputError, match="q has no mask: it is a dense optimizer's"):
        optimizer.load_state_dict(dense)
    junk = copy.deepcopy(good)
    junk["state"][2]["step"] = "three"
    with pytest.raises(InputError, match="v has a str as step"):
        optimizer.load_state_dict(junk)
    half = copy.deepcopy(dense)
    del half["state"][1][KINDS[kind][3]]
    with pytest.raises(InputError, match=f"k has no {KINDS[kind][3]}"):
        optimizer.load_dense_state_dict(half)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(after["state"][key][name], value) for name, value in state.items())


def test_dense_state_of_adam_with_weight_decay_raises():
    """Its weight decay is part of the gradient; without weight decay it is AdamW."""
    for weight_decay in (0.0, 0.1):
        dense, params = params_of("q"), params_of("q")
        adam = torch.optim.Adam(list(dense.items()), weight_decay=weight_decay)
        saved = stepped(adam, dense).state_dict()
        optimizer = masked("adamw", [params])
        if weight_decay:
            with pytest.raises(InputError, match="is of Adam"):
                optimizer.load_dense_state_dict(saved)
        else:
            optimizer.load_dense_state_dict(saved)
            assert torch.equal(optimizer.state[params["q"]]["exp_avg"].view(4, 4), saved["state"][0]["exp_avg"])


@with_kinds
def test_entries_of_users_in_a_parameters_state_survive(kind):
    """Such as an average of the weights that a hook keeps; as torch keeps them, also over a change of the masks."""
    params = params_of("q")
    optimizer = stepped(masked(kind, [params]), params)
    optimizer.state[params["q"]]["average"] = torch.full((4, 4), 3.0)
    optimizer.state[params["q"]]["note"] = "mine"
    others = params_of("q")
    other = masked(kind, [others])
    other.load_state_dict(optimizer.state_dict())
    other.set_masks({"q": torch.eye(4, dtype=torch.bool)})
    stepped(other, others)
    state = other.state[others["q"]]
    assert torch.equal(state["average"], torch.full((4, 4), 3.0))
    assert state["note"] == "mine"
    assert state[KINDS[kind][3]].shape == (4,)


def test_state_of_masked_parameters_in_another_order_raises():
    """Values are saved by position; in another order they would go to other weights of the same size."""

    def compact_of(names, seed=0):
        model = torch.nn.Module()
        for name in names:
            model.register_parameter(name, torch.nn.Parameter(torch.zeros(4, 4)))
        flags = torch.arange(16).view(4, 4) % 2 == seed
        return model, MaskedParameters(model, dict.fromkeys(names, flags))

    (_, compact), (model, same) = compact_of("qk"), compact_of("qk")
    with torch.no_grad():
        compact.values[0].fill_(3.0)
    file = io.BytesIO()
    torch.save(compact.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    same.load_state_dict(saved)
    same.push_to_model()
    assert float(model.q.detach().sum()) == 24.0
    for other, what in (
        (compact_of("kq")[1], "weights"),
        (compact_of("qv")[1], "weights"),
        (compact_of("qk", 1)[1], "masks"),
    ):
        before = [value.detach().clone() for value in other.values]
        with pytest.raises(InputError, match=f"is of other {what}"):
            other.load_state_dict(saved)
        assert all(torch.equal(value, old) for value, old in zip(other.values, before, strict=True))


@with_kinds
def test_names_of_a_group_must_be_as_many_as_its_parameters(kind):
    group = {"params": list(params_of("qk").values()), "param_names": ["q"]}
    with pytest.raises(ValueError, match="a group has 2 parameters and 1 param_names"):
        KINDS[kind][0]([group], masks={"q": torch.ones(4, 4, dtype=torch.bool)}, unmasked="train")


NAN, INF = float("nan"), float("inf")
DAMAGES = {
    "step": [torch.tensor(NAN), torch.tensor(-1.0), torch.tensor(INF), torch.ones(2), None, "1", NAN],
    "mask": [None, "x", NAN, torch.ones(2), torch.tensor(NAN)],
    "exp_avg": [None, 1, "x", torch.ones(1, device="meta"), torch.ones(2).to_sparse(), torch.ones(3, dtype=torch.int8)],
    "exp_avg_sq": [...],  # left out
    "group_steps": [torch.tensor([NAN]), torch.tensor([-1.0]), torch.tensor([1.0, INF]), "x"],
    "steps": [torch.tensor([NAN, 1.0, 1.0])],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_state_raises_in_one_line_and_changes_nothing(name):
    mask = torch.tensor([True, False, True, True])

    def stepped() -> MaskedAdamW:
        optimizer = MaskedAdamW([("w", torch.nn.Parameter(torch.ones(4)))], masks={"w": mask})
        optimizer.param_groups[0]["params"][0].grad = torch.ones(4)
        optimizer.step()
        return optimizer

    optimizer = stepped()
    for value in DAMAGES[name]:
        damaged = copy.deepcopy(stepped().state_dict())
        if value is ...:
            del damaged["state"][0][name]
        else:
            damaged["state"][0][name] = value
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(InputError, match=r"the optimizer state of w .*; load the state") as raised:
            optimizer.load_state_dict(damaged)
        assert "\n" not in str(raised.value)
        assert repr(optimizer.state_dict()) == repr(before)


@pytest.mark.parametrize("value", [2, 2.0, None, np.float32(2), torch.ones(2)], ids=repr)
def test_step_count_that_is_no_tensor_raises_before_anything_moves(value):
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = MaskedAdamW(params, masks=[torch.ones(4, dtype=torch.bool)] * 2)
    for param in params:
        param.grad = torch.ones(4)
    optimizer.step()
    before = params[0].detach().clone()
    optimizer.state[params[1]]["step"] = value
    with pytest.raises(InputError, match=r"parameter 1 has .* as step, not a tensor of one element"):
        optimizer.step()
    assert torch.equal(params[0], before)
