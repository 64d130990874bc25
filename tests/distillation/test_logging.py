from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from opdkernels.distillation.jsonl import read_rows
from opdkernels.distillation.logging import MetricsLogger, log_sinks
from opdkernels.distillation.loop import train
from opdkernels.distillation.world import World
from opdkernels.errors import UsageError


def test_tokens_per_second_of_each_phase(options, tmp_path):
    train(options(num_eval_prompts=2), tmp_path)
    start, *rows = read_rows(tmp_path / "log.jsonl")
    assert "tokens_per_s" not in start
    for row in rows:
        assert set(row["tokens_per_s"]) == {"generate", "score", "train", "all"}
        for name, rate in row["tokens_per_s"].items():
            assert rate * row["seconds"][name] == pytest.approx(row["tokens"])


def test_phase_without_time_has_no_rate(tmp_path):
    MetricsLogger(tmp_path, 0, 2, quiet=True, world=World()).log(
        {"step": 1, "tokens": 7, "seconds": {"generate": 0.0, "snapshot": 0.1, "all": 0.5}}
    )
    assert read_rows(tmp_path / "log.jsonl")[0]["tokens_per_s"] == {"all": 14}


# Stubs of TensorBoard and Weights & Biases record their arguments.

ROW = {"step": 3, "loss": 0.5, "skip_reason": "", "accuracy": None, "seconds": {"train": 2.0}, "tokens": 10}
FLAT = {"loss": 0.5, "seconds/train": 2.0, "tokens": 10, "tokens_per_s/train": 5.0}


def test_tensorboard_gets_every_metric(tmp_path, monkeypatch):
    made, taken = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            made.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            taken.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            taken.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    with log_sinks(tmp_path, 2, World(), tensorboard=True) as opened:
        assert not made
        MetricsLogger(tmp_path, 2, 9, quiet=True, world=World(), sinks=opened).log(dict(ROW))
    assert made == [(str(tmp_path / "tensorboard"), 3)]
    assert taken == [*((name, value, 3) for name, value in FLAT.items()), "closed"]


def test_wandb_gets_every_metric_and_is_closed(options, tmp_path, monkeypatch):
    taken = []
    run = SimpleNamespace(
        log=lambda figures, step: taken.append((step, figures)), finish=lambda: taken.append("finished")
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: taken.append(given) or run))
    with log_sinks(tmp_path, 2, World(), wandb="sparse") as opened:
        MetricsLogger(tmp_path, 2, 9, quiet=True, world=World(), sinks=opened).log(dict(ROW))
    assert taken[1:] == [(3, FLAT), "finished"]
    taken.clear()
    train(options(wandb="sparse", max_steps=1), tmp_path / "run")
    assert taken[0] == {"project": "sparse", "group": "run", "dir": str(tmp_path / "run")}
    assert [one[0] for one in taken[1:-1]] == [1]
    assert taken[-1] == "finished"


def failing_init(**options):
    raise RuntimeError("api_key not configured\nmore")


@pytest.mark.parametrize(
    ("name", "module", "chosen", "message"),
    [
        (
            "torch.utils.tensorboard",
            None,
            {"tensorboard": True},
            "tensorboard needs tensorboard, which is not installed",
        ),
        ("wandb", None, {"wandb": "sparse"}, "wandb needs wandb, which is not installed"),
        (
            "wandb",
            SimpleNamespace(init=failing_init),
            {"wandb": "sparse"},
            r"wandb cannot start a run \(api_key not configured\); set WANDB_MODE=offline",
        ),
    ],
)
def test_unavailable_log_sink_keeps_earlier_run(options, tmp_path, monkeypatch, name, module, chosen, message):
    train(options(max_steps=1), tmp_path)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(UsageError, match=message):
        train(options(max_steps=1, seed=1, overwrite=True, **chosen), tmp_path)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
