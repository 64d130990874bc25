"""Gathered and masked gradients, and the active values as Parameters: the same steps as from dense gradients, with less
memory."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from opdkernels.optim import MaskedAdamW, MaskedParameters, MaskedSGD, gather_active_grads, gradients, zero_frozen_grads
from opdkernels.optim.gathered import GatheredGrad
from tests.optim.test_masked import bits


def small_model(dtype=torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).to(dtype)


def masks_for(model, density=0.2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) < density for name, p in model.named_parameters()}


def backward(model, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 32, generator=generator).to(next(model.parameters()).dtype)
    model(x).float().square().mean().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gathered_gradients_give_the_same_steps(dtype):
    """Bit for bit, clipping included, and no dense gradient stays."""
    plain, gathered = small_model(dtype), small_model(dtype)
    optimizers = [MaskedAdamW(m.named_parameters(), masks=masks_for(m), lr=1e-3) for m in (plain, gathered)]
    hooks = gather_active_grads(gathered, optimizers[1])
    for step in range(5):
        norms = []
        for model, optimizer in zip((plain, gathered), optimizers, strict=True):
            backward(model, step)
            norms.append(optimizer.clip_grad_norm_(0.01))
            optimizer.step()
            assert model is plain or all(isinstance(p.grad, GatheredGrad) for p in model.parameters())
            optimizer.zero_grad()
        assert norms[0] == norms[1]
    assert all(
        torch.equal(bits(p.detach()), bits(q.detach()))
        for p, q in zip(plain.parameters(), gathered.parameters(), strict=True)
    )
    hooks.remove()
    backward(gathered, 0)
    assert all(type(p.grad) is torch.Tensor for p in gathered.parameters())


def test_micro_batches_accumulate_in_fp32():
    model = small_model()
    masks = masks_for(model)
    optimizer = MaskedAdamW(model.named_parameters(), masks=masks)
    dense = small_model()
    gather_active_grads(model, optimizer)
    for step in range(3):
        backward(model, step)
        backward(dense, step)
    # sorted: the backward pass gathers the last parameter first
    gathered = [p.grad.active for p in model.parameters()]
    for got, (name, p) in zip(gathered, dense.named_parameters(), strict=True):
        torch.testing.assert_close(got, p.grad[masks[name]], rtol=1e-6, atol=1e-9)
        assert got.dtype == torch.float32
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_gathering_raises_for_another_model_and_other_masks():
    model = small_model()
    optimizer = MaskedAdamW(model.named_parameters(), masks=masks_for(model))
    with pytest.raises(ValueError, match="no parameter of this model"):
        gather_active_grads(small_model(), optimizer)
    hooks = gather_active_grads(model, optimizer)
    backward(model, 0)
    with pytest.raises(RuntimeError, match="gathered for the current masks"):
        optimizer.set_masks(masks_for(model, seed=2))
    hooks.remove()
    assert all(p.grad is None for p in model.parameters())
    optimizer.set_masks(masks_for(model, seed=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_trainers_clip_gathered_gradients_as_active_ones(dtype, scaled):
    """What Trainer and Accelerate call: a GradScaler's unscale_, torch's clip_grad_norm_, step, model.zero_grad."""
    models = small_model(dtype), small_model(dtype)
    masks = masks_for(models[0])
    optimizers = [MaskedAdamW(m.named_parameters(), masks=masks, lr=1e-2) for m in models]
    gather_active_grads(models[0], optimizers[0])
    zero_frozen_grads(models[1], optimizers[1])
    for step in range(4):
        norms = []
        for model, optimizer in zip(models, optimizers, strict=True):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
            for micro_batch in range(2):
                generator = torch.Generator().manual_seed(2 * step + micro_batch)
                x = torch.randn(16, 32, generator=generator).to(dtype)
                scaler.scale(model(x).float().square().mean() / 2).backward()
            scaler.unscale_(optimizer)
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.02)))
            clipped = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            assert clipped == pytest.approx(0.02, rel=2e-2)
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
            assert all(p.grad is None for p in model.parameters())
        assert norms[0] == pytest.approx(norms[1], rel=1e-5 if dtype == torch.float32 else 2**-7)
        assert norms[0] > 0.02
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 1e-3)


def test_grad_scaler_skips_a_step_of_gathered_gradients_that_overflow():
    model = small_model()
    optimizer = MaskedAdamW(model.named_parameters(), masks=masks_for(model))
    gather_active_grads(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    for fused in (None, True):
        optimizer.defaults["fused"] = fused
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(model(torch.full((1, 32), torch.inf)).sum()).backward()
        scaler.step(optimizer)
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        model.zero_grad()


def test_gathered_gradients_behave_as_gradients():
    """The operations between backward pass and step; any other one raises with the remedy."""
    layer = torch.nn.Linear(4, 2, bias=False)
    mask = torch.tensor([[True, False, False, True], [False, False, True, False]])
    optimizer = MaskedSGD(layer.named_parameters(), masks={"weight": mask}, lr=1.0)
    gather_active_grads(layer, optimizer)
    layer(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    grad, active = layer.weight.grad, torch.tensor([1.0, 4.0, 3.0])
    assert (grad.shape, grad.dtype, grad.device) == (mask.shape, torch.float32, torch.device("cpu"))
    assert torch.equal(grad.active, active)
    assert float(grad.norm()) == pytest.approx(float(active.norm()))
    assert torch.equal((grad * 2).active, 2 * active)
    assert torch.equal((grad / 2).active, active / 2)
    assert torch.equal((grad + grad).active, 2 * active)
    assert torch.equal((grad + torch.ones(2, 4)).active, active + 1)
    assert torch.equal(grad.clone().active, active)
    assert torch.equal(grad.active, active)
    grad.mul_(torch.tensor(3.0)).div_(2.0)
    assert torch.equal(grad.active, active * 1.5)
    assert "active=" in repr(grad)
    for operation in (torch.abs, torch.sum, lambda g: g * torch.ones(2, 4), lambda g: g.mul_(g), lambda g: g[0]):
        with pytest.raises(RuntimeError, match="use zero_frozen_grads"):
            operation(grad)
    layer.zero_grad(set_to_none=False)
    assert torch.equal(layer.weight.grad.active, torch.zeros(3))
    layer.bfloat16()
    assert layer.weight.grad.dtype == torch.bfloat16
    layer.zero_grad()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.weight, before)


def test_distributed_data_parallel_raises(monkeypatch):
    monkeypatch.setenv(
        "GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo"
    )  # else it looks up a host name
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(small_model())
        optimizer = MaskedAdamW(model.named_parameters(), masks=masks_for(small_model()))
        for hook in (gather_active_grads, zero_frozen_grads):
            with pytest.raises(RuntimeError, match="DistributedDataParallel reduces gradients after"):
                hook(model, optimizer)
        backward(model, 0)
        optimizer.step()  # dense gradients serve
    finally:
        torch.distributed.destroy_process_group()


def test_torch_clipping_sees_only_active_gradients():
    """Torch's own clip_grad_norm_, with NaN in frozen coordinates."""
    model, plain = small_model(), small_model()
    masks = masks_for(model)
    optimizer = MaskedAdamW(model.named_parameters(), masks=masks)
    zero_frozen_grads(model, optimizer)
    name, weight = next(iter(model.named_parameters()))
    frozen = torch.nonzero(~masks[name])[0].tolist()
    weight.register_hook(
        lambda grad: grad.index_put((torch.tensor(frozen[0]), torch.tensor(frozen[1])), torch.tensor(torch.nan))
    )
    backward(model, 0)
    backward(plain, 0)
    wanted = torch.cat([p.grad[masks[name]] for name, p in plain.named_parameters()]).norm()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert float(norm) == pytest.approx(float(wanted), rel=1e-6)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad[~masks[name]], torch.zeros_like(p.grad[~masks[name]]))
        assert not p.grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_parameters_with_torch_adamw_match_masked_adamw(dtype):
    """Torch's own AdamW on the compact values is MaskedAdamW; frozen bits stay; state is compact."""
    ours, theirs = small_model(dtype), small_model(dtype)
    masks = masks_for(ours)
    start = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    optimizer = MaskedAdamW(ours.named_parameters(), masks=masks, lr=1e-3)
    compact = MaskedParameters(theirs, masks)
    other = compact.attach(torch.optim.AdamW(compact.parameters(), lr=1e-3, foreach=False))
    for step in range(5):
        for model, one in ((ours, optimizer), (theirs, other)):
            backward(model, step)
            one.step()
            one.zero_grad()
    assert sum(p.numel() for p in compact.parameters()) == sum(int(m.sum()) for m in masks.values())
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=2**-7, atol=1e-7)
        assert torch.equal(bits(q.detach())[~masks[name]], bits(start[name])[~masks[name]])
        assert q.grad is None
    assert torch.nn.utils.clip_grad_norm_(compact.parameters(), 1.0) == 0
    compact.remove()


