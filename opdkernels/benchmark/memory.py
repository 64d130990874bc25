"""Peak memory of a call beyond the memory held before, results included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opdkernels.analysis.spectra_schedule import trim_heap
from opdkernels.backends import devices


def extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Runs a call and returns its extra memory; None where it cannot be measured (a CPU without Linux' /proc).

    On a CPU this is the growth of the process's resident memory: what earlier calls left for reuse is missing from it,
    so that it is exact only for tensors of many megabytes.
    """
    if device.type == "cuda":
        return devices.extra_memory_bytes(call, device)
    trim_heap()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the current size
    except OSError:
        call()
        return None
    before = devices.peak_memory_bytes(device)
    call()
    return max(0, devices.peak_memory_bytes(device) - before)
