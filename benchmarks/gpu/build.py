"""What a bare machine can build of the package, in place: the CPU's kernels and the CUDA library. Says what is missing, and goes on."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def lacking() -> list[str]:
    """What a full build needs and this machine has not."""
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin") or shutil.which("nvcc")
    here = {
        "setuptools: nothing can be built": importlib.util.find_spec("setuptools"),
        "a C++ compiler (g++): the reference stands in for the CPU's kernels": shutil.which("g++")
        or shutil.which("c++"),
        "nvcc: NVRTC or Triton serves, there is no CUDA library": nvcc,
    }
    return [what for what, found in here.items() if not found]


def build(say: Callable[[str], None], timeout_s: float) -> None:
    """Builds what can be built; never fails."""
    for what in lacking():
        say(f"build: no {what}")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        say(f"build: gave up after {timeout_s:.0f} s")
        return
    ours = [line for line in done.stderr.splitlines() if line.startswith("opdkernels:") or "rror" in line]
    for line in ours[-3:]:
        say(f"build: {line}")
    built = sorted(path.name for path in (ROOT / "opdkernels").glob("*.so"))
    say(f"build: {', '.join(built) or 'nothing'}{'' if done.returncode == 0 else f', exit status {done.returncode}'}")
