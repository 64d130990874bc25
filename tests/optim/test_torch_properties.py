"""The inputs that PyTorch tests its optimizers with, and the properties that it tests, for masked optimizers.

Every run is compared bit for bit with `torch.optim` on the active coordinates, its square root rounded correctly;
frozen coordinates must keep their bits.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import sys
import types
import unittest

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from opdkernels.optim import MaskedAdamW, MaskedSGD
from tests.ops.step.test_step import RightSqrt, bits

CLASSES = {"AdamW": (MaskedAdamW, torch.optim.AdamW), "SGD": (MaskedSGD, torch.optim.SGD)}
DENSITIES = {"full": 1.0, "partial": 0.3, "empty": 0.0}
SHAPES = {"scalar": (), "one": (1,), "bias": (5,), "weight": (10, 7), "no_elements": (0, 4), "transposed": (6, 9)}
STATEFUL = {"AdamW": {}, "SGD": {"momentum": 0.9}}

pytestmark = pytest.mark.parametrize("kind", CLASSES)
with_masks = pytest.mark.parametrize("density", DENSITIES)


@pytest.fixture(scope="module")
def infos():
    """`OptimizerInfo` by the name of the optimizer, from PyTorch's own tests.

    Their modules import expecttest, which no input of an optimizer needs, and forbid later changes of torch.backends,
    which other tests of this session make.
    """
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("expecttest") is None:
            patch.setitem(sys.modules, "expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        module = pytest.importorskip("torch.testing._internal.common_optimizers", exc_type=ImportError)
    return {info.optim_cls.__name__: info for info in module.optim_db}


class Run:
    """A masked optimizer and PyTorch's own on equal parameters."""

    def __init__(
        self,
        kind: str,
        density: str,
        *,
        named: bool = True,
        grouped: list[dict] | None = None,
        flags: dict | None = None,
        **options,
    ):
        ours, theirs = CLASSES[kind]
        generator = torch.Generator().manual_seed(0)
        values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        values["transposed"] = values["transposed"].t()
        self.params, self.dense = (
            {name: torch.nn.Parameter(value.clone()) for name, value in values.items()} for _ in range(2)
        )
        assert not self.params["transposed"].is_contiguous()
        self.start = {name: value.clone() for name, value in values.items()}
        self.masks = {
            name: torch.rand(value.shape, generator=generator) < DENSITIES[density] for name, value in values.items()
        }
        masks = self.masks if named else list(self.masks.values())
        self.ours = ours(groups(self.params, named, grouped), masks=masks, **options, **(flags or {}))
        self.theirs = theirs(groups(self.dense, named, grouped), foreach=False, **options)
        self.step_count = 0

    def gradients(self) -> None:
        """New gradients, equal on both sides; larger than the weights' own, so that every option matters."""
        generator = torch.Generator().manual_seed(1 + self.step_count)
        for param, dense in zip(self.params.values(), self.dense.values(), strict=True):
            param.grad = torch.randn(param.shape, generator=generator)
            dense.grad = param.grad.clone()
        self.step_count += 1

    def steps(self, count: int = 5) -> Run:
        for _ in range(count):
            self.gradients()
            self.ours.step()
            with RightSqrt():
                self.theirs.step()
        return self

    def check(self, note: str = "") -> None:
        for name, mask in self.masks.items():
            ours, dense = bits(self.params[name].detach()), bits(self.dense[name].detach())
            assert torch.equal(ours[mask], dense[mask]), (note, name)
            assert torch.equal(ours[~mask], bits(self.start[name])[~mask]), (note, name)
            moments = self.theirs.state.get(self.dense[name], {})
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"):
                if moments.get(key) is not None:
                    assert torch.equal(self.ours.state[self.params[name]][key], moments[key][mask]), (note, name, key)


