"""Paired timing, and the machine with its bandwidth limits.

Every time is the median of rounds in which the implementations take turns, so that a drift of the machine's speed
affects all of them equally.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from opdkernels.analysis.tallying import torch_threads
from opdkernels.backends.devices import CPU
from opdkernels.benchmark import limits, machine, timing

GIB = 1 << 30


def paired(implementations: dict[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each implementation. They take turns, after one warm-up."""
    seconds = timing.paired(implementations, rounds=rounds)
    return {name: statistics.median(times) for name, times in seconds.items()}


def read_bandwidth(threads: int) -> float:
    """Bytes per second of reading a 1 GiB array with torch's sum: the machine's limit for a read-only pass."""
    with torch_threads(threads):
        return limits.read_rate(CPU, GIB)


def update_bandwidth(threads: int) -> float:
    """Bytes per second, read and written, of an in-place addition to a 1 GiB array: the machine's limit for a step."""
    with torch_threads(threads):
        return limits.update_rate(CPU, GIB)


def machine_line() -> str:
    return machine.line(machine.describe())


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process (Linux)."""
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    return 0
