"""`trajectory` against plain PyTorch on the checkpoints, and bit-identical after resume or with an added checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import opdkernels
from opdkernels import InputError, UsageError, analyze, trajectory
from opdkernels.analysis import matrix_spectra
from opdkernels.analysis.checkpoint_steps import order_checkpoints
from opdkernels.analysis.trajectory import load_trajectory
from opdkernels.runs import store
from opdkernels.runs.run_dir import load_finished
from tests.analysis.conftest import save, weights
from tests.in_process import run_cli

K = 16


def run_of(dtype=torch.bfloat16, steps=3, seed=0):
    """A base and checkpoints that drift along one direction, each with its own noise."""
    generator = torch.Generator().manual_seed(seed)
    source = weights(dtype)
    drift = {n: 2e-4 * torch.randn(w.shape, generator=generator) for n, w in source.items()}
    checkpoints = [
        {
            n: (w.float() + (t + 1) * drift[n] + 1e-4 * torch.randn(w.shape, generator=generator)).to(dtype)
            for n, w in source.items()
        }
        for t in range(steps)
    ]
    return source, checkpoints


@pytest.fixture
def run(tmp_path):
    source, checkpoints = run_of()
    return save(tmp_path / "base", source), [
        save(tmp_path / f"step_{10 * (t + 1):04d}", c) for t, c in enumerate(checkpoints)
    ]


def visible_change(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (b.bfloat16().float() - a.bfloat16().float()).bfloat16().float().abs()


def row_of(result, step, view, **where):
    (row,) = (
        r
        for r in result.table.to_pylist()
        if r["step"] == step and r["view"] == view and all(r[k] == v for k, v in where.items())
    )
    return row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_metrics_across_checkpoints_match_torch(tmp_path, dtype):
    source, checkpoints = run_of(dtype)
    result = trajectory(
        save(tmp_path / "base", source), *(save(tmp_path / f"checkpoint-{t}", c) for t, c in enumerate(checkpoints, 1))
    )
    flat = torch.cat([w.flatten() for w in source.values()])
    run = [torch.cat([c[n].flatten() for n in source]) for c in checkpoints]
    threshold = float(torch.tensor(1e-5).bfloat16())
    sets = [visible_change(flat, w) > threshold for w in run]
    deltas = [w.double() - flat.double() for w in run]
    for t, (own, delta) in enumerate(zip(sets, deltas, strict=True)):
        stored, visible = (row_of(result, t + 1, view, by="model") for view in ("stored", "visible"))
        assert visible["recall_vs_final"] == (own & sets[-1]).sum().item() / sets[-1].sum().item()
        assert visible["precision_vs_final"] == (own & sets[-1]).sum().item() / own.sum().item()
        moved = visible_change(run[t - 1] if t else flat, run[t]) > 0
        assert visible["frac_changed_since_previous"] == moved.double().mean().item()
        assert stored["cosine_final"] == pytest.approx(
            torch.nn.functional.cosine_similarity(delta, deltas[-1], 0).item(), rel=1e-6
        )
        since = (run[t].double() - (run[t - 1] if t else flat).double()).norm() / flat.double().norm()
        assert stored["relative_norm_since_previous"] == pytest.approx(since.item(), rel=1e-6)
    last = row_of(result, 3, "stored", by="model")
    assert last["cosine_final"] == 1
    assert last["similarity_left_16"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("spectra", ["exact", "topk"])
def test_top_directions_match_svd(run, tmp_path, spectra):
    base, checkpoints = run
    result = trajectory(base, *checkpoints, spectra=spectra)
    source, steps = run_of()
    for module in ("gate_proj", "down_proj", "o_proj"):
        for t, checkpoint in enumerate(steps):
            left, right = [], []
            for name in (n for n in source if module in n):
                (u, _, v), (u2, _, v2) = (
                    torch.linalg.svd(c[name].double() - source[name].double(), full_matrices=False)
                    for c in (checkpoint, steps[-1])
                )
                left.append((u[:, :K].T @ u2[:, :K]).square().sum().item() / K)
                right.append((v[:K] @ v2[:K].T).square().sum().item() / K)
            row = row_of(result, 10 * (t + 1), "stored", by="module", module=module)
            tolerance = 1e-9 if spectra == "exact" else 1e-3
            assert row["similarity_left_16"] == pytest.approx(sum(left) / len(left), abs=tolerance)
            assert row["similarity_right_16"] == pytest.approx(sum(right) / len(right), abs=tolerance)
            sides = {"gate_proj": (96, 32), "down_proj": (32, 96), "o_proj": (32, 32)}[module]
            assert (row["similarity_left_16_chance"], row["similarity_right_16_chance"]) == tuple(
                K / side for side in sides
            )


def test_every_checkpoint_equals_its_own_analysis(run, tmp_path):
    base, checkpoints = run
    result = trajectory(base, *checkpoints, out=tmp_path / "out")
    assert [folder.name for folder in result.folders] == ["000010", "000020", "000030"]
    for folder, checkpoint in zip(result.folders, checkpoints, strict=True):
        own, alone = opdkernels.load(folder), analyze(base, checkpoint)
        assert own.tensors == alone.tensors
        assert own.groups == alone.groups
        for name in ("spectra", "geometry"):
            ours, theirs = (getattr(one, name).drop_columns(["seconds"]).to_pylist() for one in (own, alone))
            for a, b in zip(ours, theirs, strict=True):
                assert a == pytest.approx(b, rel=1e-9, abs=1e-12)
        assert (folder / "report.html").exists()
    alone = analyze(base, checkpoints[0])
    row = row_of(result, 10, "stored", by="model")
    ranks = [r["stable_rank"] for r in alone.spectra.to_pylist()]
    assert row["stable_rank"] == pytest.approx(sum(ranks) / len(ranks))
    assert row["relative_norm"] == alone.summary["views"]["stored"]["relative_norm"]


def test_added_checkpoint_resumes_without_refactoring(run, tmp_path, monkeypatch):
    base, checkpoints = run
    factored_names = []
    factor_of = matrix_spectra.factor_of
    monkeypatch.setattr(
        matrix_spectra,
        "factor_of",
        lambda matrix, *rest: factored_names.append(matrix.match.name) or factor_of(matrix, *rest),
    )
    trajectory(base, *checkpoints[:2], out=tmp_path / "out")
    factored = len(factored_names)
    assert factored == sum(w.ndim == 2 for w in weights().values())  # once for both checkpoints
    kept = sorted((tmp_path / "out" / "factors").iterdir())
    before = {path: path.stat().st_mtime_ns for path in kept}
    grown = trajectory(base, *checkpoints, out=tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "out" / "factors").iterdir())} == before
    full = trajectory(base, *checkpoints)
    assert grown.table == full.table


def test_damaged_or_deleted_factor_is_recomputed(run, tmp_path):
    base, checkpoints = run
    trajectory(base, *checkpoints[:2], out=tmp_path / "out")
    one, other, *_ = sorted((tmp_path / "out" / "factors").iterdir())
    one.write_bytes(one.read_bytes()[:100])
    other.unlink()
    assert trajectory(base, *checkpoints, out=tmp_path / "out").table == trajectory(base, *checkpoints).table


def test_resume_is_bit_exact(run, tmp_path):
    base, checkpoints = run
    out = tmp_path / "out"
    script = (
        "import glob, os, signal, sys; from opdkernels.analysis import matrix_spectra\n"
        "from opdkernels import trajectory; from opdkernels.runs import store\n"
        "store.FLUSH_EVERY_S = -1; compute = matrix_spectra.exact_spectrum\n"
        "def until_killed(*a):\n"
        "    if len(glob.glob(sys.argv[2] + '/similarity/*.arrow')) >= 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return compute(*a)\n"
        "matrix_spectra.exact_spectrum = until_killed\n"
        "trajectory(sys.argv[1], *sys.argv[3:], out=sys.argv[2], threads=1)"
    )
    done = subprocess.run([sys.executable, "-c", script, base, str(out), *checkpoints], check=False)
    assert done.returncode == -signal.SIGKILL
    assert trajectory(base, *checkpoints, out=out).table == trajectory(base, *checkpoints).table


def test_more_checkpoints_than_the_kernel_takes_at_once(tmp_path):
    source, checkpoints = run_of(steps=18)
    paths = [save(tmp_path / f"step_{t:02d}", c) for t, c in enumerate(checkpoints, 1)]
    base = save(tmp_path / "base", source)
    many, few = trajectory(base, *paths, spectra="off"), trajectory(base, paths[0], paths[-1], spectra="off")
    for name in ("recall_vs_final", "precision_vs_final", "shared_over_magnitude"):
        assert row_of(many, 1, "visible", by="model")[name] == row_of(few, 1, "visible", by="model")[name]


def test_checkpoints_are_sorted_by_step():
    def order(*paths, steps=()):
        return [(point.step, point.label) for point in order_checkpoints(paths, steps)[0]]

    assert order("r/checkpoint-1000", "r/checkpoint-200") == [(200, "200"), (1000, "1000")]
    assert order("global_step_20/actor", "global_step_5/actor") == [(5, "5"), (20, "20")]
    assert order("checkpoint-1000", "checkpoint-200", "final") == [(200, "200"), (1000, "1000"), (None, "final")]
    assert order("checkpoint-1000", "runs/best") == [(1000, "1000"), (None, "final")]
    assert order("step_1", "x/last", "x/best") == [(1, "1"), (None, "last"), (None, "best")]
    assert order("a/step_20", "b/step_20") == [(None, "a/step_20"), (None, "b/step_20")]
    assert order("last", "first") == [(None, "last"), (None, "first")]
    assert order("a", "a") == [(None, "a (1)"), (None, "a (2)")]
    assert order("step_" + 20 * "9", "step_1")[0] == (1, "1")
    assert order("b", "step_7", steps=(40, 20)) == [(20, "20"), (40, "40")]
    for paths, note in (
        (("step_1", "final"), "final names no step: it is shown last, as final; give their steps with --steps"),
        (("a", "b"), "in the order given"),
        (("a/step_1", "b/step_1"), "same step"),
    ):
        assert note in order_checkpoints(paths)[1][0]
    assert not order_checkpoints(("step_1", "step_2"))[1]
    for steps in ((1,), (1, 2, 3), (5, 5)):
        with pytest.raises(UsageError, match=r"--steps"):
            order_checkpoints(("a", "b"), steps)


def test_step_of_the_trainer_is_used_where_the_name_has_none(tmp_path):
    for name, content in (
        ("best", '{"global_step": 40}'),
        ("checkpoint-20", '{"global_step": 999}'),
        ("text", '{"global_step": "50"}'),
        ("list", "[1]"),
        ("damaged", "{"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(content)
    points, notes = order_checkpoints([str(tmp_path / name) for name in ("best", "checkpoint-20")])
    assert [(point.step, Path(point.path).name) for point in points] == [(20, "checkpoint-20"), (40, "best")]
    assert notes == []
    for name in ("text", "list", "damaged"):
        assert order_checkpoints([str(tmp_path / name), str(tmp_path / "best")])[0][1].label == "final"


def test_a_checkpoint_without_a_step_gets_no_number(tmp_path):
    """In tables, text and charts it is 'final' on an axis of categories, not a step after the last one."""
    from opdkernels.analysis.text import format_trajectory
    from opdkernels.report import render

    source, checkpoints = run_of(steps=3)
    folders = [
        save(tmp_path / name, c)
        for name, c in zip(("base", "step_20", "step_40", "merged"), (source, *checkpoints), strict=True)
    ]
    result = trajectory(*folders, out=tmp_path / "out", spectra="off")
    assert [(step["step"], step["label"]) for step in result.summary["steps"]] == [
        (20, "20"),
        (40, "40"),
        (None, "final"),
    ]
    assert {(row["step"], row["label"]) for row in result.table.to_pylist()} == {
        (20, "20"),
        (40, "40"),
        (None, "final"),
    }
    page, text = render("trajectory", result), "\n".join(format_trajectory(result))
    assert "41" not in re.findall(r"<text[^>]*>([^<]*)</text>", page)
    assert ">final</text>" in page
    assert "final" in text
    assert "At step 20 of final" in page
    numbered = trajectory(*folders, spectra="off", steps=(1, 2, 50))
    assert [step["step"] for step in numbered.summary["steps"]] == [1, 2, 50]
    for steps in (5, None, torch.tensor(5)):
        with pytest.raises(UsageError, match=r"option steps is .*: Input should be a valid tuple"):
            trajectory(*folders, spectra="off", steps=steps)


def test_unchanged_checkpoint_has_null_metrics(tmp_path):
    source, checkpoints = run_of(steps=2)
    result = trajectory(
        *(save(tmp_path / name, c) for name, c in (("base", source), ("step_1", source), ("step_2", checkpoints[1])))
    )
    first = row_of(result, 1, "stored", by="model")
    assert (first["cosine_final"], first["similarity_left_16"], first["relative_norm"]) == (None, None, 0)
    visible = row_of(result, 1, "visible", by="model")
    assert (visible["recall_vs_final"], visible["precision_vs_final"]) == (0, None)
    still = trajectory(*(save(tmp_path / name, source) for name in ("base", "step_1", "step_2")))
    assert row_of(still, 2, "visible", by="model")["recall_vs_final"] is None
    assert still.exit_status == 0


def test_missing_tensors_are_reported_and_excluded(tmp_path):
    source, checkpoints = run_of()
    checkpoints[0]["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    del checkpoints[1]["model.layers.1.self_attn.o_proj.weight"]
    checkpoints[2]["lm_head.weight"] = torch.zeros(3, 3, dtype=torch.bfloat16)
    result = trajectory(
        save(tmp_path / "base", source), *(save(tmp_path / f"step_{t}", c) for t, c in enumerate(checkpoints, 1))
    )
    assert result.exit_status == 3
    assert [step["exit_status"] for step in result.summary["steps"]] == [3, 0, 3]
    reasons = {e["name"]: e["reason"] for e in result.summary["excluded"]}
    assert "step 2" in reasons["model.layers.1.self_attn.o_proj.weight"]
    assert "step 3" in reasons["lm_head.weight"]
    for step in (1, 2, 3):
        assert 0 < row_of(result, step, "visible", by="model")["recall_vs_final"] <= 1
        assert row_of(result, step, "stored", by="model")["similarity_left_16"] > 0


@pytest.mark.parametrize("lacking", [0, 1, 2])
def test_similarities_belong_to_their_tensors(tmp_path, lacking):
    """A checkpoint that lacks a tensor has other indices for the rest."""
    source, checkpoints = run_of()
    base, paths = (
        save(tmp_path / "base", source),
        [save(tmp_path / f"step_{t}", c) for t, c in enumerate(checkpoints, 1)],
    )
    full = trajectory(base, *paths)
    del checkpoints[lacking]["model.embed_tokens.weight"]
    save(tmp_path / f"step_{lacking + 1}", checkpoints[lacking])
    gappy = trajectory(base, *paths)
    assert gappy.exit_status == 3
    assert f"step {lacking + 1}" in gappy.summary["excluded"][0]["reason"]
    for module in ("q_proj", "gate_proj", "lm_head"):
        for name in ("similarity_left_16", "similarity_right_16"):
            ours, theirs = (row_of(one, 1, "stored", by="module", module=module)[name] for one in (gappy, full))
            assert ours == pytest.approx(theirs, rel=1e-9)
    if lacking:
        assert row_of(gappy, 1, "stored", by="module", module="embed_tokens")["similarity_left_16"] is None


def test_equal_matrices_share_a_factor_file_across_threads(tmp_path):
    """Their factors are stored in one file."""
    source = {f"layers.{i}.mlp.up_proj.weight": weights()["lm_head.weight"] for i in range(8)}
    checkpoints = [
        {
            n: (w.float() + 1e-3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(t))).bfloat16()
            for n, w in source.items()
        }
        for t in (1, 2)
    ]
    paths = [
        save(tmp_path / name, c)
        for name, c in (("base", source), ("step_1", checkpoints[0]), ("step_2", checkpoints[1]))
    ]
    for i in range(4):
        assert trajectory(*paths, out=tmp_path / f"out{i}", threads=2).exit_status == 0


def test_bad_input_is_one_line(run, tmp_path):
    base, checkpoints = run
    with pytest.raises(UsageError, match="two or more checkpoints"):
        trajectory(base, checkpoints[0])
    with pytest.raises(UsageError, match="option spectra"):
        trajectory(base, *checkpoints, spectra="all")
    with pytest.raises(InputError, match="nowhere"):
        trajectory(base, checkpoints[0], str(tmp_path / "nowhere"))
    analyze(base, checkpoints[0], tmp_path / "other")
    with pytest.raises(InputError, match="holds another run"):
        trajectory(base, *checkpoints, out=tmp_path / "other")


def test_changed_checkpoint_is_analysed_again(run, tmp_path):
    base, checkpoints = run
    before = trajectory(base, *checkpoints, out=tmp_path / "out")
    save(tmp_path / "step_0020", run_of(seed=5)[1][0])
    after = trajectory(base, *checkpoints, out=tmp_path / "out")
    assert after.table == trajectory(base, *checkpoints).table
    names = [[folder.name for folder in one.folders] for one in (before, after)]
    assert names[0][::2] == names[1][::2]
    assert names[1][1].startswith("000020-")


def test_inputs_and_foreign_folders_are_untouched(run, tmp_path, monkeypatch):
    base, checkpoints = run
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "steps"
    mine.mkdir()
    inside = save(mine / "step_0010", run_of()[1][0])
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"is inside .*steps"):
            trajectory(base, inside, checkpoints[1], out=".", overwrite=overwrite)
        with pytest.raises(InputError, match="has a folder steps that no run created"):
            trajectory(base, *checkpoints, out=".", overwrite=overwrite)
        with pytest.raises(InputError, match="no run created"):
            analyze(base, checkpoints[0], ".", overwrite=overwrite)
    assert (mine / "step_0010" / "model.safetensors").exists()


def test_damage_is_reported_or_repaired(run, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "FLUSH_EVERY_S", 1e9)  # one fragment each, on a machine of any speed
    base, checkpoints = run
    out = tmp_path / "out"
    full = trajectory(base, *checkpoints, out=out).table

    def flip(path):
        content = bytearray(path.read_bytes())
        content[-40] ^= 0x40
        path.write_bytes(content)

    for path in (out / "factors").iterdir():
        flip(path)
    shutil.rmtree(out / "steps")
    assert trajectory(base, *checkpoints, out=out).table == full
    for folder in ("similarity", "steps/000010/tallies", "steps/000010/spectra"):
        (path,) = (out / folder).glob("*.arrow")
        kept = path.read_bytes()
        flip(path)
        with pytest.raises(InputError, match="not those that were written"):
            trajectory(base, *checkpoints, out=out)
        path.write_bytes(kept)


def test_files_of_other_options_are_removed(run, tmp_path):
    base, checkpoints = run
    trajectory(base, *checkpoints, out=tmp_path / "out", csv=True)
    trajectory(base, *checkpoints, out=tmp_path / "out", report=False)
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.suffix in (".csv", ".html")}
    assert not left


def test_command_writes_all_outputs(run, tmp_path):
    base, checkpoints = run
    ran = run_cli("trajectory", base, *reversed(checkpoints), "-o", tmp_path / "out", "--csv")
    assert ran.returncode == 0, ran.stdout
    lines = ran.stdout.splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["10", "20", "30"]
    assert "100 %" in lines[5]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [step["step"] for step in summary["steps"]] == [10, 20, 30]
    table = pq.read_table(tmp_path / "out" / "trajectory.parquet")
    assert len((tmp_path / "out" / "trajectory.csv").read_text().splitlines()) == len(table) + 1
    assert (tmp_path / "out" / "report.html").exists()
    again = run_cli("report", tmp_path / "out")
    assert again.stdout.strip().endswith("report.html")


def test_a_checkpoint_is_given_once(run, tmp_path):
    base, (first, *_) = run
    (tmp_path / "latest").symlink_to(first)
    for again in (first, f"{first}/", str(tmp_path / "latest")):
        done = run_cli("trajectory", base, first, again, "-o", tmp_path / "out", "--spectra", "off")
        assert (done.returncode, done.stdout) == (2, "")
        assert "are one checkpoint; give each checkpoint once" in done.stderr
        assert not (tmp_path / "out").exists()


def test_folders_whose_names_are_not_utf_8(tmp_path):
    """Tables and JSON hold Unicode text: such a name is escaped there, and the results are read and resumed."""
    source, checkpoints = run_of(steps=2)
    paths = []
    for name, content in ((b"base\xfe", source), (b"x\xff", checkpoints[0]), (b"\xff", checkpoints[1])):
        folder = tmp_path / os.fsdecode(name)
        try:
            folder.mkdir()
        except OSError:
            pytest.skip("the file system takes UTF-8 names only")
        paths.append(os.fspath(Path(save(tmp_path / "saved", content)).rename(folder)))
    result = trajectory(*paths, out=tmp_path / "out", spectra="off", csv=True)
    labels = [r"x\udcff", r"\udcff"]
    assert [step["label"] for step in result.summary["steps"]] == labels
    assert list(dict.fromkeys(result.table["label"].to_pylist())) == labels
    assert load_trajectory(tmp_path / "out", load_finished(tmp_path / "out")).table.equals(result.table)
    assert trajectory(*paths, out=tmp_path / "out", spectra="off", csv=True).table.equals(result.table)
    opdkernels.analyze(*paths[:2], out=tmp_path / "pair", spectra="off")
    assert opdkernels.load(tmp_path / "pair").summary["base"].endswith(r"base\udcfe")