def groups(params: dict[str, torch.nn.Parameter], named: bool, grouped: list[dict] | None) -> list:
    """All parameters as one list, or a third of them in each group with these options."""
    items = list(params.items()) if named else list(params.values())
    if grouped is None:
        return items
    return [{"params": items[i :: len(grouped)], **options} for i, options in enumerate(grouped)]


def inputs(infos, kind: str) -> list:
    return infos[kind].optim_inputs_func(device="cpu")


def same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    """Whether two optimizers have equal options and equal state, of equal dtypes."""
    flat = []
    for optimizer in (a, b):
        saved = optimizer.state_dict()
        options = [{key: value for key, value in group.items() if key != "lr"} for group in saved["param_groups"]]
        tensors = {(key, name): value for key, state in saved["state"].items() for name, value in state.items()}
        flat.append((options, tensors))
    (options, tensors), (other_options, other_tensors) = flat
    return (
        options == other_options
        and tensors.keys() == other_tensors.keys()
        and all(torch.equal(t, other_tensors[k]) and t.dtype == other_tensors[k].dtype for k, t in tensors.items())
    )


@with_masks
def test_inputs_step_as_torch_steps(infos, kind, density):
    for given in inputs(infos, kind):
        for flags in ({}, {"foreach": True}, {"fused": True}):  # without effect on the result
            Run(kind, density, flags=flags, **given.kwargs).steps().check(given.desc)


@with_masks
def test_tensor_learning_rate_steps_as_torch_steps(kind, density):
    """Of any number of dimensions; torch computes the decay factor and the step size in the dtype of the tensor."""
    for lr in (torch.tensor(0.003), torch.tensor([0.003]), torch.tensor([[[0.003]]]), torch.tensor(0.003).double()):
        run = Run(kind, density, lr=lr, weight_decay=0.1)
        run.steps().check(f"lr {lr}")


def test_tensor_betas_step_as_torch_steps(kind):
    """Within rounding: the result of torch's lerp with a tensor depends on the memory layout of the weights."""
    if kind == "SGD":
        pytest.skip("SGD has no betas")
    for betas in ((torch.tensor(0.9), torch.tensor(0.99)), (torch.tensor([[0.4]]), torch.tensor([0.95]))):
        for amsgrad in (False, True):
            run = Run(kind, "full", lr=torch.tensor(0.003), betas=betas, amsgrad=amsgrad).steps()
            for name, param in run.params.items():
                torch.testing.assert_close(param, run.dense[name], rtol=1e-5, atol=1e-7)


def test_error_inputs_raise(infos, kind):
    for given in infos[kind].optim_error_inputs_func(device="cpu", dtype=torch.float32):
        params = given.optimizer_error_input.params
        params = [torch.nn.Parameter(torch.randn(2, 3))] if params is None else params
        error = ValueError if given.error_type is UserWarning else given.error_type
        masks = {"weight": torch.ones(1, 1, dtype=torch.bool)}
        if not any("weight" in str(param) for param in params):
            masks = [torch.ones(2, 3, dtype=torch.bool)]
        with pytest.raises(error):
            CLASSES[kind][0](params, masks=masks, **given.optimizer_error_input.kwargs)
    weight = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match="fused=True and foreach=True"):
        CLASSES[kind][0]([weight], masks=[torch.ones(2, dtype=torch.bool)], foreach=True, fused=True)
    for flag in ("capturable", "differentiable"):
        with pytest.raises(TypeError):
            CLASSES[kind][0]([weight], masks=[torch.ones(2, dtype=torch.bool)], **{flag: True})


def test_complex_parameters_raise(kind):
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="complex64"):
        CLASSES[kind][0]([weight], masks=[torch.ones(2, dtype=torch.bool)])