def test_masked_parameters_freeze_unmasked_weights():
    model = small_model()
    compact = MaskedParameters(model, {"0.weight": torch.ones(64, 32, dtype=torch.bool)})
    assert compact.names == ["0.weight"]
    assert [p.requires_grad for p in model.parameters()] == [True, False, False, False]
    with pytest.raises(ValueError, match="no mask has the name of a parameter: the first of 1 masks is other"):
        MaskedParameters(small_model(), {"other": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="no parameter of the model has a mask"):
        MaskedParameters(small_model(), {"0.weight": torch.zeros(64, 32, dtype=torch.bool)})


def test_gathering_gradients_of_dtensors_warns_that_a_trainers_clipping_does_not_see_them(monkeypatch):
    layer = torch.nn.Linear(2, 1, bias=False)
    optimizer = MaskedAdamW(layer.named_parameters(), masks={"weight": torch.tensor([[True, False]])})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gather_active_grads(layer, optimizer).remove()
    monkeypatch.setattr(gradients, "is_dtensor", lambda tensor: True)
    with pytest.warns(UserWarning, match=r"use optimizer\.clip_grad_norm_, or zero_frozen_grads"):
        gather_active_grads(layer, optimizer)


def test_compact_parameters_of_weights_that_share_memory_are_refused():
    buffer = torch.zeros(12)
    model = torch.nn.Sequential(torch.nn.Linear(2, 4, bias=False), torch.nn.Linear(2, 4, bias=False))
    model[0].weight.data, model[1].weight.data = buffer[:8].view(4, 2), buffer[4:].view(4, 2)
    masks = {f"{i}.weight": torch.ones(4, 2, dtype=torch.bool) for i in range(2)}
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight share memory"):
        MaskedParameters(model, masks)
