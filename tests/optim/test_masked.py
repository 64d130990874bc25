"""MaskedAdamW and MaskedSGD: frozen bits stay, active ones move as torch moves them, and state is as large as what is
active."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch

from opdkernels.errors import InputError
from opdkernels.masks import Mask, MaskSet
from opdkernels.ops import step as ops
from opdkernels.optim import MaskedAdamW, MaskedSGD, in_model_order
from tests.ops.step.test_step import RightSqrt, bits

SHAPES = {
    "embed.weight": (97, 31),
    "layers.0.weight": (64, 33),
    "layers.0.bias": (64,),
    "norm.weight": (33,),
    "one": (1,),
    "empty": (0, 4),
}
DTYPES = (torch.float32, torch.bfloat16)


def model_of(dtype=torch.float32, seed=0) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(dtype))
        for name, shape in SHAPES.items()
    }


def masks_of(density=0.2, seed=1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}


def give_grads(params, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = (1e-3 * torch.randn(param.shape, generator=generator)).to(param.dtype)


def same_state(a, b) -> bool:
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        mine, theirs = a.state.get(p, {}), b.state.get(q, {})
        if mine.keys() != theirs.keys() or not all(
            mine[k].dtype == theirs[k].dtype and torch.equal(mine[k], theirs[k]) for k in mine
        ):
            return False
    return True


OPTIMIZERS = {
    "adamw": (MaskedAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "amsgrad": (MaskedAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}),
    "maximize": (MaskedAdamW, torch.optim.AdamW, {"lr": 1e-2, "maximize": True}),
    "sgd": (MaskedSGD, torch.optim.SGD, {"lr": 1e-1}),
    "momentum": (MaskedSGD, torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "nesterov": (MaskedSGD, torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 1.0])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_active_match_torch_and_frozen_are_bit_identical(kind, density):
    ours, theirs, options = OPTIMIZERS[kind]
    params, dense, masks = model_of(), model_of(), masks_of(density)
    start = {name: p.detach().clone() for name, p in params.items()}
    optimizer = ours(params.items(), masks=masks, **options)
    reference = theirs(dense.values(), foreach=False, **options)
    for step in range(20):
        for group in (params, dense):
            give_grads(group.values(), step)
        optimizer.step()
        with RightSqrt():
            reference.step()
    for name, mask in masks.items():
        assert torch.equal(bits(params[name].detach())[mask], bits(dense[name].detach())[mask])
        assert torch.equal(bits(params[name].detach())[~mask], bits(start[name])[~mask])


def test_square_root_is_rounded_correctly(isa):
    """Against a square root in fp64 that is rounded once, in a step where nothing else is rounded but the division.

    torch's own square root on the CPU is off by one unit in the last place for some values on some processors.
    """
    generator = torch.Generator().manual_seed(0)
    exp_avg_sq = torch.rand(200_000, generator=generator) * 2.0 ** torch.randint(
        -90, 90, (200_000,), generator=generator
    )
    exp_avg = torch.randn(200_000, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(200_000))
    optimizer = MaskedAdamW(
        [weight], masks=[torch.ones(200_000, dtype=torch.bool)], lr=1.0, betas=(0.5, 0.5), eps=0.0, weight_decay=0.0
    )
    weight.grad = torch.zeros(200_000)
    optimizer.step()
    optimizer.state[weight]["step"].fill_(1000)  # bias corrections are 1 in fp32
    optimizer.state[weight]["exp_avg"].copy_(exp_avg)
    optimizer.state[weight]["exp_avg_sq"].copy_(exp_avg_sq)
    with torch.no_grad():
        weight.zero_()
    optimizer.step()
    root = np.sqrt((exp_avg_sq / 2).numpy().astype(np.float64)).astype(np.float32)
    assert np.array_equal(weight.detach().numpy(), -(exp_avg / 2).numpy() / root)


@pytest.mark.parametrize("hostile", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_frozen_gradients_have_no_effect(kind, dtype, hostile):
    """Gathered, never multiplied by zero."""
    ours, _, options = OPTIMIZERS[kind]
    params, clean, masks = model_of(dtype), model_of(dtype), masks_of()
    optimizers = [ours(group.items(), masks=masks, **options) for group in (params, clean)]
    for step in range(3):
        for group, optimizer in zip((params, clean), optimizers, strict=True):
            give_grads(group.values(), step)
            if group is params:
                for name, p in group.items():
                    p.grad[~masks[name]] = hostile
            optimizer.step()
    for name in params:
        assert torch.equal(bits(params[name].detach()), bits(clean[name].detach()))
    assert same_state(*optimizers)


@pytest.mark.parametrize("precision", ["split_master", "kahan"])
def test_bf16_is_stepped_in_fp32(precision):
    """Against AdamW in fp64 from the same gradients: no weight is further from it than bf16 rounds."""
    params, masks = model_of(torch.bfloat16), masks_of()
    wide = {name: torch.nn.Parameter(p.detach().double()) for name, p in params.items()}
    optimizer = MaskedAdamW(params.items(), masks=masks, lr=1e-3, precision=precision, seed=3)
    reference = torch.optim.AdamW(wide.values(), lr=1e-3, foreach=False)
    for step in range(30):
        give_grads(params.values(), step)
        for name, p in params.items():
            wide[name].grad = p.grad.double()
        optimizer.step()
        reference.step()
    worst = 0.0
    for name, mask in masks.items():
        if mask.any():
            wanted = wide[name].detach()[mask]
            unit = torch.maximum(wanted.abs(), torch.tensor(1e-3)) * 2**-8
            worst = max(worst, float(((params[name].detach()[mask].double() - wanted).abs() / unit).max()))
    assert worst <= {"split_master": 1.001, "kahan": 1.1}[precision]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1.76), (torch.bfloat16, 2.2)], ids=str)
def test_state_has_one_element_per_active_coordinate(dtype, limit):
    """Bytes per parameter at 20 % density, masks included, of all live tensors."""
    weight = torch.nn.Parameter(torch.zeros(1024, 1024, dtype=dtype))
    optimizer = MaskedAdamW([("w", weight)], masks={"w": torch.rand(1024, 1024) < 0.2})
    give_grads([weight], 0)
    optimizer.step()
    local_mask = optimizer._bindings_by_group[0][0].cached_local_mask
    held = (
        sum(t.nbytes for t in optimizer.state[weight].values())
        + local_mask.payload.nbytes
        + local_mask.block_counts.nbytes
    )
    assert held / weight.numel() <= limit
    active = int(local_mask.num_active)
    assert all(t.numel() in (1, active) for t in optimizer.state[weight].values())


def test_empty_mask_has_no_state_and_full_mask_is_dense():
    none, every = (torch.nn.Parameter(torch.ones(500)) for _ in range(2))
    dense = torch.nn.Parameter(torch.ones(500))
    optimizer = MaskedAdamW(
        [none, every], masks=[torch.zeros(500, dtype=torch.bool), torch.ones(500, dtype=torch.bool)]
    )
    reference = torch.optim.AdamW([dense], foreach=False)
    give_grads([none], 5)
    for group in ([every], [dense]):
        give_grads(group, 5)
    optimizer.step()
    with RightSqrt():
        reference.step()
    assert sum(t.nbytes for t in optimizer.state[none].values()) <= 16
    assert torch.equal(every, dense)
    assert torch.equal(none, torch.ones(500))


def test_small_updates_of_bf16_weights_are_not_lost():
    """At a rate of 1e-6 plain rounding moves next to nothing of what fp32 moves."""
    moved = {}
    for precision in ("split_master", "nearest", "fp32"):
        weight = torch.nn.Parameter(
            (0.02 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
        )
        if precision == "fp32":
            weight = torch.nn.Parameter(weight.detach().float())
        start = weight.detach().clone()
        optimizer = MaskedAdamW(
            [weight],
            masks=[torch.ones(20_000, dtype=torch.bool)],
            lr=1e-6,
            precision="split_master" if precision == "fp32" else precision,
        )
        drift = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
        for step in range(100):
            weight.grad = (drift + torch.randn(20_000, generator=torch.Generator().manual_seed(2 + step))).to(
                weight.dtype
            )
            optimizer.step()
        moved[precision] = float((weight.detach().bfloat16() != start.bfloat16()).float().mean())
    assert moved["split_master"] == pytest.approx(moved["fp32"], rel=0.01)
    assert moved["nearest"] < 0.2 * moved["fp32"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["load_state_dict", "weights_only", "pickle", "deepcopy"])
def test_state_dict_round_trip_is_bit_exact(dtype, how):
    """No dtype changes, and a resumed run is bit-identical."""
    params, masks = model_of(dtype), masks_of()
    optimizer = MaskedAdamW(params.items(), masks=masks, precision="split_master", weight_decay_target="init")
    for step in range(3):
        give_grads(params.values(), step)
        optimizer.step()
    if how in ("pickle", "deepcopy"):
        pair = (list(params.values()), optimizer)
        others, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
        assert other.param_groups[0]["params"][0] is others[0]
    else:
        others = [torch.nn.Parameter(p.detach().clone()) for p in params.values()]
        other = MaskedAdamW(zip(params, others, strict=True), masks=masks, weight_decay_target="init")
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True) if how == "weights_only" else optimizer.state_dict())
    assert same_state(optimizer, other)
    for group, one in ((list(params.values()), optimizer), (others, other)):
        give_grads(group, 9)
        one.step()
    assert all(torch.equal(bits(p.detach()), bits(q.detach())) for p, q in zip(params.values(), others, strict=True))
    assert same_state(optimizer, other)


def test_state_of_another_mask_raises_and_changes_nothing():
    params = model_of()
    optimizer = MaskedAdamW(params.items(), masks=masks_of())
    give_grads(params.values(), 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    other_params = model_of()
    other = MaskedAdamW(other_params.items(), masks=masks_of(seed=2))
    give_grads(other_params.values(), 0)
    other.step()
    with pytest.raises(InputError, match=r"embed\.weight belongs to another mask"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert all(
        torch.equal(before["state"][i][k], after["state"][i][k]) for i in before["state"] for k in before["state"][i]
    )
    damaged = copy.deepcopy(before)
    damaged["state"][0]["exp_avg"] = damaged["state"][0]["exp_avg"][1:]
    with pytest.raises(InputError, match="values in exp_avg"):
        optimizer.load_state_dict(damaged)
    dense = torch.optim.AdamW(model_of().values())
    give_grads(dense.param_groups[0]["params"], 0)
    dense.step()
    with pytest.raises(InputError, match="load_dense_state_dict"):
        optimizer.load_state_dict(dense.state_dict())


@pytest.mark.parametrize("kind", ["adamw", "amsgrad", "momentum"])
def test_dense_state_dict_round_trip(kind):
    """Torch's own optimizer resumes from ours, and ours from torch's."""
    ours, theirs, options = OPTIMIZERS[kind]
    params, dense, masks = model_of(), model_of(), masks_of()
    optimizer = ours(params.items(), masks=masks, **options)
    reference = theirs(dense.values(), foreach=False, **options)
    for step in range(3):
        give_grads(params.values(), step)
        optimizer.step()
    with torch.no_grad():
        for name, p in params.items():
            dense[name].copy_(p)
    reference.load_state_dict(optimizer.dense_state_dict())
    back = ours(model_of(seed=9).items(), masks=masks, **options)
    back.load_dense_state_dict(reference.state_dict())
    assert same_state(optimizer, back)
    for group, one in ((params, optimizer), (dense, reference)):
        give_grads(group.values(), 7)
        with RightSqrt():
            one.step()
    for name, mask in masks.items():
        assert torch.equal(bits(params[name].detach())[mask], bits(dense[name].detach())[mask])


def test_parameters_may_be_replaced():
    """State begins at the first step, of the parameter that is there then; none is held but in the groups."""
    params, masks = model_of(), masks_of()
    optimizer = MaskedAdamW(params.items(), masks=masks)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params.values()]
    optimizer.param_groups[0]["params"] = others
    give_grads(others, 0)
    optimizer.step()
    assert set(optimizer.state) == set(others)
    moved = [q for p, q in zip(params.values(), others, strict=True) if not torch.equal(p, q)]
    assert moved


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_grad_scale_and_found_inf_are_applied(found):
    """As GradScaler sets them; a skipped step changes nothing, its count included."""
    params, plain, masks = model_of(), model_of(), masks_of()
    optimizer = MaskedAdamW(params.items(), masks=masks, fused=True)
    assert optimizer._step_supports_amp_scaling
    assert not MaskedAdamW(plain.items(), masks=masks)._step_supports_amp_scaling
    for _ in range(2):
        give_grads(params.values(), 0)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params.values()]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(found)
    for p in params.values():
        p.grad = p.grad * 1024
    optimizer.step()
    same = all(torch.equal(p, old) for p, old in zip(params.values(), before[1], strict=True))
    assert same == (found == 1)
    assert float(optimizer.state_dict()["state"][0]["step"]) == 2 + (found == 0)


def test_grad_scaler_skips_and_steps():
    """With torch's own scaler on the CPU."""
    params, masks = model_of(), masks_of()
    optimizer = MaskedAdamW(params.items(), masks=masks, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight, mask = params["embed.weight"], masks["embed.weight"]
    start = weight.detach().clone()
    scaler.scale((weight * torch.inf)[mask][0]).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, start)
    assert not optimizer.state
    optimizer.zero_grad()
    scaler.scale(weight.square().sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(weight, start)
    assert torch.equal(weight[~mask], start[~mask])


def test_learning_rate_may_be_tensor_or_number():
    """`lr` as a tensor, changed in place."""
    results = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        params = model_of()
        optimizer = MaskedAdamW(params.items(), masks=masks_of(), lr=lr)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 4)
        for step in range(4):
            give_grads(params.values(), step)
            optimizer.step()
            scheduler.step()
        results.append([p.detach() for p in params.values()])
    assert all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(*results, strict=True))


