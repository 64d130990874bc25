"""Every kernel in Triton's interpreter, in a process where it may be switched on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.backends.triton.conftest import FAMILIES

ROOT = Path(__file__).parents[3]


def test_kernels_equal_their_references():
    """One process for all families: loading torch and Triton takes seconds."""
    files = [str(Path(__file__).parent / name) for name in FAMILIES]
    command = [sys.executable, "-m", "pytest", "-W", "ignore", *files]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
