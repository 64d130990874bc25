"""`overlap` of checkpoints: which coordinates are compared, chance levels, exclusions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from opdkernels import InputError, UsageError, overlap
from tests.analysis.conftest import save, trained, weights

SHAPE = (500, 2000)


def dense(tmp_path, *seeds, planted=None, dtype=torch.bfloat16):
    """A base and unrelated dense updates of it stored in bf16; `planted` coordinates change in all of them."""
    generator = torch.Generator().manual_seed(0)
    source = (0.03 * torch.randn(SHAPE, generator=generator)).to(dtype)
    paths = [save(tmp_path / "source", {"model.layers.0.mlp.up_proj.weight": source})]
    for seed in seeds:
        update = 3e-5 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        if planted is not None:
            update = torch.where(planted, 2e-3, update)
        paths.append(
            save(tmp_path / f"run{seed}", {"model.layers.0.mlp.up_proj.weight": (source.float() + update).to(dtype)})
        )
    return paths


def test_unrelated_updates_match_magnitude_chance(tmp_path):
    result = overlap(*dense(tmp_path, 1, 2))
    (pair,) = result.summary["pairs"]
    assert pair["over_uniform_global"] >= 1.6
    assert pair["over_magnitude"] == pytest.approx(1, abs=0.02)
    assert abs(pair["z_magnitude"]) < 4


def test_planted_shared_mask_is_far_above_chance(tmp_path):
    planted = torch.rand(SHAPE, generator=torch.Generator().manual_seed(9)) < 0.05
    (pair,) = overlap(*dense(tmp_path, 1, 2, planted=planted)).summary["pairs"]
    assert pair["over_magnitude"] > 1.2
    assert pair["z_magnitude"] > 10


def test_rows_in_common_are_explained_by_row_strata(tmp_path):
    rows = torch.zeros(SHAPE, dtype=torch.bool)
    rows[::10] = True
    (pair,) = overlap(*dense(tmp_path, 1, 2, planted=rows), strata=("row", "column")).summary["pairs"]
    assert pair["over_magnitude"] > 1.2
    assert pair["over_row"] == pytest.approx(1, abs=0.02)
    assert pair["over_column"] > 1.2


def test_metrics_match_direct_computation(tmp_path):
    source = weights()
    runs = [trained(source, seed=s) for s in (1, 2, 3)]
    paths = [save(tmp_path / str(i), w) for i, w in enumerate((source, *runs))]
    result = overlap(*paths, out=tmp_path / "out", csv=True)
    changed = [torch.cat([((r[n] - w).abs() > 1e-5).flatten() for n, w in source.items()]) for r in runs]
    by_name = {(p["run_a"], p["run_b"]): p for p in result.summary["pairs"]}
    for (a, b), (i, j) in zip((("A", "B"), ("A", "C"), ("B", "C")), ((0, 1), (0, 2), (1, 2)), strict=True):
        p, both = by_name[a, b], int((changed[i] & changed[j]).sum())
        assert (p["changed_a"], p["changed_b"], p["changed_both"]) == (
            int(changed[i].sum()),
            int(changed[j].sum()),
            both,
        )
        assert p["coverage_a"] == both / int(changed[i].sum())
        assert p["jaccard"] == both / int((changed[i] | changed[j]).sum())
        assert p["expected_uniform_global"] == pytest.approx(
            int(changed[i].sum()) * int(changed[j].sum()) / len(changed[0])
        )
    times = torch.stack(changed).sum(0)
    assert result.summary["changed_in_exactly"] == {str(k): int((times == k).sum()) for k in range(4)}
    assert len(result.tensors) == 3 * len(source)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == result.summary
    assert (tmp_path / "out" / "overlap.csv").read_text().count("\n") == 3 * len(source) + 1


def test_results_do_not_depend_on_threads_or_slices(tmp_path):
    paths = dense(tmp_path, 1, 2)
    a, b = overlap(*paths, threads=1), overlap(*paths, threads=2, memory="64MB", io="read")
    assert a.summary == b.summary
    assert a.tensors.equals(b.tensors)


def test_missing_tensors_are_excluded_with_reason(tmp_path):
    source = weights()
    one, two = trained(source, seed=1), trained(source, seed=2)
    del two["model.layers.0.mlp.gate_proj.weight"]
    two["model.layers.1.mlp.gate_proj.weight"] = two["model.layers.1.mlp.gate_proj.weight"][:5]
    result = overlap(*(save(tmp_path / str(i), w) for i, w in enumerate((source, one, two))))
    assert result.exit_status == 3
    assert result.summary["tensors"] == len(source) - 2
    reasons = {e["name"]: e["reason"] for e in result.summary["excluded"]}
    assert "not in run B" in reasons["model.layers.0.mlp.gate_proj.weight"]


def test_non_finite_coordinates_are_excluded(tmp_path):
    source = weights()
    one, two = trained(source, seed=1), trained(source, seed=2)
    two["lm_head.weight"][0, :2] = torch.tensor([np.nan, np.inf])
    result = overlap(*(save(tmp_path / str(i), w) for i, w in enumerate((source, one, two))))
    assert result.exit_status == 3
    assert result.summary["nonfinite"] == [{"name": "lm_head.weight", "coordinates": 2}]
    json.dumps(result.summary, allow_nan=False)


def test_unchanged_runs_have_null_metrics(tmp_path):
    same = save(tmp_path / "same", weights())
    result = overlap(same, same, same, out=tmp_path / "out")
    (pair,) = result.summary["pairs"]
    assert (pair["changed_both"], pair["coverage_a"], pair["over_magnitude"], pair["z_magnitude"]) == (
        0,
        None,
        None,
        None,
    )
    json.dumps(result.summary, allow_nan=False)
    assert "A run changed nothing" in (tmp_path / "out" / "report.html").read_text()


def test_incomparable_inputs_are_errors(tmp_path):
    a, b = save(tmp_path / "a", {"x": torch.ones(3)}), save(tmp_path / "b", {"x": torch.ones(4)})
    with pytest.raises(InputError):
        overlap(a, b, b)
    with pytest.raises(UsageError, match="2 to 16 runs"):
        overlap(a, a)
    with pytest.raises(UsageError, match="2 to 16 runs"):
        overlap(a, *[a] * 17)
