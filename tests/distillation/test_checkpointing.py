"""The folder of a run: whose it is, what is replaced and when, and what the disk holds."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch

from opdkernels import files, outputs
from opdkernels.distillation import checkpointing, loop
from opdkernels.distillation.loop import train
from opdkernels.errors import InputError, UsageError
from opdkernels.experiments.runner import run_experiment
from opdkernels.masks.mask_set import from_bools
from tests.distillation.test_loop import log


def everything(folder):
    return {os.fspath(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(place, to):
    shutil.copytree(place, to)
    return to


def trained_further(place):
    """Replaces a model's weights by others of the same shapes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    model.lm_head.weight.data[0] += 1
    model.save_pretrained(place)


# Who writes


def test_concurrent_run_in_a_folder_is_refused(options, tmp_path, monkeypatch):
    train_step, inside, go_on = loop.train_step, threading.Event(), threading.Event()

    def waits(*args, **kwargs):
        inside.set()
        assert go_on.wait(60)
        return train_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", waits)
    first = threading.Thread(target=train, args=(options(max_steps=1), tmp_path))
    first.start()
    assert inside.wait(60)
    before = everything(tmp_path)
    with pytest.raises(InputError, match="another process is writing to"):
        train(options(max_steps=1, overwrite=True), tmp_path)
    assert everything(tmp_path) == before
    go_on.set()
    first.join()
    assert train(options(max_steps=2), tmp_path).step == 2


def test_folder_lock_is_released_after_error_and_kill(options, places, tmp_path):
    with pytest.raises(InputError, match=r"can(not)? be loaded"):
        train(options(teacher=str(tmp_path / "none")), tmp_path / "run")
    program = (
        "import os, signal, sys\n"
        "from opdkernels.distillation import loop\n"
        "from opdkernels.distillation.options import DistillOptions\n"
        "loop.train_step = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "loop.train(DistillOptions.model_validate_json(sys.argv[1]), sys.argv[2])\n"
    )
    chosen = options()
    killed = subprocess.run(
        [sys.executable, "-c", program, chosen.model_dump_json(), str(tmp_path / "run")],
        check=False,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "checkpoint-0").exists()
    assert train(chosen, tmp_path / "run").step == 3


def test_empty_folder_name_is_refused(options):
    with pytest.raises(UsageError, match="no name"):
        train(options(), "")


def test_parent_folders_are_created(options, tmp_path):
    assert train(options(max_steps=1), tmp_path / "a" / "b").step == 1
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write to .*file/run: Not a directory; choose another folder"):
        train(options(), tmp_path / "file" / "run")


# What is replaced


@pytest.mark.parametrize("wrong", ["student", "teacher", "masks", "teacher_id", "prompts"])
def test_invalid_input_writes_nothing_and_corrected_command_runs(options, tmp_path, wrong):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "teacher_id": "b"}')
    arguments = {"teacher_id": {"prompts": str(tmp_path / "p.jsonl"), "teacher": f"a={options().teacher}"}}.get(
        wrong, {wrong: str(tmp_path / "none")}
    )
    with pytest.raises(InputError):
        train(options(**arguments), tmp_path / "run")
    assert not list(tmp_path.glob("run/*"))
    assert train(options(max_steps=1), tmp_path / "run").step == 1


