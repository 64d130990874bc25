"""Gathered and masked gradients, and the active values as Parameters: the same steps as from dense gradients, with less
memory."""

from __future__ import annotations

import pytest
import torch

from opdkernels.optim import MaskedAdamW, MaskedParameters, gather_active_grads, zero_frozen_grads
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
    """Point 5: bit for bit, clipping included, and no dense gradient stays."""
    plain, gathered = small_model(dtype), small_model(dtype)
    optimizers = [MaskedAdamW(m.named_parameters(), masks=masks_for(m), lr=1e-3) for m in (plain, gathered)]
    hooks = gather_active_grads(gathered, optimizers[1])
    for step in range(5):
        norms = []
        for model, optimizer in zip((plain, gathered), optimizers, strict=True):
            backward(model, step)
            norms.append(optimizer.clip_grad_norm_(0.01))
            optimizer.step()
            assert model is plain or all(p.grad is None for p in model.parameters())
            optimizer.zero_grad()
        assert norms[0] == norms[1]
    assert all(
        torch.equal(bits(p.detach()), bits(q.detach()))
        for p, q in zip(plain.parameters(), gathered.parameters(), strict=True)
    )
    hooks.remove()
    backward(gathered, 0)
    assert all(p.grad is not None for p in gathered.parameters())


def test_micro_batches_accumulate_in_fp32():
    """Point 5."""
    model = small_model()
    masks = masks_for(model)
    optimizer = MaskedAdamW(model.named_parameters(), masks=masks)
    dense = small_model()
    gather_active_grads(model, optimizer)
    for step in range(3):
        backward(model, step)
        backward(dense, step)
    # sorted: the backward pass gathers the last parameter first
    gathered = [gradient for _, gradient in sorted(optimizer._gathered_grads.items())]
    for got, (name, p) in zip(gathered, dense.named_parameters(), strict=True):
        torch.testing.assert_close(got, p.grad[masks[name]], rtol=1e-6, atol=1e-9)
        assert got.dtype == torch.float32
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_gathering_raises_for_grad_scaler_and_other_models():
    """Point 5: a GradScaler, which finds no gradients, DistributedDataParallel, which reduces later, and another
    model."""
    model = small_model()
    optimizer = MaskedAdamW(model.named_parameters(), masks=masks_for(model))
    with pytest.raises(ValueError, match="no parameter of this model"):
        gather_active_grads(small_model(), optimizer)
    gather_active_grads(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.ones(1, 32)).sum()).backward()
    with pytest.raises(RuntimeError, match="a GradScaler cannot see"):
        scaler.step(optimizer)
    scaler.scale(model(torch.ones(1, 32)).sum()).backward()
    with pytest.raises(RuntimeError, match="gathered for the current masks"):
        optimizer.set_masks(masks_for(model, seed=2))


def test_distributed_data_parallel_raises(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
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
    """Point 6: torch's own clip_grad_norm_, with NaN in frozen coordinates."""
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
    """Point 12, mode B: torch's own AdamW on the compact values is MaskedAdamW; frozen bits stay; state is compact."""
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
    with pytest.raises(ValueError, match="none of the 1 masks, other"):
        MaskedParameters(small_model(), {"other": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="no parameter of the model has a mask"):
        MaskedParameters(small_model(), {"0.weight": torch.zeros(64, 32, dtype=torch.bool)})
