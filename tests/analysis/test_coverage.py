"""Checkpoints as people save them: what is matched, how much of each side is compared, and what results say of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import opdkernels
from opdkernels.analysis.headers import inspect
from opdkernels.analysis.text import format_analysis, format_overlap, format_trajectory
from tests.analysis.conftest import save

Tensors = dict[str, torch.Tensor]
LAYERS = 2
LINEAR = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")


def model(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"model.layers.{layer}.{name}.weight": torch.randn(16, 16, generator=generator).bfloat16()
        for layer in range(LAYERS)
        for name in LINEAR
    }
    return tensors | {"model.norm.weight": torch.ones(16).bfloat16()}


def analyze(tmp_path: Path, base: Tensors, trained: Tensors, **options) -> opdkernels.Analysis:
    return opdkernels.analyze(
        save(tmp_path / "base", base), save(tmp_path / "trained", trained), spectra="off", **options
    )


RENAMED: dict[str, Callable[[str], str]] = {
    "merged peft": lambda n: "base_model.model." + n.replace("proj.", "proj.base_layer."),
    "deepspeed": lambda n: "module." + n,
    "lightning": lambda n: "_forward_module." + n,
    "policy": lambda n: "policy." + n,
    "body": lambda n: n.removeprefix("model."),
    "gamma": lambda n: n.replace("norm.weight", "norm.gamma"),
}


@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED)
def test_every_change_is_found_under_other_names(tmp_path: Path, rename: Callable[[str], str]) -> None:
    base = model()
    trained = {rename(name): tensor + (tensor.ndim == 2) for name, tensor in base.items()}
    result = analyze(tmp_path, base, trained)
    assert result.exit_status == 0
    assert result.summary["coverage"]["complete"]
    assert result.summary["views"]["stored"]["changed"] == 16 * 16 * LAYERS * len(LINEAR)


def test_half_of_a_model_is_not_identical(tmp_path: Path) -> None:
    base = model()
    half = {name: tensor for name, tensor in base.items() if ".1." not in name}
    result = analyze(tmp_path, base, half, out=tmp_path / "out")
    summary = result.summary
    assert result.exit_status == 3
    assert not summary["identical"]
    assert summary["coverage"]["fractions"] == {"base": 784 / 1552, "trained": 1.0}
    text = format_analysis(result)
    line = "Only 784 parameters were compared: 50.52 % of the base and 100 % of the trained checkpoint."
    assert line in text[0]
    assert not any(line.startswith("identical") for line in text)
    page = (tmp_path / "out" / "report.html").read_text()
    assert f'<p class="warning">{line}</p>' in page
    assert "<h1" in page
    assert ">Identical<" not in page


def test_tensors_without_a_counterpart_on_both_sides_end_with_status_3(tmp_path: Path) -> None:
    base = model() | {"model.scale": torch.ones(2).bfloat16()}
    trained = model() | {"model.strength": torch.ones(2).bfloat16()}
    result = analyze(tmp_path, base, trained)
    assert (result.exit_status, result.summary["identical"]) == (3, False)
    assert "Only 1,552 parameters were compared: 99.87 % of the base" in format_analysis(result)[0]
    assert inspect(tmp_path / "base", tmp_path / "trained")["coverage"] == result.summary["coverage"]


def test_a_small_head_on_one_side_is_sufficient_and_not_identical(tmp_path: Path) -> None:
    result = analyze(tmp_path, model(), model() | {"v_head.weight": torch.ones(1, 16).bfloat16()})
    assert (result.exit_status, result.summary["identical"]) == (0, False)


def test_complete_and_equal_is_identical_and_a_differing_buffer_is_not(tmp_path: Path) -> None:
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8)}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    same = analyze(tmp_path / "a", model() | frequencies, model() | frequencies)
    assert (same.exit_status, same.summary["identical"]) == (0, True)
    other = analyze(tmp_path / "b", model() | frequencies, model() | {name: t + 1 for name, t in frequencies.items()})
    assert (other.exit_status, other.summary["identical"]) == (0, False)
    assert any("buffers differ" in line for line in format_analysis(other))
    assert any("1 buffers, such as" in line and "1 differ" in line for line in format_analysis(other))


def test_buffers_are_no_coordinates(tmp_path: Path) -> None:
    causal = {f"h.{i}.attn.bias": torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32) for i in range(2)}
    trained = {name: tensor + 1 for name, tensor in model().items()}
    result = analyze(tmp_path, model() | causal, trained | causal)
    assert result.summary["views"]["stored"]["frac_zero"] == 0
    assert result.summary["matched"]["parameters"] == 1552
    assert [buffer["name"] for buffer in result.summary["buffers"]] == list(causal)


@pytest.mark.parametrize(("model_type", "compared"), [("gpt_oss", 0), ("qwen3_moe", 128), (None, 0)])
def test_square_experts_are_compared_only_where_their_layout_is_known(
    tmp_path: Path, model_type: str | None, compared: int
) -> None:
    fused = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    config = {"model_type": model_type} if model_type else None
    stem = "model.layers.0.mlp.experts"
    base = save(tmp_path / "base", {f"{stem}.down_proj": fused} | model(), config)
    split = {f"{stem}.{e}.down_proj.weight": fused[e] for e in range(2)}
    trained = save(tmp_path / "trained", split | model(), config)
    result = opdkernels.analyze(base, trained, spectra="off")
    assert result.summary["coverage"]["compared"] == 1552 + compared
    assert result.exit_status == (0 if compared else 3)
    reasons = [tensor["reason"] for tensor in result.summary["unmatched"]]
    assert any("transposed" in reason for reason in reasons) == (not compared)


def test_overlap_and_trajectory_say_how_much_they_cover(tmp_path: Path) -> None:
    base = save(tmp_path / "base", model())
    changed = {name: tensor + 1 for name, tensor in model().items()}
    half = {name: tensor for name, tensor in changed.items() if ".1." not in name}
    runs = [save(tmp_path / f"step-{i}", tensors) for i, tensors in enumerate((changed, half), 1)]
    overlap = opdkernels.overlap(base, *runs)
    assert overlap.exit_status == 3
    assert overlap.summary["coverage"]["parameters"] == {"base": 1552, "run A": 1552, "run B": 784}
    line = "Only 784 parameters were compared: 50.52 % of the base, 50.52 % of run A and 100 % of run B."
    assert format_overlap(overlap)[0] == line
    trajectory = opdkernels.trajectory(base, *runs, spectra="off")
    assert trajectory.exit_status == 3
    assert trajectory.summary["coverage"]["fractions"]["step 1"] == 784 / 1552
    assert format_trajectory(trajectory)[0] == line.replace("run A", "step 1").replace("run B", "step 2")
    complete = opdkernels.overlap(base, runs[0], runs[0])
    assert (complete.exit_status, complete.summary["coverage"]["complete"]) == (0, True)