@with_masks
def test_schedulers_give_the_same_steps(infos, kind, density):
    for constructors in infos[kind].scheduler_inputs:
        for given in inputs(infos, kind):
            run = Run(kind, density, **given.kwargs)
            schedulers = [[make(optimizer) for make in constructors] for optimizer in (run.ours, run.theirs)]
            for step in range(6):
                run.steps(1)
                for optimizer_schedulers in schedulers:
                    for scheduler in optimizer_schedulers:
                        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                        scheduler.step(float(step)) if plateau else scheduler.step()
            run.check(given.desc)
            assert float(run.ours.param_groups[0]["lr"]) == float(run.theirs.param_groups[0]["lr"])


@with_masks
def test_groups_have_their_own_options(kind, density):
    for grouped in ([{"lr": 0.1}, {"lr": 0.01}], [{"weight_decay": 0.5}, {}, {"weight_decay": 0.0, "lr": 1e-4}]):
        Run(kind, density, grouped=grouped, **STATEFUL[kind]).steps().check(str(grouped))


@with_masks
def test_unnamed_parameters_with_a_list_of_masks(kind, density):
    Run(kind, density, named=False, **STATEFUL[kind]).steps().check()


@with_masks
def test_step_without_gradients_changes_nothing(kind, density):
    run = Run(kind, density, weight_decay=0.1, **STATEFUL[kind])
    run.ours.step()
    assert not run.ours.state
    assert all(torch.equal(p, run.start[name]) for name, p in run.params.items())
    run.steps(2)
    before = {name: p.detach().clone() for name, p in run.params.items()}
    run.ours.zero_grad()
    run.ours.step()
    assert all(torch.equal(p, before[name]) for name, p in run.params.items())
    run.ours.zero_grad(set_to_none=False)
    for name in ("weight", "bias"):  # only some parameters have a gradient
        run.params[name].grad = torch.ones_like(run.params[name])
        run.dense[name].grad = torch.ones_like(run.params[name])
    for name in run.params.keys() - {"weight", "bias"}:
        run.dense[name].grad = None
    run.ours.step()
    with RightSqrt():
        run.theirs.step()
    run.check()


@with_masks
def test_zero_gradients_change_nothing(kind, density):
    run = Run(kind, density, weight_decay=0.0)
    for name, param in run.params.items():
        param.grad = torch.zeros_like(param)
        run.start[name] = param.detach().clone()
    run.ours.step()
    assert all(torch.equal(p, run.start[name]) for name, p in run.params.items())


def test_parameters_without_requires_grad_are_left_alone(kind):
    first, second = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4), requires_grad=False)
    optimizer = CLASSES[kind][0]([first, second], masks=2 * [torch.ones(4, dtype=torch.bool)], lr=0.5)
    first.sum().backward()
    optimizer.step()
    assert bool((first < 1).all())
    assert torch.equal(second, torch.ones(4))


def test_optimizer_is_printed_with_its_options(kind):
    text = repr(Run(kind, "partial", lr=0.125).ours)
    assert text.startswith(f"Masked{kind} (\nParameter Group 0")
    assert "lr: 0.125" in text
    assert "weight_decay_target: zero" in text


@with_masks
@pytest.mark.parametrize("how", ["state_dict", "weights_only", "deepcopy", "pickle"])
def test_copies_continue_with_the_same_bits(infos, kind, density, how):
    for given in inputs(infos, kind):
        run = Run(kind, density, **given.kwargs).steps(3)
        params, ours = run.params, run.ours
        if how == "deepcopy":
            run.params, run.ours = copy.deepcopy((params, ours))
        elif how == "pickle":
            run.params, run.ours = pickle.loads(pickle.dumps((params, ours)))
        else:
            fresh = Run(kind, density, **given.kwargs)
            with torch.no_grad():
                for name, param in fresh.params.items():
                    param.copy_(params[name])
            state = ours.state_dict()
            if how == "weights_only":
                file = io.BytesIO()
                torch.save(state, file)
                file.seek(0)
                state = torch.load(file, weights_only=True)
            fresh.ours.load_state_dict(state)
            run.params, run.ours = fresh.params, fresh.ours
        assert run.ours is not ours
        assert same(run.ours, ours)
        run.steps(3).check(given.desc)


