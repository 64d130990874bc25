"""What has gone wrong around masked optimizers, or could: states, gradients and weights that are not what a kernel
would read."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

from opdkernels.errors import InputError
from opdkernels.masks import Mask, MaskSet
from opdkernels.optim import (
    MaskedAdamW,
    MaskedParameters,
    MaskedSGD,
    gather_active_grads,
    in_model_order,
    zero_frozen_grads,
)

P = torch.nn.Parameter


def all_of(n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.bool)


def stepped(param, *, optimizer=MaskedAdamW, mask=None, steps=1, **options):
    made = optimizer([param], masks=[all_of(param.numel()).view(param.shape) if mask is None else mask], **options)
    for _ in range(steps):
        param.grad = torch.ones_like(param)
        made.step()
    return made


def test_moments_are_fp32_for_any_default_dtype():
    dense = P(torch.randn(4096).bfloat16())
    theirs = torch.optim.AdamW([dense])
    dense.grad = torch.ones_like(dense)
    theirs.step()
    weight = P(dense.detach().clone())
    ours = MaskedAdamW([weight], masks=[all_of(4096)])
    ours.load_dense_state_dict(theirs.state_dict())
    assert ours.state[weight]["exp_avg"].dtype == torch.float32
    weight.grad = torch.ones_like(weight)
    ours.step()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = stepped(P(torch.zeros(4096, dtype=torch.float32)), weight_decay_target="init")
        assert {t.dtype for t in other.state_dict()["state"][0].values()} <= {torch.float32, torch.int64}
        assert other.clip_grad_norm_(1.0).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_state_of_another_dtype_is_completed_or_raises():
    wide = stepped(P(torch.zeros(64)))
    weight = P(torch.zeros(64).bfloat16())
    narrow = MaskedAdamW([weight], masks=[all_of(64)])
    narrow.load_state_dict(wide.state_dict())
    weight.grad = torch.ones_like(weight)
    narrow.step()
    assert narrow.state[weight]["remainder"].dtype == torch.int16
    cast = copy.deepcopy(wide.state_dict())
    cast["state"][0]["exp_avg"] = cast["state"][0]["exp_avg"].bfloat16()
    wide.load_state_dict(cast)
    assert wide.state[wide.param_groups[0]["params"][0]]["exp_avg"].dtype == torch.float32
    drawn = stepped(P(torch.ones(64)), weight_decay_target="init")
    other = MaskedAdamW([P(torch.ones(64).bfloat16())], masks=[all_of(64)], weight_decay_target="init")
    with pytest.raises(InputError, match=r"has init_value of torch\.float32"):
        other.load_state_dict(drawn.state_dict())
    broken = copy.deepcopy(wide.state_dict())
    broken["state"][0] |= {"step_group": torch.full((64,), 200, dtype=torch.uint8), "group_steps": torch.ones(1)}
    with pytest.raises(InputError, match="step groups without a step count"):
        wide.load_state_dict(broken)


def test_invalid_state_dicts_raise():
    optimizer = stepped(P(torch.zeros(8)))
    for given, message in (
        ({}, "no optimizer state"),
        ({"state": {}, "param_groups": [{"params": [0, 1]}]}, r"groups of \[2\]"),
        (stepped(P(torch.zeros(8)), optimizer=MaskedSGD, momentum=0.9).state_dict(), "another optimizer's"),
    ):
        with pytest.raises(InputError, match=message):
            optimizer.load_state_dict(given)
    odd = copy.deepcopy(optimizer.state_dict())
    odd["param_groups"][0]["precision"] = "double"
    with pytest.raises(InputError, match="precision is 'double'"):
        optimizer.load_state_dict(odd)
    dense = P(torch.zeros(8))
    sgd = torch.optim.SGD([dense], momentum=0.9)
    dense.grad = torch.ones(8)
    sgd.step()
    with pytest.raises(InputError, match="another optimizer's"):
        optimizer.load_dense_state_dict(sgd.state_dict())


def test_loaded_learning_rate_is_a_copy():
    state = stepped(P(torch.zeros(8)), lr=torch.tensor(0.5)).state_dict()
    first, second = (MaskedAdamW([P(torch.zeros(8))], masks=[all_of(8)]) for _ in range(2))
    first.load_state_dict(state)
    second.load_state_dict(state)
    first.param_groups[0]["lr"].fill_(0.1)
    assert float(second.param_groups[0]["lr"]) == 0.5


def test_hooks_follow_the_mask():
    for hook in (gather_active_grads, zero_frozen_grads):
        layer, plain = (torch.nn.Linear(64, 64, bias=False) for _ in range(2))
        plain.load_state_dict(layer.state_dict())
        first = torch.zeros(64, 64, dtype=torch.bool)
        first[0, 0] = True
        optimizers = [MaskedSGD(one.named_parameters(), masks={"weight": first}, lr=1.0) for one in (layer, plain)]
        hook(layer, optimizers[0])
        for one, optimizer in zip((layer, plain), optimizers, strict=True):
            optimizer.set_masks({"weight": ~first})
            one(torch.ones(1, 64)).sum().backward()
            optimizer.step()
        assert torch.equal(layer.weight, plain.weight)


def test_step_consumes_gathered_gradients():
    """Hugging Face's Trainer calls model.zero_grad, never the optimizer's."""
    layer = torch.nn.Linear(4, 1, bias=False)
    optimizer = MaskedSGD(layer.named_parameters(), masks={"weight": all_of(4).view(1, 4)}, lr=1.0)
    hooks = gather_active_grads(layer, optimizer)
    start = layer.weight.detach().clone()
    for _ in range(3):
        layer(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        layer.zero_grad()
    assert torch.allclose(layer.weight, start - 3)
    layer(torch.ones(1, 4)).sum().backward()
    hooks.remove()
    layer.weight.grad = torch.full((1, 4), 100.0)
    optimizer.step()
    assert torch.allclose(layer.weight, start - 103)


def test_gradient_of_another_shape_raises_before_any_update():
    first, second = P(torch.zeros(8)), P(torch.zeros(8))
    optimizer = MaskedSGD([first, second], masks=[all_of(8), all_of(8)], lr=1.0)
    first.grad, second.grad = torch.ones(8), torch.ones(8)
    optimizer.state[second] = {}
    second.data = torch.zeros(16)
    optimizer._bindings_by_group[0][1].mask = Mask.from_bool(all_of(16))
    with pytest.raises(ValueError, match=r"is \[16\], its gradient \[8\]"):
        optimizer.step()
    assert torch.equal(first, torch.zeros(8))


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_weights_zeroed_externally_stay_finite(zero):
    weight = P((torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.01).bfloat16())
    optimizer = stepped(weight, steps=3)
    with torch.no_grad():
        weight.fill_(zero)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.isfinite(weight).all()
    assert float(weight.detach().abs().max()) < 0.01


def test_momentum_loads_from_dense_state_and_may_start_late():
    """As torch.optim.SGD has it, which keeps no step count."""
    for late in (False, True):
        weight, dense = P(torch.zeros(4)), P(torch.zeros(4))
        theirs = torch.optim.SGD([dense], lr=0.1, momentum=0.0 if late else 0.9)
        ours = MaskedSGD([weight], masks=[all_of(4)], lr=0.1, momentum=0.0 if late else 0.9)
        for step in range(4):
            if step == 2:
                if late:
                    ours.param_groups[0]["momentum"] = theirs.param_groups[0]["momentum"] = 0.9
                else:
                    weight = P(dense.detach().clone())
                    ours = MaskedSGD([weight], masks=[all_of(4)])
                    ours.load_dense_state_dict(theirs.state_dict())
            weight.grad, dense.grad = torch.full((4,), 1.0 + step), torch.full((4,), 1.0 + step)
            ours.step()
            theirs.step()
        assert torch.equal(weight, dense)


def test_clip_applies_to_one_step():
    weight = P(torch.zeros(4))
    optimizer = MaskedSGD([weight], masks=[all_of(4)], lr=1.0)
    weight.grad = torch.full((4,), torch.nan)
    optimizer.clip_grad_norm_(1.0)
    optimizer.zero_grad()
    weight.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(weight, -torch.ones(4))
    for wrong in (-1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="max_norm is"):
            optimizer.clip_grad_norm_(wrong)


def test_only_complete_name_components_are_removed():
    a, b, c = P(torch.zeros(4)), P(torch.zeros(4)), P(torch.zeros(4))
    optimizer = MaskedAdamW(
        [("emb_module.w", a), ("emb_w", b), ("submodule.w", c)],
        masks={"emb_w": all_of(4), "emb_module.w": ~all_of(4), "submodule.w": all_of(4)},
    )
    assert [binding.mask.num_active for binding in optimizer._bindings_by_group[0]] == [0, 4, 4]
    with pytest.raises(ValueError, match=r"norm\.weight has no mask"):
        MaskedAdamW([("layers.0.norm.weight", a), ("norm.weight", b)], masks={"layers.0.norm.weight": all_of(4)})


def test_unnamed_parameters_must_be_all_of_the_model():
    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(3)))
    masks = in_model_order({name: torch.rand(3, 3) < 0.5 for name, _ in model.named_parameters()}, model)
    with pytest.raises(ValueError, match="2 parameters without names and 3 masks"):
        MaskedAdamW(list(model.parameters())[1:], masks=masks)


def test_deleted_objects_are_freed():
    for make in (gather_active_grads, zero_frozen_grads):
        model = torch.nn.Linear(8, 8)
        optimizer = MaskedAdamW(
            model.named_parameters(), masks={name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()}
        )
        hooks = make(model, optimizer)
        gone = weakref.ref(model), weakref.ref(optimizer)
        del model, optimizer, hooks
        gc.collect()
        assert [one() for one in gone] == [None, None]
    model = torch.nn.Linear(8, 8)
    compact = MaskedParameters(model, {"weight": torch.rand(8, 8) < 0.5})
    gone = weakref.ref(model), weakref.ref(compact)
    del model, compact
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_an_optimizer_with_masks_from_a_file_is_copied_and_pickled(tmp_path):
    mask = Mask.from_bool(torch.arange(64) % 3 == 0)
    MaskSet({"w": mask}).save(tmp_path / "m.safetensors")
    weight = P(torch.zeros(64))
    optimizer = MaskedAdamW([("w", weight)], masks=tmp_path / "m.safetensors")
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other._bindings_by_group[0][0].mask == mask


def test_masks_take_what_their_docstring_says():
    """No bool tensor is kept, and masks of indices hold no bitmap."""
    flags = torch.rand(1 << 16) < 0.01
    optimizer = stepped(P(torch.zeros(1 << 16)), mask=flags)
    mask = optimizer._bindings_by_group[0][0].mask
    held = [value for value in vars(mask).values() if isinstance(value, torch.Tensor)]
    assert sum(t.nbytes for t in {t.data_ptr(): t for t in held}.values()) == 4 * int(flags.sum())
    bits = torch.full((8,), 0xFF, dtype=torch.uint8)
    kept = Mask.from_bitmap(bits, (64,))
    bits.zero_()
    assert kept.num_active == int(kept.to_bool().sum()) == 64


def test_failed_set_masks_changes_nothing():
    a, b = P(torch.zeros(8)), P(torch.zeros(8))
    optimizer = MaskedAdamW(
        [{"params": [a], "weight_decay_target": "init"}, {"params": [b]}], masks=[all_of(8), all_of(8)]
    )
    a.grad, b.grad = torch.ones(8), torch.ones(8)
    optimizer.step()
    before = a.detach().clone()
    with pytest.raises(ValueError, match="no initial values to restore"):
        optimizer.set_masks([~all_of(8), ~all_of(8)], on_drop="restore")
    assert torch.equal(a, before)
    assert optimizer._bindings_by_group[0][0].mask.num_active == 8


def test_options_changed_between_steps_apply_or_raise():
    weight = P(torch.zeros(8))
    optimizer = stepped(weight)
    optimizer.param_groups[0]["amsgrad"] = True
    weight.grad = torch.ones(8)
    optimizer.step()
    assert "max_exp_avg_sq" in optimizer.state[weight]
    optimizer.param_groups[0]["weight_decay_target"] = "init"
    with pytest.raises(InputError, match="lacks the initial weights"):
        optimizer.step()
    optimizer.param_groups[0].update(weight_decay_target="zero", lr="oops")
    count = float(optimizer.state[weight]["step"])
    with pytest.raises(ValueError, match="lr is 'oops'"):
        optimizer.step()
    assert float(optimizer.state[weight]["step"]) == count


@pytest.mark.parametrize(
    "flag", ["amsgrad", "maximize", "nesterov", "fused", "foreach", "differentiable", "capturable"]
)
def test_flags_in_quotes_raise(flag):
    """A string is true, also "false", as a configuration in YAML may give it."""
    optimizer = MaskedSGD if flag == "nesterov" else MaskedAdamW
    for value in ("false", "True", ""):
        with pytest.raises(ValueError, match=f"{flag} is '{value}'; give True or False, without quotes"):
            optimizer([P(torch.zeros(4))], masks=[all_of(4)], **{flag: value})
        made = optimizer([P(torch.zeros(4))], masks=[all_of(4)])
        made.param_groups[0][flag] = value
        with pytest.raises(ValueError, match="without quotes"):
            made.step()


def test_masks_that_are_no_dense_tensors_raise():
    for mask, message in ((all_of(4).to_sparse(), "layout torch.sparse_coo"), (all_of(4).to("meta"), "meta device")):
        with pytest.raises(TypeError, match=rf"the mask of w is a tensor .*{message}.*; give a dense tensor"):
            MaskedAdamW([("w", P(torch.zeros(4)))], masks={"w": mask})


def test_failed_add_param_group_changes_nothing():
    first, bad, good = P(torch.zeros(4)), P(torch.zeros(5)), P(torch.zeros(6))
    optimizer = MaskedAdamW([first], masks=[all_of(4)])
    with pytest.raises(ValueError, match=r"parameter 1 is \[5\], its mask \[6\]"):
        optimizer.add_param_group({"params": [bad], "masks": [all_of(6)]})
    with pytest.raises(ValueError, match="parameter 1 has no mask"):
        optimizer.add_param_group({"params": [good]})
    with pytest.raises(ValueError, match="the list has 2 masks and the optimizer 1 parameters"):
        optimizer.add_param_group({"params": [good], "masks": [all_of(6), all_of(6)]})
    optimizer.add_param_group({"params": [good], "masks": [all_of(6)]})
    assert [len(optimizer.param_groups), len(optimizer._bindings_by_group)] == [2, 2]


def test_hooks_of_masked_parameters_fire():
    """Trainers that reduce gradients do so in hooks on the parameters that they were given."""
    model = torch.nn.Linear(8, 8)
    compact = MaskedParameters(model, {"weight": torch.rand(8, 8) < 0.5})
    seen = []
    compact.values[0].register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    for _ in range(2):
        model(torch.ones(1, 8)).sum().backward()
    assert len(seen) == 2
    assert torch.equal(seen[1], 2 * seen[0])
    with pytest.raises(TypeError, match="bound to their model"):
        copy.deepcopy(compact)
    with torch.no_grad():
        model.weight.fill_(3.0)
    compact.pull_from_model()
    assert torch.equal(compact.values[0], torch.full_like(compact.values[0], 3.0))


def test_sparse_gradients_raise():
    for serve in (gather_active_grads, zero_frozen_grads):
        table = torch.nn.Embedding(8, 4, sparse=True)
        optimizer = MaskedAdamW(table.named_parameters(), masks={"weight": all_of(32).view(8, 4)})
        serve(table, optimizer)
        with pytest.raises(RuntimeError, match="weight has a sparse gradient"):
            table(torch.tensor([1])).sum().backward()
