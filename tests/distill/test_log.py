from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from opdkernels.distill.log import Log
from opdkernels.distill.loop import distill
from opdkernels.distill.ranks import Ranks
from opdkernels.distill.track import read_rows
from opdkernels.errors import UsageError


def test_tokens_a_second_are_those_of_each_phase(options, tmp_path):
    distill(options(eval_size=2), tmp_path)
    start, *rows = read_rows(tmp_path / "log.jsonl")
    assert "tokens_per_s" not in start
    for row in rows:
        assert set(row["tokens_per_s"]) == {"generate", "score", "train", "all"}
        for name, rate in row["tokens_per_s"].items():
            assert rate * row["seconds"][name] == pytest.approx(row["tokens"])


def test_a_phase_that_took_no_time_has_no_rate(tmp_path):
    Log(tmp_path, 0, 2, True, Ranks()).row({"step": 1, "tokens": 7, "seconds": {"generate": 0.0, "track": 0.1, "all": 0.5}})
    assert read_rows(tmp_path / "log.jsonl")[0]["tokens_per_s"] == {"all": 14}


# beside the log, by stand-ins that write down what they are given

ROW = {"step": 3, "loss": 0.5, "skipped": "", "accuracy": None, "seconds": {"train": 2.0}, "tokens": 10}
FLAT = {"loss": 0.5, "seconds/train": 2.0, "tokens": 10, "tokens_per_s/train": 5.0}


def test_tensorboard_takes_every_number_of_a_step(tmp_path, monkeypatch):
    made, taken = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            made.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            taken.append((name, value, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    Log(tmp_path, 2, 9, True, Ranks(), tensorboard=True).row(dict(ROW))
    assert made == [(str(tmp_path / "tensorboard"), 3)]
    assert taken == [(name, value, 3) for name, value in FLAT.items()]


def test_wandb_takes_every_number_of_a_step(options, tmp_path, monkeypatch):
    begun, taken = [], []
    run = SimpleNamespace(log=lambda figures, step: taken.append((step, figures)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: begun.append(given) or run))
    Log(tmp_path, 2, 9, True, Ranks(), wandb="sparse").row(dict(ROW))
    assert taken == [(3, FLAT)]
    distill(options(wandb="sparse", steps=1), tmp_path / "run")
    assert begun[-1] == {"project": "sparse", "group": "run", "dir": str(tmp_path / "run")}
    assert [step for step, _ in taken[1:]] == [1]


@pytest.mark.parametrize(("name", "given"), [("torch.utils.tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "sparse"})])
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, name, given):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=f"{name.rpartition('.')[2]} is asked for and not installed"):
        Log(tmp_path, 0, 1, True, Ranks(), **given)


def test_a_wandb_that_cannot_begin_is_one_line(tmp_path, monkeypatch):
    def init(**given):
        raise RuntimeError("api_key not configured\nmore")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(UsageError, match=r"wandb cannot begin a run \(api_key not configured\); set WANDB_MODE=offline"):
        Log(tmp_path, 0, 1, True, Ranks(), wandb="sparse")
