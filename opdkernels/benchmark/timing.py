"""Paired timing: implementations take turns, so that a drift of the machine's speed affects all of them equally."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from opdkernels.backends import devices

ROUNDS = 7


def paired(
    implementations: Mapping[str, Callable[[], Any]],
    device: torch.device = devices.CPU,
    *,
    rounds: int = ROUNDS,
    budget_s: float = math.inf,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Times implementations that take turns.

    Args:
        implementations: What is timed, by name.
        device: Where they run: GPUs are timed with events, CPUs with the clock.
        rounds: Largest number of rounds; one at least.
        budget_s: Seconds after which no further round begins.
        warm_up: Call each implementation once before the first round.

    Returns:
        Seconds of every round by name.

    Examples:
        >>> seconds = paired({"a": lambda: None, "b": lambda: None}, rounds=3)
        >>> list(seconds), len(seconds["a"])
        (['a', 'b'], 3)
    """
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    for call in implementations.values() if warm_up else ():
        call()
    devices.synchronize(device)
    started = time.monotonic()
    for completed in range(rounds):
        if completed and time.monotonic() - started >= budget_s:
            break
        for name, call in implementations.items():
            seconds[name].append(devices.elapsed_s(call, device))
    return seconds
