"""Metrics of matrices against what rounding alone gives: noise is as expected, structure is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opdkernels import analyze
from opdkernels.metrics.geometry_null import COVERAGES
from opdkernels.metrics.spectra import SUBSPACE
from tests.analysis.conftest import save

SAMPLE = Path(__file__).parents[2] / "examples" / "opd_sample"
NAME = "model.layers.5.self_attn.k_proj.weight"


def noise_of_the_same_energy(base: torch.Tensor, trained: torch.Tensor, seed: int) -> torch.Tensor:
    """Base plus dense normal noise of the visible energy of trained - base, rounded to bf16."""
    target = (trained.float() - base.float()).square().mean().sqrt()
    noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
    low, high = 0.0, 4 * float(target)
    for _ in range(40):
        size = (low + high) / 2
        reached = ((base.float() + size * noise).bfloat16().float() - base.float()).square().mean().sqrt()
        low, high = (size, high) if reached < target else (low, size)
    return (base.float() + size * noise).bfloat16()


def matrix_row(result) -> dict:
    (row,) = (a | b for a, b in zip(result.spectra.to_pylist(), result.geometry.to_pylist(), strict=True))
    return row


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The row of the matrix for a real run, noise of its energy, an update of its principal mask, and a low rank."""
    base, trained = (load_file(SAMPLE / f"{side}.safetensors")[NAME] for side in ("base", "seed0"))
    size = float((trained.float() - base.float()).square().mean().sqrt())
    generator = torch.Generator().manual_seed(5)
    u, s, vh = torch.linalg.svd(base.float(), full_matrices=False)
    score = (u[:, :12] * s[:12] @ vh[:12]).abs()
    principal = score >= score.flatten().kthvalue(int(0.9 * score.numel())).values
    masked = base.float() + 30 * size * principal * torch.randn(base.shape, generator=generator)
    directions = torch.randn(128, 2, generator=generator) @ torch.randn(2, 896, generator=generator)
    cases = {
        "real": trained,
        "noise": noise_of_the_same_energy(base, trained, 1),
        "principal": masked.bfloat16(),
        "low rank": (base.float() + 3 * size * directions).bfloat16(),
    }
    folder = tmp_path_factory.mktemp("pairs")
    before = save(folder / "base", {NAME: base})
    return {case: matrix_row(analyze(before, save(folder / case, {NAME: after}))) for case, after in cases.items()}


def deviations(row: dict, name: str) -> float:
    """How many deviations of the null the observed metric is from its expectation."""
    return (row[name] - row[f"{name}_null"]) / row[f"{name}_null_sd"]


def test_noise_of_the_same_energy_is_as_expected(rows):
    row = rows["noise"]
    for name in (*SUBSPACE, *COVERAGES):
        for label in ("5pct", "10pct", "20pct"):
            expected = row[f"{name}_{label}_null"]
            assert abs(deviations(row, f"{name}_{label}")) < 4 or abs(row[f"{name}_{label}"] / expected - 1) < 0.05
    assert abs(deviations(row, "drift")) < 4
    assert row["stable_rank_over_null"] == pytest.approx(1, abs=0.06)
    assert row["energy_16_over_null"] == pytest.approx(1, abs=0.03)


def test_principal_coverage_of_a_real_run_is_what_rounding_gives(rows):
    row = rows["real"]
    assert row["principal_coverage_10pct"] < 0.05  # far below uniform chance, 10 %
    assert row["principal_coverage_10pct_over_null"] == pytest.approx(1, abs=0.03)
    assert row["principal_not_low_coverage_10pct_over_null"] == pytest.approx(1, abs=0.03)
    assert abs(row["nonprincipal_or_low_coverage_10pct_minus_null"]) < 0.002
    assert abs(row["principal_coverage_10pct_z_magnitude"]) < 3
    assert row["energy_16_over_null"] > 2
    # Below k^2 / (m n) and above what rounding gives: by chance alone one would conclude the opposite.
    assert row["projection_10pct"] < row["projection_10pct_chance"]
    assert row["projection_10pct_over_null"] > 1.2


def test_planted_structure_is_not_as_expected(rows):
    masked, low_rank = rows["principal"], rows["low rank"]
    assert masked["principal_coverage_10pct_over_null"] > 2
    assert masked["principal_coverage_10pct_z_magnitude"] > 50
    assert low_rank["energy_16_over_null"] > 3
    assert low_rank["stable_rank_over_null"] < 0.2


def test_a_wider_pair_changes_everywhere_and_has_the_null_of_a_dense_update(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(90, 60, generator=generator)
    after = base + 1e-5 * torch.randn(90, 60, generator=generator)
    result = analyze(save(tmp_path / "a", {"w.weight": base}), save(tmp_path / "b", {"w.weight": after}))
    stored, visible = (a | b for a, b in zip(result.spectra.to_pylist(), result.geometry.to_pylist(), strict=True))
    assert (stored["view"], visible["view"]) == ("stored", "visible")
    assert stored["principal_coverage_10pct_null"] == pytest.approx(0.1, abs=1e-3)
    assert stored["projection_10pct_null"] == pytest.approx(stored["projection_10pct_chance"])
    assert visible["principal_coverage_10pct_null"] < 0.08
    assert visible["principal_coverage_10pct_over_null"] == pytest.approx(1, abs=0.25)


def test_matrices_without_a_null_have_no_expectation(tmp_path):
    """fp16 in the stored view, a matrix of zeros, and an unchanged one."""
    generator = torch.Generator().manual_seed(0)
    half = (0.02 * torch.randn(30, 20, generator=generator)).half()
    zeros = torch.zeros(30, 20, dtype=torch.bfloat16)
    base = {"a.weight": half, "b.weight": zeros, "c.weight": half.bfloat16()}
    after = {"a.weight": half + 0.001, "b.weight": zeros + 1, "c.weight": half.bfloat16()}
    result = analyze(save(tmp_path / "a", base), save(tmp_path / "b", after))
    rows = {(r["name"], r["view"]): r for r in result.geometry.to_pylist()}
    assert rows["a.weight", "stored"]["principal_coverage_10pct_null"] is None
    assert rows["a.weight", "visible"]["principal_coverage_10pct_null"] is not None
    assert rows["b.weight", "stored"]["projection_10pct_null"] is None
    assert rows["b.weight", "stored"]["principal_coverage_10pct_null"] == pytest.approx(0.1)
    assert {value for name, value in rows["c.weight", "stored"].items() if "_null" in name} == {None}
