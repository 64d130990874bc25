"""Every kernel in Triton's interpreter, in a process where it may be switched on."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

from tests.backends import shown
from tests.backends.triton.conftest import FAMILIES

ROOT = Path(__file__).parents[3]


def test_kernels_equal_their_references(tmp_path):
    """One process for all families: loading torch and Triton takes seconds."""
    files = [str(Path(__file__).parent / name) for name in FAMILIES]
    command = [sys.executable, "-m", "pytest", "-W", "ignore", f"--junitxml={tmp_path / 'tests.xml'}", *files]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    for test in xml.parse(tmp_path / "tests.xml").iter("testcase"):
        if not len(test):  # neither failed nor skipped
            shown.INTERPRETED[test.attrib["classname"].rsplit("test_", 1)[-1]] += 1
    assert {f"test_{family}.py" for family in shown.INTERPRETED} == set(FAMILIES)