def test_operator_compiles_with_fullgraph():
    """With fullgraph=True and scalars as a tensor, so that no step count or rate is a constant of the graph."""
    params, masks = model_of(), masks_of()
    optimizer = MaskedAdamW(params.items(), masks=masks)
    binding = optimizer._bindings_by_group[0][0]
    weight = params["embed.weight"].detach()
    local_mask = binding.local_mask(weight)
    m, v = (torch.zeros(local_mask.num_active) for _ in range(2))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def step(param, grad, scalars):
        torch.ops.opdkernels.masked_adamw_(
            [param],
            [grad],
            [local_mask.payload],
            [local_mask.block_counts],
            [m],
            [v],
            [],
            [],
            [],
            [],
            [],
            scalars,
            [0],
            [0],
            [0],
            None,
            None,
            None,
            False,
            0,
            0,
        )

    for t in range(1, 4):
        step(weight, torch.ones_like(weight), ops.adamw_scalars([t], 1e-3 / t, (0.9, 0.999), 1e-8, 0.0))
    assert len(graphs) == 1
    assert float(m[0]) == pytest.approx(1 - 0.9**3)


def test_set_masks_keeps_state_of_remaining_coordinates():
    """Coordinates that stay keep moments and step count, new ones start at zero, dropped ones keep their value."""
    params, dense = model_of(), model_of()
    first, second = masks_of(seed=1), masks_of(seed=2)
    optimizer = MaskedAdamW(params.items(), masks=first, lr=1e-2)
    olds = {name: p.detach().clone() for name, p in params.items()}
    reference = torch.optim.AdamW(dense.values(), lr=1e-2, foreach=False)
    for step in range(4):
        for group in (params, dense):
            give_grads(group.values(), step)
        optimizer.step()
        with RightSqrt():
            reference.step()
    dropped = {name: p.detach().clone() for name, p in params.items()}
    optimizer.set_masks(second)
    fresh = {name: torch.nn.Parameter(old) for name, old in olds.items()}
    younger = torch.optim.AdamW(fresh.values(), lr=1e-2, foreach=False)
    for step in range(4, 9):
        for group in (params, dense, fresh):
            give_grads(group.values(), step)
        optimizer.step()
        with RightSqrt():
            reference.step()
            younger.step()
    for name in SHAPES:
        a, b = first[name], second[name]
        now = bits(params[name].detach())
        assert torch.equal(now[a & b], bits(dense[name].detach())[a & b])
        assert torch.equal(now[b & ~a], bits(fresh[name].detach())[b & ~a])
        assert torch.equal(now[a & ~b], bits(dropped[name])[a & ~b])
    state = optimizer.state_dict()
    again = MaskedAdamW(model_of().items(), masks=second, lr=1e-2)
    again.load_state_dict(state)
    assert same_state(optimizer, again)
    with pytest.raises(ValueError, match="different step counts"):
        optimizer.dense_state_dict()


