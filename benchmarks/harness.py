"""Paired timing, the machine, and its limits. Every figure is a median of rounds taken in turn, so that a drift of the
machine's speed meets all implementations alike."""

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
    """Median seconds of each, run in turn after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in implementations}
    for call in implementations.values():
        call()
    for _ in range(rounds):
        for name, call in implementations.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def read_bandwidth(threads: int) -> float:
    """Bytes a second of reading one large array of integers, by torch's own sum: this machine's limit for a pass."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    data = torch.ones(1 << 27, dtype=torch.int64)
    seconds = paired({"sum": lambda: data.sum()}, rounds=5)["sum"]
    torch.set_num_threads(before)
    return data.nbytes / seconds


def update_bandwidth(threads: int) -> float:
    """Bytes a second, read and written, of adding to one large array in place: this machine's limit for a step."""
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
    """Anonymous memory of a process now (Linux)."""
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    return 0