def test_run_without_steps_is_replaced_by_corrected_command(options, tmp_path):
    sums = tmp_path / "p.jsonl"
    sums.write_text('{"prompt": "1+1=", "answer": "2"}')
    rewarded = {"teacher": "", "divergence_weight": 0, "reward_weight": 1, "num_generations": 2, "prompts": str(sums)}
    with pytest.raises(InputError, match="failed on"):
        train(options(reward=f"{__name__}:fails", **rewarded), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-0").exists()
    train(options(**rewarded), tmp_path / "run")
    train(options(**rewarded), tmp_path / "whole")
    assert log(tmp_path / "run") == log(tmp_path / "whole")


def fails(prompt, answer, completion):
    raise ValueError("no")


@pytest.mark.parametrize("wrong", ["student", "teacher"])
def test_overwrite_removes_nothing_before_inputs_are_loaded(options, tmp_path, wrong):
    train(options(max_steps=1), tmp_path / "run")
    before = everything(tmp_path / "run")
    with pytest.raises(InputError, match=r"can(not)? be loaded"):
        train(options(**{wrong: str(tmp_path / "none"), "overwrite": True}), tmp_path / "run")
    assert everything(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["student", "teacher", "subspace", "masks"])
def test_overwrite_refuses_to_remove_inputs_of_the_run(options, tmp_path, name):
    train(options(max_steps=1), tmp_path / "run")
    before = everything(tmp_path / "run")
    place = {"masks": "masks/step-000001.safetensors"}.get(name, "checkpoint-1")
    more = {"lora_rank": 2} if name == "subspace" else {}
    written = place.partition("/")[0]
    with pytest.raises(
        InputError,
        match=rf"{name} .*run/{place} is inside .*run/{written}, which the run writes to; choose another folder",
    ):
        train(options(**{name: str(tmp_path / "run" / place), "overwrite": True}, **more), tmp_path / "run")
    assert everything(tmp_path / "run") == before


@pytest.mark.parametrize("content", ['{"command": "analyze", "identity": "0"}', "[]", "3", "not json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_another_command_is_never_replaced(options, tmp_path, content, overwrite):
    (tmp_path / "run.json").write_text(content)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"has a run\.json that is not of a run of distill"):
        train(options(overwrite=overwrite), tmp_path)
    assert sorted(everything(tmp_path)) == ["run.json", "thesis.tex"]


def test_overwrite_removes_only_run_outputs(options, tmp_path):
    train(options(max_steps=3, save_steps=1), tmp_path / "run")
    (tmp_path / "run" / "notes").write_text("mine")
    train(options(max_steps=2, seed=1, overwrite=True), tmp_path / "run")
    train(options(max_steps=2, seed=1), tmp_path / "fresh")
    assert sorted(everything(tmp_path / "run")) == sorted([*everything(tmp_path / "fresh"), "notes"])
    assert log(tmp_path / "run") == log(tmp_path / "fresh")


def test_interrupted_overwrite_leaves_no_mixture_of_runs(options, tmp_path, monkeypatch):
    train(options(max_steps=2), tmp_path)
    monkeypatch.setattr(outputs, "remove_path", lambda path: sys.exit("killed"))
    with pytest.raises(SystemExit):
        train(options(max_steps=2, seed=1, overwrite=True), tmp_path)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="holds another run"):
        train(options(max_steps=2), tmp_path)
    assert train(options(max_steps=2, seed=1, overwrite=True), tmp_path).step == 2


def test_checkpoints_without_a_state_to_resume_from_are_kept(options, tmp_path):
    train(options(max_steps=2), tmp_path)
    (tmp_path / "checkpoint-2" / "training.pt").unlink()
    before = everything(tmp_path)
    with pytest.raises(UsageError, match=r"no training\.pt in any of them, so the run cannot resume; choose another"):
        train(options(max_steps=3), tmp_path)
    assert everything(tmp_path) == before
    assert train(options(max_steps=1, overwrite=True), tmp_path).step == 1


def test_names_that_only_resemble_those_of_a_run_are_kept(options, tmp_path):
    train(options(max_steps=1), tmp_path)
    for mine in ("checkpoint-1-best/model.safetensors", "masks/mine.safetensors", "log.jsonl.bak", "derived-at-x/y"):
        (tmp_path / mine).parent.mkdir(exist_ok=True)
        (tmp_path / mine).write_text("mine")
    train(options(max_steps=1, seed=1, overwrite=True), tmp_path)
    for mine in ("checkpoint-1-best/model.safetensors", "masks/mine.safetensors", "log.jsonl.bak", "derived-at-x/y"):
        assert (tmp_path / mine).read_text() == "mine"


def test_overwrite_restarts_for_fewer_steps(options, tmp_path):
    train(options(max_steps=2), tmp_path / "run")
    assert train(options(max_steps=1, overwrite=True), tmp_path / "run").step == 1
    train(options(max_steps=1), tmp_path / "fresh")
    assert log(tmp_path / "run") == log(tmp_path / "fresh")
    assert not (tmp_path / "run" / "checkpoint-2").exists()


def test_overwrite_resumes_unless_checkpoints_are_missing(options, tmp_path):
    train(options(max_steps=2), tmp_path)
    assert train(options(max_steps=3, overwrite=True), tmp_path).step == 3
    assert (tmp_path / "checkpoint-2").exists()
    with pytest.warns(
        UserWarning, match="has taken 3 steps and lacks checkpoints that save_steps asks for; it is overwritten"
    ):
        train(options(max_steps=3, save_steps=1, overwrite=True), tmp_path)
    assert (tmp_path / "checkpoint-1").exists()


def test_overwrite_lets_an_experiment_find_its_checkpoints(options, tmp_path):
    chosen = {"num_eval_prompts": 4, "max_steps": 20, "snapshot_every": 2, "learning_rate": 1e-4}
    run_experiment("grafts", options(**chosen), tmp_path, arms=["random alone"])
    arm = "mask at 10% of the steps"
    with pytest.raises(UsageError, match=r"holds results of the experiment grafts; .*--overwrite them"):
        run_experiment("trajectory", options(**chosen), tmp_path, arms=[arm])
    rows = run_experiment("trajectory", options(overwrite=True, **chosen), tmp_path, arms=[arm])["rows"]
    assert [row["arm"] for row in rows] == ["start", "full", arm]


# What a run was made from


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_changed_model_files_prevent_resume(options, places, tmp_path, side):
    place = copied(places / side, tmp_path / side)
    chosen = {side: str(place)}
    train(options(max_steps=2, **chosen), tmp_path / "run")
    kept = everything(place)
    trained_further(place)
    with pytest.raises(
        InputError, match=rf"model\.safetensors in .*{side} has changed since the run in .*run started; restore it"
    ):
        train(options(max_steps=3, **chosen), tmp_path / "run")
    for name, content in kept.items():
        (place / name).write_bytes(content)
    (place / "training.pt").write_bytes(b"of another run, which comes and goes")
    assert train(options(max_steps=3, **chosen), tmp_path / "run").step == 3
    trained_further(place)
    assert train(options(max_steps=3, overwrite=True, **chosen), tmp_path / "run").step == 3
    assert len(log(tmp_path / "run")) == 3


def test_masks_are_compared_by_content_and_not_by_bytes(options, tmp_path):
    """Another program may write the same masks with its header in another order."""
    for name, active in (("a", [True, False]), ("c", [True, True])):
        from_bools({"w": torch.tensor(active)}).save(tmp_path / name)
    content = (tmp_path / "a").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(reversed(header["__metadata__"].items()))
    text = json.dumps(header).encode()
    (tmp_path / "b").write_bytes(len(text).to_bytes(8, "little") + text + content[start:])
    a, b, c = (checkpointing.identity(options(masks=str(tmp_path / name))) for name in "abc")
    assert a == b != c


def test_digest_of_a_model_covers_every_byte_and_no_times(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "BLOCK_BYTES", 100)
    path = tmp_path / "model.safetensors"
    content = bytes(i % 251 for i in range(1003))
    path.write_bytes(content)
    known = checkpointing.model_digest(path)
    os.utime(path, ns=(1, 1))
    assert checkpointing.model_digest(path) == known
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        assert checkpointing.model_digest(path) != known
    for other in (content[:12] + content[13:], content + b"\0", content[:-1], b""):
        path.write_bytes(other)
        assert checkpointing.model_digest(path) != known


def test_run_of_an_early_version_resumes_without_model_digests(options, tmp_path):
    train(options(max_steps=1), tmp_path)
    about = json.loads((tmp_path / "run.json").read_text())
    folders = about.pop("model_digests")
    about["models"] = {path: dict.fromkeys(names, "digest of a sample") for path, names in folders.items()}
    (tmp_path / "run.json").write_text(json.dumps(about))
    assert train(options(max_steps=2), tmp_path).step == 2


# What the disk holds


def test_checkpoint_is_synced_before_earlier_state_is_deleted(options, tmp_path, monkeypatch):
    synced, sync = [], checkpointing.sync
    earlier = tmp_path / "checkpoint-1" / "training.pt"

    def watched(path):
        synced.append((os.fspath(path.relative_to(tmp_path)), earlier.exists()))
        sync(path)

    for module in (checkpointing, files):
        monkeypatch.setattr(module, "sync", watched)
    train(options(max_steps=2, save_steps=1), tmp_path)
    assert not earlier.exists()
    in_time = {re.sub(r"opdkernels-\w+", "RANDOM", name) for name, there in synced if there}
    assert {f".checkpoint-2.RANDOM.tmp/{path.name}" for path in (tmp_path / "checkpoint-2").iterdir()} | {
        ".checkpoint-2.RANDOM.tmp",
        ".",
    } <= in_time
    assert {"log.jsonl", "snapshots.jsonl", "masks/step-000002.safetensors", "weights/snapshot-000002-0.bin"} <= in_time
