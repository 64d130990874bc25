"""Every Triton kernel in Triton's interpreter, in a process that enables it."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

from tests.backends import summary

ROOT = Path(__file__).parents[3]


def test_kernels_match_their_references(tmp_path):
    """One process for all families, because loading torch and Triton takes seconds."""
    families = [path.parent.name for path in (ROOT / "opdkernels" / "ops").glob("*/triton.py")]
    files = [f"tests/ops/{family}/test_{family}_triton.py" for family in families]
    command = [sys.executable, "-m", "pytest", "-W", "ignore", f"--junitxml={tmp_path / 'tests.xml'}", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    for test in xml.parse(tmp_path / "tests.xml").iter("testcase"):
        if not len(test):  # neither failed nor skipped
            summary.INTERPRETED[test.attrib["classname"].split(".")[2]] += 1
    assert set(summary.INTERPRETED) == set(families)
