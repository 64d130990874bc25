"""CUDA kernels without a GPU: a .cu file compiled by g++ with `fiber_shim.h`, which runs threads as fibers."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from opdkernels.backends.cuda import launch
from opdkernels.backends.cuda.sources import inline_includes

ROOT = Path(__file__).parents[3]
SHIM = Path(__file__).with_name("fiber_shim.h")
COMPILER = shutil.which("g++") if sys.platform == "linux" else None
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++ on Linux")
FLAGS = [
    "-std=c++17",
    "-g1",
    "-fPIC",
    "-shared",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-clobbered",
    "-Wno-unused-function",
]
BUILDS = {  # misaligned wide loads are undefined behaviour
    "undefined": ["-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all"],
    "address": ["-O0", "-fsanitize=address"],
    "quick": ["-O0", "-fsanitize=undefined"],  # reports and continues
}
SANITIZER = os.environ.get(
    "OPDKERNELS_TEST_SANITIZER", "undefined"
)  # "address" needs its library loaded first: test_sanitized.py
ORDERS = (0, 1, 2, 3)  # warp by warp, ascending and descending; step by step, shuffled, in two ways


@functools.cache
def build_dir() -> Path:
    path = Path(tempfile.mkdtemp(prefix="opdkernels-cuda-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def load_kernels(family: str, source: str | None = None, build: str | None = None) -> launch.LibraryKernels:
    """A family's kernels, compiled once; or those of another source."""
    text = source or kernel_source(family)
    flags = BUILDS[build or ("quick" if source else SANITIZER)]
    path = build_dir() / f"{family}-{abs(hash(text)):x}"
    path.with_suffix(".cpp").write_text(text)
    command = [
        COMPILER,
        *FLAGS,
        *flags,
        "-include",
        str(SHIM),
        str(path.with_suffix(".cpp")),
        "-o",
        str(path.with_suffix(".so")),
    ]
    environment = {
        name: value for name, value in os.environ.items() if name != "LD_PRELOAD"
    }  # the sanitizer is for kernels, not for the compiler
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return launch.LibraryKernels(path.with_suffix(".so"))


def kernel_source(family: str) -> str:
    """The CUDA source of a family with its includes, as NVRTC takes it."""
    return inline_includes(ROOT / "csrc" / family / "cuda.cu")


def launch_on_fibers(
    monkeypatch, kernels: launch.LibraryKernels, *, order: int = 0, num_sms: int = 2, shared_bytes: int = 227 << 10
) -> None:
    """Makes the launchers run these kernels on CPU tensors, as on a device of this size."""
    kernels.library.shim_order(order)
    monkeypatch.setattr(launch, "kernels", lambda: kernels)
    monkeypatch.setattr(launch, "device_limits", lambda device: (num_sms, shared_bytes))
