"""Spectra and geometry of `analyze`: correct, bit-identical for any threads and after resume, or with a reason."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys

import pyarrow as pa
import pytest
import torch

from opdkernels import analyze
from opdkernels.analysis import matrix_spectra
from opdkernels.analysis.matrices import Matrix
from opdkernels.metrics.random_matrix import random_spectrum
from tests.analysis.conftest import save, trained, weights

RATIOS = {"1pct": 0.01, "5pct": 0.05, "10pct": 0.1, "20pct": 0.2}


def rows(table, **where):
    return [row for row in table.to_pylist() if all(row[k] == v for k, v in where.items())]


def without_time(table: pa.Table) -> pa.Table:
    return table.drop_columns(["seconds"])


def oracle(w: torch.Tensor, v: torch.Tensor) -> dict[str, float]:
    """Metrics of docs/outputs.md from fp64 SVDs."""
    w, v = w.double(), v.double()
    d = v - w
    s = torch.linalg.svdvals(d)
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    u2, sigma2, vh2 = torch.linalg.svd(v, full_matrices=False)
    r, (m, n) = len(s), w.shape
    p = s / s.sum()
    result = {
        "spectral_norm": s[0],
        "stable_rank": s.square().sum() / s[0] ** 2,
        "energy_16": s[:16].square().sum() / s.square().sum(),
        "energy_pct_10": s[: max(1, int(0.1 * r))].square().sum() / s.square().sum(),
        "effective_rank": (-(p * p.log()).sum()).exp(),
        "rank_1e-4": (s > 1e-4 * s[0]).sum(),
        "drift": (sigma2 - sigma).norm() / sigma.norm(),
        "drift_over_delta": (sigma2 - sigma).norm() / d.norm(),
    }
    changed = d != 0
    for label, ratio in RATIOS.items():
        k = max(1, int(ratio * r))
        a, b = u[:, :k], vh[:k].T
        result[f"projection_{label}"] = ((a.T @ d @ b).norm() / d.norm()) ** 2
        result[f"projection_left_{label}"] = ((a.T @ d).norm() / d.norm()) ** 2
        result[f"projection_right_{label}"] = ((d @ b).norm() / d.norm()) ** 2
        for side, x, y in (("left", a, u2[:, :k]), ("right", b, vh2[:k].T)):
            result[f"rotation_{side}_{label}"] = torch.linalg.svdvals(y - x @ (x.T @ y)).mean()
        score = ((a * sigma[:k]) @ b.T).abs().flatten()
        mask = torch.zeros(m * n, dtype=torch.bool)
        mask[score.topk(math.ceil(ratio * m * n)).indices] = True
        result[f"principal_coverage_{label}"] = (mask & changed.flatten()).sum().double() / changed.sum()
        result[f"principal_mask_changed_{label}"] = (mask & changed.flatten()).sum().double() / mask.sum()
    return {name: float(value) for name, value in result.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("large", [matrix_spectra.LARGE, 0], ids=["fp64", "fp32 blocks"])
def test_metrics_match_fp64_svd(dtype, large, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix_spectra, "LARGE", large)
    source = weights(dtype)
    after = trained(source, size=1e-4)
    result = analyze(save(tmp_path / "a", source), save(tmp_path / "b", after))
    matrices = [name for name, w in source.items() if w.ndim == 2]
    spectra, geometry = (rows(t, view="stored") for t in (result.spectra, result.geometry))
    assert [row["name"] for row in spectra] == [row["name"] for row in geometry]
    assert sorted(row["name"] for row in spectra) == sorted(matrices)
    for a, b in zip(spectra, geometry, strict=True):
        row, exact = a | b, oracle(source[a["name"]], after[a["name"]])
        mixed = large == 0 and max(row["m"], row["n"]) >= 2 * min(row["m"], row["n"]) and dtype != torch.float64
        assert row["method"] == ("gram_mixed" if mixed else "gram")
        for name, value in exact.items():
            limit = (
                {"rel": 1e-5}
                if name.startswith(("drift", "proj"))
                else {"abs": 1e-5, "rel": 0}
                if name.startswith("rot")
                else {"rel": 1e-8}
            )
            assert row[name] == pytest.approx(value, **limit), name


def test_both_views_of_wider_dtypes_and_one_of_bf16(tmp_path):
    for dtype, views in ((torch.bfloat16, {"stored"}), (torch.float32, {"stored", "visible"})):
        source = weights(dtype)
        result = analyze(save(tmp_path / f"a{dtype}", source), save(tmp_path / f"b{dtype}", trained(source)))
        assert set(result.spectra["view"].to_pylist()) == views


def test_results_do_not_depend_on_threads(pair):
    one, two = (analyze(*pair, threads=n) for n in (1, 2))
    assert without_time(one.spectra) == without_time(two.spectra)
    assert without_time(one.geometry) == without_time(two.geometry)


def test_resume_during_spectra_is_bit_exact(pair, tmp_path):
    out = tmp_path / "out"
    script = (
        "import glob, os, signal, sys; from opdkernels.analysis import matrix_spectra\n"
        "from opdkernels import analyze; from opdkernels.runs import store\n"
        "store.FLUSH_EVERY_S = -1; compute = matrix_spectra.exact_spectrum\n"
        "def until_killed(*a):\n"
        "    if len(glob.glob(sys.argv[3] + '/spectra/*.arrow')) >= 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return compute(*a)\n"
        "matrix_spectra.exact_spectrum = until_killed; analyze(*sys.argv[1:], threads=1)"
    )
    done = subprocess.run([sys.executable, "-c", script, *pair, str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    resumed, full = analyze(*pair, out), analyze(*pair)
    assert without_time(resumed.spectra) == without_time(full.spectra)
    assert without_time(resumed.geometry) == without_time(full.geometry)
    assert resumed.summary["spectra"] == full.summary["spectra"]


def test_missing_spectra_have_a_reason(tmp_path):
    source = weights()
    after = trained(source)
    after["model.layers.0.mlp.gate_proj.weight"] = source["model.layers.0.mlp.gate_proj.weight"]
    after["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    result = analyze(save(tmp_path / "a", source), save(tmp_path / "b", after), tmp_path / "out")
    reasons = {row["name"]: row["reason"] for row in rows(result.spectra) if row["reason"]}
    assert reasons == {
        "model.layers.0.mlp.gate_proj.weight": "delta is zero",
        "model.layers.1.self_attn.q_proj.weight": "non-finite: 1 coordinates of the tensor",
    }
    for row in (*rows(result.spectra, reason="delta is zero"), *rows(result.geometry, reason="delta is zero")):
        assert row.get("stable_rank") is None
        assert row.get("projection_10pct") is None
        assert row.get("drift") is None
    assert result.exit_status == 3  # of the NaN
    assert result.summary["spectra"]["without"] == {"delta is zero": 1, "non-finite": 1}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["spectra"] == result.summary["spectra"]


def test_memory_error_names_matrix_and_required_memory(tmp_path):
    source = {"a.q_proj.weight": 0.02 * torch.randn(1100, 900), "b.q_proj.weight": 0.02 * torch.randn(30, 20)}
    paths = [save(tmp_path / side, t) for side, t in (("a", source), ("b", {n: w + 1e-4 for n, w in source.items()}))]
    result = analyze(*paths, memory="64MB")
    large, small = rows(result.spectra, view="stored")
    assert "memory: 1100 x 900 needs" in large["reason"]
    assert "--spectra topk" in large["reason"]
    assert small["method"] == "gram"
    assert result.exit_status == 3
    least = large["reason"].split("--memory ")[1].split(" ")[0]
    assert analyze(*paths, memory=least, spectra="exact").exit_status == 0
    assert analyze(*paths, memory="64MB", spectra="topk").exit_status == 0


def test_nearly_singular_matrices_use_svd(tmp_path, monkeypatch):
    """The matrices have rank 5 and 24 top vectors are needed; long, wide and square."""
    generator = torch.Generator().manual_seed(0)
    source = {
        f"layers.0.{name}.weight": 0.1 * torch.randn(m, 5, generator=generator) @ torch.randn(5, n, generator=generator)
        for name, (m, n) in {"up_proj": (600, 120), "down_proj": (120, 600), "q_proj": (120, 120)}.items()
    }
    after = {name: w + 1e-3 * torch.randn(w.shape, generator=generator) for name, w in source.items()}
    paths = save(tmp_path / "a", source), save(tmp_path / "b", after)
    result = analyze(*paths)
    for a, b in zip(rows(result.spectra, view="stored"), rows(result.geometry, view="stored"), strict=True):
        row, exact = a | b, oracle(source[a["name"]], after[a["name"]])
        assert row["method"] == "svd"
        for name in (
            "stable_rank",
            "effective_rank",
            "drift",
            "projection_1pct",
            "projection_left_1pct",
            "rotation_right_1pct",
            "principal_coverage_1pct",
        ):
            assert row[name] == pytest.approx(exact[name], rel=1e-6), name
    monkeypatch.setattr(Matrix, "svd_memory", 10**9)
    refused = analyze(*paths, memory="500MB")
    assert refused.exit_status == 3
    assert all(
        "near to singular" in row["reason"] and "--memory 1001MB" in row["reason"] for row in rows(refused.spectra)
    )


def test_topk_bounds_hold_and_exact_replaces_it(pair, tmp_path):
    exact = {row["name"]: row for row in rows(analyze(*pair).spectra)}
    result = analyze(*pair, tmp_path / "out", spectra="topk")
    for row in rows(result.spectra):
        assert row["method"] == "topk"
        for name in ("spectral_norm", "stable_rank", "energy_1", "energy_16"):
            assert row[f"lower_{name}"] <= exact[row["name"]][name] * (1 + 1e-9)
            assert row[f"upper_{name}"] >= exact[row["name"]][name] * (1 - 1e-9)
            assert row[name] == pytest.approx(exact[row["name"]][name], rel=1e-3)
        assert row["effective_rank"] is None
    assert {row["projection_10pct"] for row in rows(result.geometry)} == {None}
    again = analyze(*pair, tmp_path / "out")
    assert {row["method"] for row in rows(again.spectra)} <= {"gram", "gram_mixed"}


def test_resume_with_paper_csv_adds_masks_of_unchanged_matrices(tmp_path):
    source = weights()
    after = trained(source)
    after["lm_head.weight"] = source["lm_head.weight"]
    paths = save(tmp_path / "a", source), save(tmp_path / "b", after)
    analyze(*paths, tmp_path / "grown")
    grown, full = (
        analyze(*paths, tmp_path / "grown", paper_csv=True),
        analyze(*paths, tmp_path / "whole", paper_csv=True),
    )
    assert without_time(grown.geometry) == without_time(full.geometry)
    assert (tmp_path / "grown" / "mask_overlap_metrics.csv").read_text() == (
        tmp_path / "whole" / "mask_overlap_metrics.csv"
    ).read_text()


def test_spectra_off_removes_spectra(pair, tmp_path):
    analyze(*pair, tmp_path / "out")
    result = analyze(*pair, tmp_path / "out", spectra="off")
    assert result.spectra is result.geometry is None
    assert not (tmp_path / "out" / "spectra.parquet").exists()
    assert "spectra" not in result.summary


def test_experts_are_matrices_and_convolutions_flattened(tmp_path):
    generator = torch.Generator().manual_seed(0)
    source = {
        "layers.0.mlp.experts.down_proj": torch.randn(3, 20, 12, generator=generator),
        "patch.conv.weight": torch.randn(8, 3, 4, 4, generator=generator),
    }
    after = {name: w + 1e-3 * torch.randn(w.shape, generator=generator) for name, w in source.items()}
    result = rows(analyze(save(tmp_path / "a", source), save(tmp_path / "b", after)).spectra, view="stored")
    assert [(row["name"], row["part"], row["m"], row["n"]) for row in result] == [
        *(("layers.0.mlp.experts.down_proj", part, 20, 12) for part in range(3)),
        ("patch.conv.weight", None, 8, 48),
    ]
    for part in range(3):
        exact = oracle(*(t["layers.0.mlp.experts.down_proj"][part] for t in (source, after)))
        assert result[part]["stable_rank"] == pytest.approx(exact["stable_rank"], rel=1e-6)
    exact = oracle(*(t["patch.conv.weight"].flatten(1) for t in (source, after)))
    assert result[3]["effective_rank"] == pytest.approx(exact["effective_rank"], rel=1e-6)


@pytest.mark.parametrize("io", ["read", "mmap"])
def test_concurrent_reads_are_correct(pair, io):
    assert without_time(analyze(*pair, io=io, threads=2).spectra) == without_time(
        analyze(*pair, io=io, threads=1).spectra
    )


def test_spectral_null_matches_random_matrices():
    for m, n in ((300, 300), (200, 800)):
        stable_rank, energy = random_spectrum(m, n)
        s = torch.linalg.svdvals(torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
        assert stable_rank == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=0.03)
        assert energy[16] == pytest.approx(float(s[:16].square().sum() / s.square().sum()), rel=0.03)


def test_random_update_matches_null_and_low_rank_does_not(tmp_path):
    generator = torch.Generator().manual_seed(0)
    source = {
        name: 0.02 * torch.randn(400, 200, generator=generator) for name in ("a.q_proj.weight", "b.q_proj.weight")
    }
    noise = 1e-4 * torch.randn(400, 200, generator=generator) * (torch.rand(400, 200, generator=generator) < 0.2)
    low_rank = 1e-4 * torch.randn(400, 2, generator=generator) @ torch.randn(2, 200, generator=generator)
    after = {
        "a.q_proj.weight": source["a.q_proj.weight"] + noise,
        "b.q_proj.weight": source["b.q_proj.weight"] + low_rank,
    }
    random, planted = rows(analyze(save(tmp_path / "a", source), save(tmp_path / "b", after)).spectra, view="stored")
    assert random["energy_16"] / random["energy_16_null"] == pytest.approx(1, abs=0.05)
    assert random["stable_rank"] / random["stable_rank_null"] == pytest.approx(1, abs=0.05)
    assert planted["energy_16"] / planted["energy_16_null"] > 4
    assert planted["stable_rank"] < 3


def test_edge_cases_have_expected_status_and_reason(tmp_path):
    """Each case has a page and a summary."""
    from opdkernels.analysis.text import format_analysis
    from opdkernels.report import render

    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    same = normal(6, 5)
    cases = {
        "no matrix": ((normal(5), normal(5)), 0, set()),
        "identical": ((same, same), 0, {"delta is zero"}),
        "no rows": ((torch.zeros(0, 5), torch.zeros(0, 5)), 3, set()),  # nothing was compared
        "zero source": ((torch.zeros(30, 20), normal(30, 20)), 0, {None}),
        "rank two": ((normal(60, 2) @ normal(2, 40), normal(60, 40)), 0, {None}),
        "one row": ((normal(1, 50), normal(1, 50)), 0, {None}),
        "huge": ((normal(30, 20) * 1e30, normal(30, 20) * 1e30), 0, {None}),
        "tiny": ((normal(30, 20) * 1e-38, normal(30, 20) * 1e-38), 0, {None}),
        "beyond squares": (
            (normal(9, 8).double() * 1e-200, normal(9, 8).double() * 1e-200),
            0,
            {"delta is below 1e-154: fp64 does not hold its squares"},
        ),
        "infinite": ((torch.full((4, 4), math.inf), normal(4, 4)), 3, {"non-finite: 16 coordinates of the tensor"}),
    }
    for name, ((source, after), status, reasons) in cases.items():
        for spectra in ("exact", "topk"):
            paths = [save(tmp_path / name / side, {"w.weight": t.clone()}) for side, t in (("a", source), ("b", after))]
            result = analyze(*paths, spectra=spectra, paper_csv=False)
            actual = {row["reason"] for row in rows(result.spectra) if row["view"] == "stored"}
            assert (name, result.exit_status, actual) == (name, status, reasons)
            assert format_analysis(result)
            assert "<h1" in render("analyze", result)