def test_set_masks_restores_dropped_coordinates():
    params = model_of(torch.bfloat16)
    start = {name: p.detach().clone() for name, p in params.items()}
    first, second = masks_of(seed=1), masks_of(seed=2)
    optimizer = MaskedAdamW(params.items(), masks=first, lr=1e-2, weight_decay_target="init")
    for step in range(4):
        give_grads(params.values(), step)
        optimizer.step()
    optimizer.set_masks(second, on_drop="restore")
    for name in SHAPES:
        gone = first[name] & ~second[name]
        assert torch.equal(bits(params[name].detach())[gone], bits(start[name])[gone])
    plain = MaskedAdamW(model_of().items(), masks=first)
    give_grads(plain.param_groups[0]["params"], 0)
    plain.step()
    with pytest.raises(ValueError, match="no initial values to restore"):
        plain.set_masks(second, on_drop="restore")


def test_weight_decay_pulls_active_weights_to_its_target():
    mask = {"w": torch.arange(1000) % 2 == 0}
    ends = {}
    for decay in ("zero", "init"):
        weight = torch.nn.Parameter(torch.ones(1000))
        optimizer = MaskedAdamW([("w", weight)], masks=mask, lr=0.1, weight_decay=0.5, weight_decay_target=decay)
        weight.grad = torch.ones(1000)
        optimizer.step()
        for _ in range(50):
            weight.grad = torch.zeros(1000)
            optimizer.step()
        assert torch.equal(weight[1::2], torch.ones(500))
        ends[decay] = float(weight.detach()[0])
    assert ends["zero"] < 0.1
    assert 0.8 < ends["init"] < 1


