"""Paired timing, and the machine with its bandwidth limits.

Every time is the median of rounds in which the implementations take turns, so that a drift of the machine's speed
affects all of them equally.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from opdkernels.backends import cpu
from opdkernels.runs.run_dir import processor


def paired(implementations: dict[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each implementation. They take turns, after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in implementations}
    for call in implementations.values():
        call()
    for _ in range(rounds):
        for name, call in implementations.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def read_bandwidth(threads: int) -> float:
    """Bytes per second of reading a 1 GiB array with torch's sum: the machine's limit for a read-only pass."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    data = torch.ones(1 << 27, dtype=torch.int64)
    seconds = paired({"sum": lambda: data.sum()}, rounds=5)["sum"]
    torch.set_num_threads(before)
    return data.nbytes / seconds


def update_bandwidth(threads: int) -> float:
    """Bytes per second, read and written, of an in-place addition to a 1 GiB array: the machine's limit for a step."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    data = torch.ones(1 << 28)
    seconds = paired({"add": lambda: data.add_(1)}, rounds=5)["add"]
    torch.set_num_threads(before)
    return 2 * data.nbytes / seconds


def machine_line() -> str:
    return f"{processor()}, {os.cpu_count()} cores, {instruction_set()}, torch {torch.__version__}"


def instruction_set() -> str:
    return cpu._C.current_isa() if cpu._C is not None else "reference"


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process (Linux)."""
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    return 0