def test_deepcopy_has_all_public_attributes(kind):
    optimizer = Run(kind, "partial", **STATEFUL[kind]).steps(1).ours
    optimizer.note = "an attribute of the user's"
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert public - {"note"} <= set(vars(other))


def test_state_dict_without_later_options_loads(infos, kind):
    """Options that were added after a state dict was saved get their defaults."""
    for given in inputs(infos, kind):
        if given.kwargs.keys() & {"maximize", "capturable"}:
            continue
        run = Run(kind, "partial", **given.kwargs).steps(3)
        state = copy.deepcopy(run.ours.state_dict())
        for group in state["param_groups"]:
            for flag in (*infos[kind].not_og_supported_flags, "seed", "weight_decay_target", "param_names"):
                group.pop(flag, None)
        for entry in state["state"].values():
            entry["step"] = float(entry["step"])
        run.ours.load_state_dict(state)
        assert run.ours.param_groups[0]["param_names"] == list(SHAPES)
        assert run.ours.param_groups[0]["maximize"] is False
        run.steps(3).check(given.desc)


@with_masks
def test_named_and_unnamed_state_dicts_load_in_each_other(kind, density):
    named, unnamed = Run(kind, density, **STATEFUL[kind]), Run(kind, density, named=False, **STATEFUL[kind])
    named.steps(3)
    unnamed.steps(1)
    fresh = Run(kind, density, **STATEFUL[kind])
    fresh.ours.load_state_dict(unnamed.steps(2).ours.state_dict())
    assert fresh.ours.param_groups[0]["param_names"] == list(SHAPES)
    assert all(
        torch.equal(v, fresh.ours.state[fresh.params[name]][key])
        for name in SHAPES
        for key, v in named.ours.state[named.params[name]].items()
    )
    unnamed.ours.load_state_dict(named.ours.state_dict())
    assert unnamed.ours.param_groups[0]["param_names"] == list(SHAPES)


def test_state_of_other_keys_survives(kind):
    """Entries of the state that belong to no parameter, as torch keeps them."""
    run = Run(kind, "partial", **STATEFUL[kind]).steps(1)
    run.ours.state["user"] = {"epoch": 3}
    state = run.ours.state_dict()
    assert state["state"]["user"] == {"epoch": 3}
    other = Run(kind, "partial", **STATEFUL[kind])
    other.ours.load_state_dict(state)
    assert other.ours.state["user"] == {"epoch": 3}
    assert other.ours.state_dict()["state"]["user"] == {"epoch": 3}
    assert copy.deepcopy(other.ours).state["user"] == {"epoch": 3}
    other.steps(2)


def test_options_of_the_user_in_groups_survive(kind):
    """Keys that only the user knows, in groups and in state dicts, such as a scheduler's `initial_lr`."""
    run = Run(kind, "partial", grouped=[{"layer": 3}, {}], **STATEFUL[kind])
    torch.optim.lr_scheduler.StepLR(run.ours, 2)
    state = run.steps(1).ours.state_dict()
    other = Run(kind, "partial", grouped=[{"layer": 0}, {}], **STATEFUL[kind])
    other.ours.load_state_dict(state)
    assert [group.get("layer") for group in other.ours.param_groups] == [3, None]
    assert other.ours.param_groups[0]["initial_lr"] == run.ours.param_groups[0]["lr"]


def test_step_hooks_run_in_order(kind):
    run, calls = Run(kind, "partial"), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
        run.ours.register_step_pre_hook(lambda *_: calls.append("pre")),
        run.ours.register_step_post_hook(lambda *_: calls.append("post")),
    ]
    try:
        run.gradients()
        run.ours.step()
    finally:
        for handle in handles:
            handle.remove()
    expected = ["global pre", "pre", "post", "global post"]
    assert calls == expected
    run.ours.step()
    assert calls == expected


