"""A run whose files are damaged or edited ends in one line that names the file, or continues with the same bits."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch

from opdkernels.distillation.jsonl import read_rows
from opdkernels.distillation.loop import train
from opdkernels.errors import InputError, UsageError

NAN = float("nan")
RUNS = {
    "plain": {},
    "self-teacher": {"teacher": "self", "ema_decay": 0.5},
    "lora": {"lora_rank": 2},
}


@pytest.fixture(scope="module")
def run(places, tmp_path_factory):
    """Folder of a finished run of two steps, by kind."""
    from tests.distillation.conftest import make_options

    @functools.cache
    def finished(kind):
        folder = tmp_path_factory.mktemp("runs") / kind
        train(make_options(places, max_steps=2, batch_size=2, snapshot_every=1, **RUNS[kind]), folder)
        return folder

    return finished


@pytest.fixture
def resume(options, run, tmp_path):
    """Damages a copy of a run and takes a third step."""

    def resumed(kind, damage):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(run(kind), tmp_path / "run")
        damage(tmp_path / "run")
        result = train(options(max_steps=3, batch_size=2, snapshot_every=1, **RUNS[kind]), tmp_path / "run")
        assert result.step == 3
        return tmp_path / "run"

    return resumed


def edit(change):
    """A damage that changes the training state."""

    def damage(folder):
        path = folder / "checkpoint-2" / "training.pt"
        state = torch.load(path, weights_only=True)
        torch.save(change(state) or state, path)

    return damage


def set_to(value, *keys):
    def change(state):
        for key in keys[:-1]:
            state = state[key]
        if value is ...:
            del state[keys[-1]]
        else:
            state[keys[-1]] = value

    return edit(change)


FIELDS = ("step", "processes", "optimizer", "lora", "teachers")
WRONG_TYPES = (..., None, "x", [1], 1.5, True, torch.ones(2))
STATES = [
    *(("plain", set_to(value, field), f"no {field} of type") for field in FIELDS for value in WRONG_TYPES),
    ("plain", set_to(1, "step"), "it is of step 1, in the folder checkpoint-2"),
    ("plain", set_to(-1, "step"), "it is of step -1"),
    ("plain", edit(lambda state: [state]), "no step of type int"),
    ("plain", set_to({}, "teachers"), "0 teachers, not those of the run"),
    ("plain", set_to({"": {"0": torch.ones(1)}}, "teachers"), "has 1 tensors as teacher, and the run 0"),
    ("plain", set_to({"": None}, "teachers"), "a NoneType as teacher"),
    ("plain", set_to({"lm_head.weight": torch.ones(15, 32)}, "lora"), "has 1 tensors as lora, and the run 0"),
    ("plain", set_to(torch.tensor(NAN), "optimizer", "state", 0, "step"), "a step count in step that is no finite"),
    ("plain", set_to(..., "optimizer", "state", 0, "exp_avg"), "has no exp_avg"),
    ("self-teacher", set_to({}, "teachers", ""), "has 0 tensors as teacher"),
    ("self-teacher", set_to(torch.ones(1), "teachers", "", "0"), r"0 of teacher is torch\.float32 \[1\], not"),
    ("self-teacher", set_to("x", "teachers", "", "0"), "0 of teacher is str"),
    ("lora", set_to({}, "lora"), "has 0 tensors as lora"),
    (
        "lora",
        edit(lambda state: state["lora"].update(dict.fromkeys(state["lora"], torch.ones(1)))),
        r"of lora is .*\[1\]",
    ),
]


@pytest.mark.parametrize(("kind", "damage", "message"), STATES)
def test_damaged_training_state_raises_in_one_line(kind, damage, message, resume):
    with pytest.raises(
        InputError, match=rf"training\.pt cannot be read .*{message}.*start again with --overwrite"
    ) as raised:
        resume(kind, damage)
    assert "\n" not in str(raised.value)


def test_flipped_bit_in_the_training_state_raises(resume):
    """A torch.load of the file succeeds."""

    def flip(folder):
        path = folder / "checkpoint-2" / "training.pt"
        data = bytearray(path.read_bytes())
        moments = torch.load(path, weights_only=True)["optimizer"]["state"][0]["exp_avg"]
        data[data.index(moments.numpy().tobytes()) + 1] ^= 1
        path.write_bytes(data)
        torch.load(path, weights_only=True)

    with pytest.raises(InputError, match=r"training\.pt has another checksum"):
        resume("plain", flip)


def test_state_of_another_number_of_processes_raises(resume):
    with pytest.raises(UsageError, match="used 2 processes and has 1 now"):
        resume("plain", set_to(2, "processes"))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_damaged_checkpoint_is_not_blamed_on_the_student(file, resume):
    with pytest.raises(
        InputError, match=r"checkpoint-2 cannot be loaded .*restore this checkpoint from a copy"
    ) as raised:
        resume("plain", lambda folder: (folder / "checkpoint-2" / file).write_bytes(b"{"))
    assert "hub id" not in str(raised.value)


@pytest.mark.parametrize("name", ["snapshots.jsonl", "masks", "weights", "log.jsonl"])
def test_run_without_records_of_earlier_steps_finishes(name, resume):
    def remove(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    intact = resume("plain", lambda folder: None) / "checkpoint-3" / "model.safetensors"
    expected = intact.read_bytes()
    assert (resume("plain", remove) / "checkpoint-3" / "model.safetensors").read_bytes() == expected


def test_damaged_row_before_others_raises_and_is_kept(resume, tmp_path):
    """A truncated last row is what a kill leaves; anything else would delete the rows after it."""
    path = tmp_path / "run" / "log.jsonl"

    def damage(folder):
        rows = path.read_text().splitlines()
        path.write_text("\n".join([rows[0][:-1], *rows[1:]]))

    with pytest.raises(InputError, match=r"log\.jsonl line 1 is not JSON; restore it"):
        resume("plain", damage)
    assert len(path.read_text().splitlines()) == 2
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1}]
    path.write_text(json.dumps({"step": 1}) + "\n" + "\0" * 10 + "\n\0")
    assert read_rows(path) == [{"step": 1}]


def test_weights_that_diverge_end_the_run_in_one_line(options, tmp_path):
    with pytest.raises(InputError, match=r"consecutive steps had no finite loss .* reduce learning_rate"):
        train(options(max_steps=20, batch_size=2, learning_rate=1e30, precision="nearest"), tmp_path / "run")


def test_weights_of_which_none_is_finite_end_the_run_in_one_line(options, tmp_path):
    with pytest.raises(InputError, match=r"no weight of the student is finite after step 1; reduce learning_rate"):
        train(options(max_steps=2, batch_size=2, learning_rate=1e300, snapshot_every=1), tmp_path / "run")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_model_with_weights_that_are_nan_raises_before_the_run(side, options, places, tmp_path):
    from safetensors.torch import load_file, save_file

    path = shutil.copytree(places / side, tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][0] = NAN
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model computes logits that are NaN: its weights are damaged"):
        train(options(**{side: str(path)}), tmp_path / "run")


@pytest.mark.parametrize("name", ["batch_size", "num_generations"])
def test_numbers_of_completions_that_no_memory_holds_raise(name, options):
    with pytest.raises(UsageError, match=f"option {name} is 1000000000: Input should be less than or equal to"):
        options(**{name: 10**9})
