"""Device names as users give them, and why a device is not available."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opdkernels.errors import InputError, printable

REMEDY = "or omit --device"
CPU = torch.device("cpu")
gpu_lock = threading.Lock()


def resolve_device(name: str) -> torch.device:
    """The device that a name means.

    Args:
        name: cpu, cuda or cuda:N. Plain `cuda` is the GPU of LOCAL_RANK, which launchers set, else the first.

    Returns:
        The device, with its index.

    Raises:
        InputError: The device is not available.
    """
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if torch.version.cuda is None and torch.version.hip is None:
        raise InputError(
            f"--device {name}: torch {torch.__version__} is built without CUDA; "
            f"install a build of torch for this machine's GPU, {REMEDY}"
        )
    if not torch.cuda.is_available():
        raise InputError(f"--device {name}: {cuda_unavailable_reason()}; check nvidia-smi, {REMEDY}")
    count = torch.cuda.device_count()
    index = local_rank() % count if device.index is None else device.index
    if index >= count:
        raise InputError(f"--device {name}: only {count} GPUs are visible; use cuda:{count - 1} or lower, {REMEDY}")
    return torch.device("cuda", index)


def cuda_unavailable_reason() -> str:
    """Torch's error about a GPU that it cannot use, such as a driver that is too old for its CUDA."""
    try:
        torch.cuda.init()
    except Exception as error:
        return printable(str(error).splitlines()[0].split(". ")[0].rstrip("."))
    return "no GPU is visible"


def local_rank() -> int:
    """LOCAL_RANK of this process; 0 if it is not set."""
    rank = os.environ.get("LOCAL_RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def probed_device(name: str, probe: Callable[[torch.device], None]) -> torch.device:
    """The device that a name means, after `probe` has run a kernel on it.

    Raises InputError if the device is not available or the kernel fails.
    """
    device = resolve_device(name)
    try:
        probe(device)
    except (RuntimeError, ImportError, OSError) as error:
        reason = printable(str(error).splitlines()[0])
        raise InputError(
            f"--device {name}: {reason}; `opdkernels doctor` lists the kernels of this machine, {REMEDY}"
        ) from error
    return device


def device_lock(device: torch.device) -> contextlib.AbstractContextManager:
    """A lock for work that fills a GPU, so that threads use it one at a time; no lock on the CPU."""
    return contextlib.nullcontext() if device.type == "cpu" else gpu_lock


def default_device() -> torch.device:
    """The first available GPU, or that of LOCAL_RANK; the CPU if there is none."""
    return resolve_device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait for the work that was queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of a GPU's allocated memory, or of this process's resident memory (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory since the last reset, in bytes; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def empty_cache(device: torch.device) -> None:
    """Returns the allocator's unused blocks to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def elapsed_s(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call takes on a device."""
    return event_s(call, device) if device.type == "cuda" else clock_s(call)


def clock_s(call: Callable[[], Any]) -> float:
    """Seconds of a call by the clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def event_s(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds between two events on the current stream, before and after a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000


def free_memory_bytes(device: torch.device) -> int:
    """Free memory of a GPU in bytes."""
    return torch.cuda.mem_get_info(device)[0]


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Name, compute capability and memory of a GPU, and torch's CUDA version."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda or "",
    }


def extra_memory_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of a call on a GPU beyond the memory held before, results included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before
