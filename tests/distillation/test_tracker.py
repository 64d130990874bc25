from __future__ import annotations

import os

import pytest
import torch

from opdkernels.checkpoint import io
from opdkernels.distillation.jsonl import read_rows
from opdkernels.distillation.tracker import Tracker, WeightCopy, effective_weights, optimizer_stats
from opdkernels.distillation.world import World
from opdkernels.errors import InputError
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
    student_model = model(0, initializer_range=0.2).bfloat16()
    copies = [torch.cat([p.detach().flatten().clone() for p in student_model.parameters()])]
    tracker = Tracker(tmp_path, student_model, step=0, load_start=lambda: None, num_trainable=10, world=ALONE)
    for step in (1, 2, 3):
        moved(student_model, 0.1, step)
        row = tracker.snapshot(step, student_model, {})
        copies.append(torch.cat([p.detach().flatten().clone() for p in student_model.parameters()]))
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
    student_model = model(0, initializer_range=0.2).bfloat16()
    tracker = Tracker(tmp_path, student_model, step=0, load_start=lambda: None, num_trainable=10, world=ALONE)
    moved(student_model, 0.1, 1)
    first = tracker.snapshot(1, student_model, {})
    tracker.on_save()
    saved = {name: p.detach().clone() for name, p in student_model.named_parameters()}
    moved(student_model, 0.1, 2)
    second = tracker.snapshot(2, student_model, {})
    with torch.no_grad():
        for name, p in student_model.named_parameters():
            p.copy_(saved[name])
    again = Tracker(tmp_path, student_model, step=1, load_start=lambda: None, num_trainable=10, world=ALONE)
    assert read_rows(tmp_path / "snapshots.jsonl") == [first]
    moved(student_model, 0.1, 2)
    assert again.snapshot(2, student_model, {}) == second


def test_interrupted_weight_copy_is_rewritten(tmp_path, monkeypatch):
    from opdkernels.distillation import tracker as track

    student_model, calls = model(0, initializer_range=0.2).bfloat16(), []

    def cut(model):
        for one in track.effective_weights(model):
            calls.append(one)
            if len(calls) == 13:  # of 27 weights
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(track, "local_weights", cut)
    with pytest.raises(KeyboardInterrupt):
        Tracker(tmp_path, student_model, step=0, load_start=lambda: None, num_trainable=10, world=ALONE)
    monkeypatch.undo()
    assert (
        Tracker(tmp_path, student_model, step=0, load_start=lambda: None, num_trainable=10, world=ALONE).snapshot(
            1, student_model, {}
        )["views"]["stored"]["frac_zero"]
        == 1
    )


def test_snapshots_keep_two_copies_and_the_start(tmp_path):
    student_model = model(0, initializer_range=0.2).bfloat16()
    tracker = Tracker(tmp_path, student_model, step=0, load_start=lambda: None, num_trainable=10, world=ALONE)
    for step in range(1, 6):
        moved(student_model, 0.1, step)
        tracker.snapshot(step, student_model, {})
        if step == 2:
            tracker.on_save()
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [
        "snapshot-000002-0.bin",
        "snapshot-000005-0.bin",
        "start-0.bin",
    ]


def test_missing_start_copy_is_reloaded(tmp_path):
    student_model = model(0, initializer_range=0.2).bfloat16()
    start = model(0, initializer_range=0.2).bfloat16()
    moved(student_model, 0.1, 1)
    row = Tracker(tmp_path, student_model, step=1, load_start=lambda: start, num_trainable=10, world=ALONE).snapshot(
        2, student_model, {}
    )
    assert 0.05 < 1 - row["views"]["visible"]["frac_zero"] < 0.15


def test_effective_weights_multiply_out_lora(options, tmp_path):
    from peft import LoraConfig, get_peft_model

    plain = model(0, initializer_range=0.2)
    names = [name for name, _ in plain.named_parameters()]
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    student_model = get_peft_model(plain, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    result = dict(effective_weights(student_model))
    assert sorted(result) == sorted(names)
    merged = dict(student_model.merge_and_unload().named_parameters())
    for name, value in result.items():
        torch.testing.assert_close(value, merged[name].detach(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(result["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])


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
    state, result = optimizer.state[weight], optimizer_stats(optimizer, ALONE)
    root = state["exp_avg_sq"].sqrt()
    assert result["sqrt_v_cv"] == pytest.approx((root.std(correction=0) / root.mean()).item(), rel=1e-5)
    assert result["gradient_momentum_cosine"] == pytest.approx(
        torch.nn.functional.cosine_similarity(weight.grad[active], state["exp_avg"], 0).item(), rel=1e-5
    )


def test_unchanged_model_has_no_change(tmp_path):
    student_model = model(0)
    tracker = Tracker(tmp_path, student_model, step=0, load_start=lambda: None, num_trainable=10, world=ALONE)
    row = tracker.snapshot(1, student_model, {})
    assert row["views"]["stored"]["frac_zero"] == 1
    assert row["changed_any"] == 0
    (finished,) = tracker.finish()
    assert finished["recall_vs_final"] is None
    assert finished["precision_vs_final"] is None


@pytest.mark.parametrize("is_guarded", [True, False])
def test_weights_of_a_truncated_file_are_read_before_or_an_error(tmp_path, monkeypatch, is_guarded):
    """A mapping is never read without a guard: the process would end with SIGBUS."""
    if is_guarded and io.guard() is None:
        pytest.skip("no compiled kernels")
    if not is_guarded:
        monkeypatch.setattr(io, "guard", lambda: None)
    layer = torch.nn.Linear(128, 128, bias=False)
    copy = WeightCopy(tmp_path / "weights.bin", layer)
    os.truncate(tmp_path / "weights.bin", 4096)
    assert torch.equal(copy.tensors["weight"], layer.weight) == (not is_guarded)
    if is_guarded:
        with pytest.raises(InputError, match=r"weights\.bin was truncated while it was open; restore it"):
            copy.check()
    else:
        copy.check()
