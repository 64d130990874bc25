"""The machine that is measured: processor, instruction set, cores, GPU, versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

from opdkernels.backends import cpu, devices
from opdkernels.formatting import byte_size
from opdkernels.runs.run_dir import processor
from opdkernels.version import __version__


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_set() -> str:
    """The instruction set of the CPU kernels; "reference" if plain PyTorch runs instead."""
    return "reference" if cpu.native is None or not cpu.is_enabled() else cpu.native.current_isa()


def describe(device: torch.device = devices.CPU) -> dict[str, Any]:
    """The machine as JSON has it; "gpu" is None unless the device is one."""
    return {
        "processor": processor(),
        "instruction_set": instruction_set(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": devices.describe_gpu(device) if device.type == "cuda" else None,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "opdkernels": __version__,
    }


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 core, 2 cores."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def line(machine: Mapping[str, Any]) -> str:
    """The machine in one line.

    >>> line({"processor": "EPYC", "cores": 2, "threads": 1, "instruction_set": "avx2", "torch": "2.11.0", "gpu": None})
    'EPYC, 2 cores, avx2, torch 2.11.0, 1 thread'
    """
    parts = [
        machine["processor"],
        counted(machine["cores"], "core"),
        machine["instruction_set"],
        f"torch {machine['torch']}",
    ]
    if machine["threads"] != machine["cores"]:
        parts.append(counted(machine["threads"], "thread"))
    gpu = machine["gpu"]
    if gpu:
        parts.insert(0, f"{gpu['name']} ({gpu['capability']}, {byte_size(gpu['memory_bytes'])}), CUDA {gpu['cuda']}")
    return ", ".join(parts)
