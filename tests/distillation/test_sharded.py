from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from opdkernels.distillation.jsonl import read_rows
from opdkernels.distillation.loop import train
from opdkernels.masks import MaskSet
from tests.distillation.test_loop import digest, log


def run(chosen, out, processes):
    done = started(chosen, out, processes)
    assert done.returncode == 0, done.stderr[:3000]


def started(chosen, out, processes):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        "opdkernels",
        "distill",
        "-o",
        str(out),
    ]
    for name, value in chosen.model_dump().items():
        if value not in ("", None) and value != type(chosen).model_fields[name].default:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, {"teacher": "self", "ema_decay": 0.5, "learning_rate": 0.5, "max_grad_norm": 0, "sft_weight": 1.0}]
)
def test_two_processes_match_one_process(options, tmp_path, more):
    """Recorded completions, so that what is learnt does not depend on who samples what: all but the order of sums is
    alike."""
    chosen = {
        "device": "cpu",
        "prompts": load_completions(tmp_path),
        "on_policy_fraction": 0,
        "dtype": "float32",
        "max_steps": 3,
        "learning_rate": 1e-3,
        "optimizer": "sgd",
        "snapshot_every": 1,
        "eval_prompts": load_completions(tmp_path),
        "num_eval_prompts": 3,
        "max_grad_norm": 0.05,
        **more,
    }
    run(options(**chosen), tmp_path / "two", 2)
    train(options(**chosen), tmp_path / "one")
    one, two = (load_file(tmp_path / name / "checkpoint-3" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        assert b["step"] == a["step"]
        assert b.get("loss", 0) == pytest.approx(a.get("loss", 0), rel=1e-5)
        assert b.get("grad_norm", 0) == pytest.approx(a.get("grad_norm", 0), rel=1e-4)
    marks = [read_rows(tmp_path / name / "snapshots.jsonl")[-1] for name in ("one", "two")]
    assert marks[0]["views"]["stored"]["numel"] == marks[1]["views"]["stored"]["numel"]
    assert marks[1]["views"]["stored"]["rms_delta"] == pytest.approx(marks[0]["views"]["stored"]["rms_delta"], rel=1e-4)
    files = [MaskSet.load(tmp_path / name / "masks" / "step-000003.safetensors") for name in ("one", "two")]
    assert (files[0] ^ files[1]).num_active < 0.02 * files[0].numel


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"teacher": "self", "ema_decay": 0.9}])
def test_sharded_resume_is_bit_exact(options, places, tmp_path, more):
    chosen = {"device": "cpu", "max_steps": 4, "save_steps": 2, "snapshot_every": 2, **more}
    run(options(**{**chosen, "max_steps": 2}), tmp_path / "cut", 2)
    run(options(**chosen), tmp_path / "cut", 2)
    run(options(**chosen), tmp_path / "whole", 2)
    assert digest(tmp_path / "cut" / "checkpoint-4") == digest(tmp_path / "whole" / "checkpoint-4")
    assert log(tmp_path / "cut") == log(tmp_path / "whole")


@pytest.mark.slow
def test_error_on_rank_0_ends_all_processes(options, tmp_path):
    train(options(max_steps=1, device="cpu"), tmp_path)
    done = started(options(max_steps=1, seed=1, device="cpu"), tmp_path, 2)
    assert done.returncode != 0
    assert done.stderr.count("holds another run; choose another folder, or --overwrite it") == 2


def load_completions(folder):
    import json

    lines = [json.dumps({"prompt": f"{a}+1=", "answer": str(a + 1), "completion": str(a + 1)}) for a in range(1, 9)]
    (folder / "p.jsonl").write_text("\n".join(lines))
    return str(folder / "p.jsonl")