def test_clip_uses_norm_of_active_gradients():
    params, masks = model_of(), masks_of()
    optimizer = MaskedSGD(params.items(), masks=masks, lr=1.0)
    give_grads(params.values(), 0)
    wanted = torch.cat([p.grad[masks[name]] for name, p in params.items()]).norm()
    start = {name: p.detach().clone() for name, p in params.items()}
    norm = optimizer.clip_grad_norm_(float(wanted) / 4)
    assert float(norm) == pytest.approx(float(wanted), rel=1e-6)
    optimizer.step()
    moved = torch.cat([(start[name] - p.detach()).view(-1) for name, p in params.items()]).norm()
    assert float(moved) == pytest.approx(float(wanted) / 4, rel=1e-3)
    give_grads(params.values(), 0)
    middle = params["embed.weight"].detach().clone()
    optimizer.step()  # the clip was for one step
    active = masks["embed.weight"]
    assert torch.allclose(
        (middle - params["embed.weight"].detach())[active], params["embed.weight"].grad[active], atol=1e-6
    )


def test_transposed_parameters_are_stepped():
    base = torch.randn(33, 20)
    weight = torch.nn.Parameter(base.t())
    dense = torch.nn.Parameter(base.t().contiguous())
    mask = torch.rand(20, 33) < 0.3
    optimizer = MaskedAdamW([("w", weight)], masks={"w": mask})
    reference = MaskedAdamW([("w", dense)], masks={"w": mask})
    grad = torch.randn(33, 20)
    weight.grad, dense.grad = grad.t(), grad.t().contiguous()
    optimizer.step()
    reference.step()
    assert torch.equal(weight, dense)


