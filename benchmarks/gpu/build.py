"""Builds the CPU kernels and the CUDA library in place; reports what the machine lacks and continues."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def missing_tools() -> list[str]:
    """What a complete build needs and this machine does not have."""
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin") or shutil.which("nvcc")
    tools = {
        "setuptools: nothing can be built": importlib.util.find_spec("setuptools"),
        "a C++ compiler (g++): the reference replaces the CPU kernels": shutil.which("g++") or shutil.which("c++"),
        "nvcc: NVRTC or Triton is used instead of the CUDA library": nvcc,
    }
    return [name for name, present in tools.items() if not present]


def build(say: Callable[[str], None], timeout_s: float) -> None:
    """Builds what can be built; never raises."""
    for tool in missing_tools():
        say(f"build: no {tool}")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        say(f"build: stopped after {timeout_s:.0f} s")
        return
    messages = [line for line in done.stderr.splitlines() if line.startswith("opdkernels:") or "rror" in line]
    for line in messages[-3:]:
        say(f"build: {line}")
    built = sorted(path.name for path in (ROOT / "opdkernels").glob("*.so"))
    say(f"build: {', '.join(built) or 'nothing'}{'' if done.returncode == 0 else f', exit status {done.returncode}'}")
