from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from opdkernels.distillation.jsonl import read_rows
from opdkernels.distillation.loop import train
from opdkernels.masks import MaskSet
from tests.distillation.conftest import make_options
from tests.distillation.test_loop import digest, log

RECORDED = {
    "device": "cpu",
    "on_policy_fraction": 0,
    "dtype": "float32",
    "max_steps": 3,
    "learning_rate": 1e-3,
    "optimizer": "sgd",
    "snapshot_every": 1,
    "num_eval_prompts": 3,
    "max_grad_norm": 0.05,
}
SELF_TEACHER = {"teacher": "self", "ema_decay": 0.5, "learning_rate": 0.5, "max_grad_norm": 0, "sft_weight": 1.0}
MATCHED = {"model": RECORDED, "self": {**RECORDED, **SELF_TEACHER}}
SAMPLED = {"device": "cpu", "max_steps": 4, "save_steps": 2, "snapshot_every": 2}
RESUMED = {"model": SAMPLED, "self": {**SAMPLED, "teacher": "self", "ema_decay": 0.9}}


def torchrun(*arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs(places, tmp_path_factory):
    """Folder of all runs on two processes, started once: loading torch and transformers takes longer than a run."""
    folder = tmp_path_factory.mktemp("sharded")
    prompts = write_completions(folder)
    jobs = [
        (make_options(places, prompts=prompts, eval_prompts=prompts, **chosen), folder / f"two-{name}")
        for name, chosen in MATCHED.items()
    ]
    for name, chosen in RESUMED.items():
        options = make_options(places, **chosen)
        jobs += [
            (make_options(places, **{**chosen, "max_steps": 2}), folder / f"cut-{name}"),
            (options, folder / f"cut-{name}"),
            (options, folder / f"whole-{name}"),
        ]
    written = [(options.model_dump(mode="json", exclude_defaults=True), str(path)) for options, path in jobs]
    (folder / "jobs.json").write_text(json.dumps(written))
    done = torchrun("tests.distillation.sharded", str(folder / "jobs.json"))
    assert done.returncode == 0, done.stderr[:3000]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MATCHED)
def test_two_processes_match_one_process(places, runs, tmp_path, name):
    """Completions are recorded, so that only the order of sums differs and not which process samples what."""
    prompts, two_dir, one_dir = str(runs / "p.jsonl"), runs / f"two-{name}", tmp_path / "one"
    train(make_options(places, prompts=prompts, eval_prompts=prompts, **MATCHED[name]), one_dir)
    one, two = (load_file(path / "checkpoint-3" / "model.safetensors") for path in (one_dir, two_dir))
    assert one.keys() == two.keys()
    for weight, value in one.items():
        torch.testing.assert_close(two[weight], value, rtol=1e-4, atol=1e-6)
    for a, b in zip(log(one_dir), log(two_dir), strict=True):
        assert a.keys() == b.keys()
        assert b["step"] == a["step"]
        assert b.get("loss", 0) == pytest.approx(a.get("loss", 0), rel=1e-5)
        assert b.get("grad_norm", 0) == pytest.approx(a.get("grad_norm", 0), rel=1e-4)
    stored = [read_rows(path / "snapshots.jsonl")[-1]["views"]["stored"] for path in (one_dir, two_dir)]
    assert stored[0]["numel"] == stored[1]["numel"]
    assert stored[1]["rms_delta"] == pytest.approx(stored[0]["rms_delta"], rel=1e-4)
    masks = [MaskSet.load(path / "masks" / "step-000003.safetensors") for path in (one_dir, two_dir)]
    assert (masks[0] ^ masks[1]).num_active < 0.02 * masks[0].numel


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_sharded_resume_is_bit_exact(runs, name):
    cut, whole = runs / f"cut-{name}", runs / f"whole-{name}"
    assert digest(cut / "checkpoint-4") == digest(whole / "checkpoint-4")
    assert log(cut) == log(whole)


@pytest.mark.slow
def test_error_on_rank_0_ends_all_processes(options, tmp_path):
    train(options(max_steps=1, device="cpu"), tmp_path)
    arguments = ["opdkernels", "distill", "-o", str(tmp_path)]
    chosen = options(max_steps=1, seed=1, device="cpu")
    for name, value in chosen.model_dump(exclude_defaults=True).items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    done = torchrun(*arguments)
    assert done.returncode != 0
    assert done.stderr.count("holds another run; choose another folder, or --overwrite it") == 2


def write_completions(folder):
    lines = [json.dumps({"prompt": f"{a}+1=", "answer": str(a + 1), "completion": str(a + 1)}) for a in range(1, 9)]
    (folder / "p.jsonl").write_text("\n".join(lines))
    return str(folder / "p.jsonl")
