"""Kernels on fibers under sanitizers: undefined behaviour in all tests, addresses in a process with ASan preloaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from opdkernels.ops.quantile import cuda as quantile
from tests.backends.cuda.fibers import COMPILER, ROOT, SANITIZER, kernel_source, launch_on_fibers, load_kernels
from tests.ops.conformance import make_pair

pytestmark = pytest.mark.skipif(COMPILER is None or SANITIZER == "address", reason="no g++")
FAMILIES = [str(path) for path in sorted((ROOT / "tests" / "ops").glob("*/test_*_cuda.py"))]

SPOIL = """
import sys
import pytest
from opdkernels.backends.cuda import launch
from opdkernels.ops.quantile import cuda as quantile
from tests.backends.cuda.fibers import load_kernels, kernel_source
from tests.ops.conformance import make_pair

assert pytest.main(["-k", "misaligned or (shared_memory_size and 163)", *sys.argv[1:]]) == 0
print("sound", flush=True)
kernels = load_kernels("quantile", kernel_source("quantile").replace("i + V <= n && ", ""), "address")
launch.kernels, launch.device_limits, quantile.THREADS = (lambda: kernels), (lambda device: (2, 1 << 17)), 64
quantile.quantile(make_pair(3001)[0], [5], True, None)
"""


def test_no_access_outside_tensors_tables_and_shared_memory():
    """Their tests pass; then a wide load without a masked tail is reported."""
    library = subprocess.run(
        [str(COMPILER), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {
        **os.environ,
        "OPDKERNELS_TEST_SANITIZER": "address",
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    done = subprocess.run(
        [sys.executable, "-c", SPOIL, *FAMILIES], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    printed = done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout, printed
    assert "sound" in done.stdout, printed
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_unaligned_wide_load_is_detected(monkeypatch, capfd):
    aligned = " && ((opd_u64)at & (width - 1)) == 0"
    assert aligned in kernel_source("quantile")
    launch_on_fibers(monkeypatch, load_kernels("quantile", kernel_source("quantile").replace(aligned, "")))
    monkeypatch.setattr(quantile, "THREADS", 64)
    quantile.quantile(make_pair(3000)[0][1:], [5], True, None)
    assert "misaligned address" in capfd.readouterr().err