def test_closure_runs_first_and_returns_loss():
    weight = torch.nn.Parameter(torch.ones(10))
    optimizer = MaskedSGD([weight], masks=[torch.arange(10) < 5], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = weight.sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 10
    assert weight.tolist() == [0.5] * 5 + [1.0] * 5


def test_masks_bind_by_name_or_position(tmp_path):
    """A set, a file of one, a mapping or a list; names with and without what trainers wrap them in; unnamed ones only
    in order."""
    params, masks = model_of(), masks_of()
    result = MaskSet({name: Mask.from_bool(mask) for name, mask in masks.items()})
    result.save(tmp_path / "m.safetensors")
    wrapped = [(f"module._orig_mod.{name}", p) for name, p in params.items()]
    for named, given in (
        (params.items(), result),
        (params.items(), tmp_path / "m.safetensors"),
        (wrapped, result),
        (params.values(), list(masks.values())),
    ):
        optimizer = MaskedAdamW(named, masks=given)
        assert [b.mask for b in optimizer._bindings_by_group[0]] == list(result.values())
    with pytest.raises(ValueError, match="parameter 0 has no name"):
        MaskedAdamW(params.values(), masks=result)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    shuffled = {name: torch.rand(p.shape) < 0.5 for name, p in reversed(list(model.named_parameters()))}
    ordered = in_model_order(shuffled, model)
    ordered.save(tmp_path / "ordered.safetensors")
    optimizer = MaskedAdamW(model.parameters(), masks=str(tmp_path / "ordered.safetensors"))
    for (name, _), binding in zip(model.named_parameters(), optimizer._bindings_by_group[0], strict=True):
        assert torch.equal(binding.mask.to_bool(), shuffled[name])


def test_bad_input_is_refused_by_name():
    params, masks = model_of(), masks_of()
    lacking = {name: mask for name, mask in masks.items() if name != "norm.weight"}
    for given, options, error, message in (
        (lacking, {}, ValueError, r"norm\.weight has no mask"),
        ({**masks, "one": torch.ones(2, dtype=torch.bool)}, {}, ValueError, r"one is \[1\], its mask \[2\]"),
        ({**masks, "one": torch.ones(1)}, {}, TypeError, "give a Mask or a bool tensor"),
        (masks, {"lr": -1.0}, ValueError, r"lr is -1\.0"),
        (masks, {"lr": "1e-6"}, ValueError, r"lr is '1e-6'.*in YAML"),
        (masks, {"eps": "1e-8"}, ValueError, "eps is '1e-8'"),
        (masks, {"betas": 0.9}, ValueError, "betas is 0.9"),
        (masks, {"lr": float("nan")}, ValueError, "lr is nan"),
        (masks, {"seed": 2**70}, ValueError, "seed"),
        (None, {}, TypeError, "masks are NoneType"),
        ({"other": torch.ones(3, dtype=torch.bool)}, {"unmasked": "freeze"}, ValueError, "no mask has the name"),
        (masks, {"betas": (1.0, 0.9)}, ValueError, "betas"),
        (masks, {"precision": "double"}, ValueError, "choose one of nearest"),
        (masks, {"weight_decay_target": "up"}, ValueError, "choose one of zero"),
        (masks, {"capturable": True}, TypeError, "capturable=True"),
        (masks, {"unmasked": "guess"}, ValueError, "unmasked must be"),
    ):
        with pytest.raises(error, match=message):
            MaskedAdamW(params.items(), masks=given, **options)
    with pytest.raises(ValueError, match="nesterov"):
        MaskedSGD(params.items(), masks=masks, nesterov=True)
    with pytest.raises(TypeError, match="float16"):
        MaskedAdamW([("w", torch.nn.Parameter(torch.zeros(3).half()))], masks={"w": torch.ones(3, dtype=torch.bool)})
    optimizer = MaskedAdamW(params.items(), masks=masks)
    before = [p.detach().clone() for p in params.values()]
    params["one"].grad = torch.ones(1).to_sparse()
    with pytest.raises(RuntimeError, match="one has a sparse gradient"):
        optimizer.step()
    optimizer.zero_grad()
    params["embed.weight"].data = torch.zeros(5, 5)
    params["embed.weight"].grad = torch.zeros(5, 5)
    with pytest.raises(ValueError, match=r"embed\.weight is now \[5, 5\]"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in list(zip(params.values(), before, strict=True))[1:])


def test_added_groups_and_unmasked_parameters():
    first, second, third = (torch.nn.Parameter(torch.ones(8)) for _ in range(3))
    optimizer = MaskedAdamW([("a", first)], masks={"a": torch.arange(8) < 4}, unmasked="train", lr=0.1)
    optimizer.add_param_group({"params": [("b", second)], "lr": 0.2})
    frozen = MaskedAdamW(
        [("a", torch.nn.Parameter(torch.ones(8))), ("c", third)], masks={"a": torch.arange(8) < 4}, unmasked="freeze"
    )
    for p in (first, second, third):
        p.grad = torch.ones(8)
    optimizer.step()
    frozen.step()
    assert (first != 1).sum() == 4
    assert (second != 1).all()
    assert torch.equal(third, torch.ones(8))
