"""Implementations take turns, within a budget of seconds; limits are rates of known work."""

from __future__ import annotations

import itertools

import pytest
import torch

from opdkernels.backends import devices
from opdkernels.benchmark import limits, timing

HERE = torch.device("cpu")


def test_implementations_take_turns_after_a_warm_up():
    called: list[str] = []
    seconds = timing.paired({name: lambda name=name: called.append(name) for name in "ab"}, rounds=3)
    assert "".join(called) == "abababab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert min(min(times) for times in seconds.values()) > 0
    called.clear()
    timing.paired({name: lambda name=name: called.append(name) for name in "ab"}, rounds=1, warm_up=False)
    assert "".join(called) == "ab"


@pytest.mark.parametrize(("budget_s", "rounds"), [(0.0, 1), (2.5, 3), (99.0, 7)])
def test_no_round_begins_after_the_budget(monkeypatch, budget_s, rounds):
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "monotonic", lambda: next(clock))
    assert len(timing.paired({"a": lambda: None}, budget_s=budget_s)["a"]) == rounds


@pytest.mark.parametrize(
    ("limit", "work", "unit"),
    [
        ("read", 4096, "bytes"),
        ("copy", 2 * 4096, "bytes"),
        ("update", 2 * 4096, "bytes"),
        ("fp64 product", 2 * 16**3, "operations"),
        ("bf16 product", 2 * 16**3, "operations"),
    ],
)
def test_limits_are_work_over_the_fastest_round(monkeypatch, limit, work, unit):
    rounds = itertools.cycle([0.5, 0.25, 1.0])

    def elapsed(call, device):
        call()
        return next(rounds)

    monkeypatch.setattr(devices, "elapsed_s", elapsed)
    assert limits.measure(limit, HERE, 4096, 16) == work / 0.25
    assert limits.unit_of(limit) == unit