def test_state_dict_hooks_run(kind):
    run = Run(kind, "partial", **STATEFUL[kind]).steps(1)
    calls = []
    run.ours.register_state_dict_pre_hook(lambda optimizer: calls.append("pre"))
    run.ours.register_state_dict_post_hook(lambda optimizer, state: {**state, "version": 2})
    run.ours.register_state_dict_pre_hook(lambda optimizer: calls.append("first"), prepend=True)
    assert run.ours.state_dict()["version"] == 2
    assert calls == ["first", "pre"]
    calls.clear()
    run.ours.dense_state_dict()
    assert calls == ["first", "pre"]


def test_load_state_dict_hooks_run_and_get_a_copy(kind):
    run, other = (Run(kind, "partial", **STATEFUL[kind]).steps(1) for _ in range(2))
    calls = []

    def pre(optimizer, state_dict):
        calls.append("pre")
        state_dict["note"] = "changed by the hook"
        return {**state_dict, "param_groups": [{**group, "lr": 0.25} for group in state_dict["param_groups"]]}

    other.ours.register_load_state_dict_pre_hook(pre)
    other.ours.register_load_state_dict_pre_hook(lambda *_: calls.append("first"), prepend=True)
    other.ours.register_load_state_dict_post_hook(lambda *_: calls.append("post"))
    state_dict = run.ours.state_dict()
    other.ours.load_state_dict(state_dict)
    assert calls == ["first", "pre", "post"]
    assert other.ours.param_groups[0]["lr"] == 0.25
    assert "note" not in state_dict
    assert state_dict["param_groups"][0]["lr"] != 0.25


def test_closure_is_called_once_with_gradients(kind):
    run, calls = Run(kind, "partial"), []

    def closure():
        calls.append(torch.is_grad_enabled())
        run.ours.zero_grad()
        loss = sum(param.square().sum() for param in run.params.values())
        loss.backward()
        return loss

    loss = run.ours.step(closure)
    assert calls == [True]
    assert float(loss.detach()) == pytest.approx(sum(float(value.square().sum()) for value in run.start.values()))
    for name, mask in run.masks.items():
        assert torch.equal(run.params[name][~mask], run.start[name][~mask])


def test_state_is_empty_before_the_first_step(kind):
    run = Run(kind, "partial", **STATEFUL[kind])
    assert run.ours.state_dict()["state"] == {}
    run.theirs.load_state_dict({**run.theirs.state_dict(), "state": {}})
    run.ours.load_state_dict(run.ours.state_dict())
    run.steps(2).check()


def test_groups_may_be_added_between_steps(kind):
    run = Run(kind, "partial", **STATEFUL[kind]).steps(2)
    masks = {"later": torch.arange(6) % 2 == 0}
    run.params["later"], run.dense["later"] = (torch.nn.Parameter(torch.ones(6)) for _ in range(2))
    run.start["later"], run.masks["later"] = torch.ones(6), masks["later"]
    run.ours.add_param_group({"params": [("later", run.params["later"])], "masks": masks, "lr": 0.125})
    run.theirs.add_param_group({"params": [("later", run.dense["later"])], "lr": 0.125})
    run.steps(3).check()
    assert "masks" not in run.ours.param_groups[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_dtype_has_no_effect(kind, dtype):
    """State is fp32 for any default dtype."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        weight = torch.nn.Parameter(torch.zeros(8, dtype=dtype))
        optimizer = CLASSES[kind][0]([weight], masks=[torch.arange(8) < 3], **STATEFUL[kind])
        weight.grad = torch.ones(8, dtype=dtype)
        optimizer.step()
    finally:
        torch.set_default_dtype(before)
    moments = [value for name, value in optimizer.state[weight].items() if name in optimizer.moments]
    assert moments
    assert {value.dtype for value in moments} == {torch.float32}
