from __future__ import annotations

import pytest
import torch

from opdkernels.distillation.jsonl import read_rows
from opdkernels.distillation.tracker import Tracker, effective_weights, optimizer_stats
from opdkernels.distillation.world import World
from opdkernels.masks import MaskSet
from opdkernels.optim import MaskedAdamW
from tests.distillation.conftest import model

ALONE = World()


def moved(own, share, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in own.parameters():
            p.mul_(1 + 0.1 * (torch.rand(p.shape) < share).to(p.dtype))


def test_snapshot_metrics_match_plain_tensors(tmp_path):
    own = model(0, initializer_range=0.2).bfloat16()
    copies = [torch.cat([p.detach().flatten().clone() for p in own.parameters()])]
    tracker = Tracker(tmp_path, own, step=0, load_start=lambda: None, num_trainable=10, world=ALONE)
    for step in (1, 2, 3):
        moved(own, 0.1, step)
        row = tracker.snapshot(step, own, {})
        copies.append(torch.cat([p.detach().flatten().clone() for p in own.parameters()]))
        changed = [copy != copies[0] for copy in copies[1:]]
        assert row["views"]["visible"]["frac_zero"] == pytest.approx(1 - changed[-1].double().mean().item(), rel=1e-12)
        assert row["since_last"]["visible"]["frac_zero"] == pytest.approx(
            (copies[-1] == copies[-2]).double().mean().item(), rel=1e-12
        )
        assert row["changed_any"] == pytest.approx(torch.stack(changed).any(0).double().mean().item(), rel=1e-12)
        assert sum(one["visible"]["numel"] for one in row["modules"].values()) == len(copies[0])
        assert row["trained"] == pytest.approx(10 / len(copies[0]), rel=1e-12)
    rows = tracker.finish()
    for row, here in zip(rows, changed, strict=True):
        both = (here & changed[-1]).sum().item()
        assert row["recall_vs_final"] == pytest.approx(both / changed[-1].sum().item(), rel=1e-12)
        assert row["precision_vs_final"] == pytest.approx(both / here.sum().item(), rel=1e-12)
    assert read_rows(tmp_path / "snapshots.jsonl") == rows
    assert MaskSet.load(tmp_path / "masks" / "step-000003.safetensors").num_active == changed[-1].sum().item()
    assert not list((tmp_path / "weights").iterdir())


def test_resume_removes_later_snapshots(tmp_path):
    own = model(0, initializer_range=0.2).bfloat16()
    tracker = Tracker(tmp_path, own, step=0, load_start=lambda: None, num_trainable=10, world=ALONE)
    moved(own, 0.1, 1)
    first = tracker.snapshot(1, own, {})
    tracker.on_save()
    saved = {name: p.detach().clone() for name, p in own.named_parameters()}
    moved(own, 0.1, 2)
    second = tracker.snapshot(2, own, {})
    with torch.no_grad():
        for name, p in own.named_parameters():
            p.copy_(saved[name])
    again = Tracker(tmp_path, own, step=1, load_start=lambda: None, num_trainable=10, world=ALONE)
    assert read_rows(tmp_path / "snapshots.jsonl") == [first]
    moved(own, 0.1, 2)
    assert again.snapshot(2, own, {}) == second


def test_interrupted_weight_copy_is_rewritten(tmp_path, monkeypatch):
    from opdkernels.distillation import tracker as track

    own, calls = model(0, initializer_range=0.2).bfloat16(), []

    def cut(model):
        for one in track.effective_weights(model):
            calls.append(one)
            if len(calls) == 13:  # of 27 weights
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(track, "local_weights", cut)
    with pytest.raises(KeyboardInterrupt):
        Tracker(tmp_path, own, step=0, load_start=lambda: None, num_trainable=10, world=ALONE)
    monkeypatch.undo()
    assert (
        Tracker(tmp_path, own, step=0, load_start=lambda: None, num_trainable=10, world=ALONE).snapshot(1, own, {})[
            "views"
        ]["stored"]["frac_zero"]
        == 1
    )


def test_snapshots_keep_two_copies_and_the_start(tmp_path):
    own = model(0, initializer_range=0.2).bfloat16()
    tracker = Tracker(tmp_path, own, step=0, load_start=lambda: None, num_trainable=10, world=ALONE)
    for step in range(1, 6):
        moved(own, 0.1, step)
        tracker.snapshot(step, own, {})
        if step == 2:
            tracker.on_save()
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [
        "snapshot-000002-0.bin",
        "snapshot-000005-0.bin",
        "start-0.bin",
    ]


def test_missing_start_copy_is_reloaded(tmp_path):
    own = model(0, initializer_range=0.2).bfloat16()
    start = model(0, initializer_range=0.2).bfloat16()
    moved(own, 0.1, 1)
    row = Tracker(tmp_path, own, step=1, load_start=lambda: start, num_trainable=10, world=ALONE).snapshot(2, own, {})
    assert 0.05 < 1 - row["views"]["visible"]["frac_zero"] < 0.15


def test_effective_weights_multiply_out_lora(options, tmp_path):
    from peft import LoraConfig, get_peft_model

    plain = model(0, initializer_range=0.2)
    names = [name for name, _ in plain.named_parameters()]
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    own = get_peft_model(plain, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    found = dict(effective_weights(own))
    assert sorted(found) == sorted(names)
    merged = dict(own.merge_and_unload().named_parameters())
    for name, value in found.items():
        torch.testing.assert_close(value, merged[name].detach(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])


def test_optimizer_stats_of_nonfinite_gradients_are_none():
    weight = torch.nn.Parameter(torch.ones(8))
    optimizer = MaskedAdamW([("w", weight)], masks={}, lr=1e-3, unmasked="train")
    weight.grad = torch.ones(8)
    optimizer.step()
    for wrong in (float("inf"), float("nan")):
        weight.grad[3] = wrong
        assert optimizer_stats(optimizer, ALONE)["gradient_momentum_cosine"] is None


def test_optimizer_stats_match_plain_tensors():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50))
    active = torch.rand(50) < 0.5
    optimizer = MaskedAdamW([("w", weight)], masks={"w": active}, lr=0.1)
    assert optimizer_stats(optimizer, ALONE) == {"sqrt_v_cv": None, "gradient_momentum_cosine": None}
    for _ in range(3):
        weight.grad = torch.randn(50)
        optimizer.step()
    weight.grad = torch.randn(50)
    state, found = optimizer.state[weight], optimizer_stats(optimizer, ALONE)
    root = state["exp_avg_sq"].sqrt()
    assert found["sqrt_v_cv"] == pytest.approx((root.std(correction=0) / root.mean()).item(), rel=1e-5)
    assert found["gradient_momentum_cosine"] == pytest.approx(
        torch.nn.functional.cosine_similarity(weight.grad[active], state["exp_avg"], 0).item(), rel=1e-5
    )


def test_unchanged_model_has_no_change(tmp_path):
    own = model(0)
    tracker = Tracker(tmp_path, own, step=0, load_start=lambda: None, num_trainable=10, world=ALONE)
    row = tracker.snapshot(1, own, {})
    assert row["views"]["stored"]["frac_zero"] == 1
    assert row["changed_any"] == 0
    (finished,) = tracker.finish()
    assert finished["recall_vs_final"] is None
    assert finished["precision_vs_final"] is None
