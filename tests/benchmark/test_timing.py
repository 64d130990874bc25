"""Implementations take turns, within a budget of seconds; limits are rates of known work."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from opdkernels.backends import devices
from opdkernels.benchmark import limits, machine, timing
from opdkernels.benchmark.machine import line

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


def test_gpu_is_described_and_timed_with_events(monkeypatch):
    gpu, order = torch.device("cuda", 0), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def elapsed_time(self, other):
            return 2.5  # milliseconds

    properties = SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 << 30)
    memory = iter([100, 350])
    for name, fake in (
        ("Event", Event),
        ("synchronize", lambda device: order.append("synchronize")),
        ("get_device_properties", lambda device: properties),
        ("mem_get_info", lambda device: (1 << 30, 80 << 30)),
        ("reset_peak_memory_stats", lambda device: order.append("reset")),
        ("memory_allocated", lambda device: next(memory)),
        ("max_memory_allocated", lambda device: next(memory)),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert timing.paired({"a": lambda: order.append("a")}, gpu, rounds=1) == {"a": [0.0025]}
    assert order == ["a", "synchronize", "record", "a", "record", "synchronize"]
    order.clear()
    assert devices.extra_memory_bytes(lambda: order.append("a"), gpu) == 250
    assert order == ["reset", "a"]
    assert devices.free_memory_bytes(gpu) == 1 << 30
    expected = {"name": "Some GPU", "capability": "9.0", "memory_bytes": 80 << 30, "cuda": "13.0"}
    assert machine.describe(gpu)["gpu"] == expected
    assert line(machine.describe(gpu)).startswith("Some GPU (9.0, 85.9 GB), CUDA 13.0, ")
