"""What is distributed: the source archive is the whole repository."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools import dist

ROOT = Path(__file__).parent.parent


def test_source_archive_has_every_file_of_the_repository(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    # A copy: setuptools writes to the folder of the project.
    copy = tmp_path / "copy"
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).symlink_to(ROOT / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "dist")]
    subprocess.run(command, cwd=copy, capture_output=True, check=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as file:
        stored = {name.partition("/")[2] for name in file.getnames()}
    missing = {name for name in tracked if name and not name.startswith(".") and (ROOT / name).is_file()} - stored
    assert not missing


def test_wheel_serves_every_version_of_python():
    """The extension is a plain library: neither its file name nor the tag of its wheel has a version of Python."""
    program = (
        "import setup\n"
        "from setuptools import Distribution\n"
        "distribution = Distribution({'name': 'opdkernels', 'version': '0', 'ext_modules': [setup.library()]})\n"
        "wheel = setup.Wheel(distribution)\n"
        "wheel.ensure_finalized()\n"
        "print(*wheel.get_tag()[:2], setup.Build(distribution).get_ext_filename('opdkernels._cpu'))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["py3", "none", "opdkernels/_cpu.so"]


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("opdkernels-1-py3-none-manylinux_2_34_x86_64.whl", ["opdkernels/_cpu.so"], ""),
        ("opdkernels-1-py3-none-linux_x86_64.whl", ["opdkernels/_cpu.so"], "is not tagged"),
        ("opdkernels-1-cp311-cp311-manylinux_2_34_x86_64.whl", ["opdkernels/_cpu.so"], "is not tagged"),
        ("opdkernels-1-py3-none-manylinux_2_34_aarch64.whl", ["opdkernels/_cpu.so"], "is not tagged"),
        ("opdkernels-1-py3-none-manylinux_2_34_x86_64.whl", ["opdkernels/__init__.py"], "no compiled kernels"),
    ],
)
def test_wheels_are_checked(tmp_path, name, files, message):
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        for file in files:
            wheel.writestr(file, "")
    if not message:
        dist.check_wheel(tmp_path / name, "x86_64")
        return
    with pytest.raises(SystemExit, match=message):
        dist.check_wheel(tmp_path / name, "x86_64")


def test_a_python_on_the_path_that_does_not_run_is_left_out(tmp_path, monkeypatch):
    for version, command in {"3.10": "exit 1", "3.12": "exit 0"}.items():
        script = tmp_path / f"python{version}"
        script.write_text(f"#!/bin/sh\n{command}\n")
        script.chmod(0o755)
    (tmp_path / "python3.13").write_text("#!/nonexistent/python\n")
    (tmp_path / "python3.13").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert dist.found_pythons() == [str(tmp_path / "python3.12")]
