"""Every kernel in Triton's interpreter, in a process where it may be switched on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.triton.conftest import FAMILIES

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_equal_their_references(family):
    command = [sys.executable, "-m", "pytest", "-W", "ignore", str(Path(__file__).parent / family)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
