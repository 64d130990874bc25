"""Every command that compares checkpoints says first how much it compared; if that is too little, the status is 3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.analysis.conftest import save
from tests.in_process import run_cli as run

LINE = "Only 8 parameters were compared: 50.00 % of the base and 100 % of the trained checkpoint."
LINE_OF_RUNS = "Only 8 parameters were compared: 50.00 % of the base, 100 % of {} and 100 % of {}."
COMMANDS = {
    "inspect": "inspect {base} {half}",
    "analyze": "analyze {base} {half} -o {out} --spectra off --no-report",
    "overlap": "overlap {base} {half} {half} -o {out} --no-report",
    "trajectory": "trajectory {base} {half} {later} -o {out} --spectra off --no-report",
    "mask changed": "mask changed {base} {half} -o {out}",
    "mask top-changed": "mask top-changed {base} {half} --density 0.5 -o {out}",
}
SIDES = {"overlap": ["run A", "run B"], "trajectory": ["half", "later"]}


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    weights = {f"model.layers.{i}.up_proj.weight": torch.arange(8.0).view(2, 4).bfloat16() for i in range(2)}
    half = {"model.layers.0.up_proj.weight": weights["model.layers.0.up_proj.weight"] + 1}
    return {
        "base": save(tmp_path / "base", weights),
        "half": save(tmp_path / "half", half),
        "later": save(tmp_path / "later", {name: tensor + 1 for name, tensor in half.items()}),
        "other": save(tmp_path / "other", half | {"x": torch.ones(3).bfloat16()}),
        "out": tmp_path / "out",
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_half_of_a_model_is_said_first_and_ends_with_status_3(name: str, paths: dict[str, Path]) -> None:
    done = run(*COMMANDS[name].format(**paths).split())
    assert done.returncode == 3, done.stderr
    line = LINE_OF_RUNS.format(*SIDES[name]) if name in SIDES else LINE
    assert done.stdout.splitlines()[0] == ("not comparable: " if name == "analyze" else "") + line
    assert "identical:" not in done.stdout


def test_graft_of_another_model_ends_with_status_3(paths: dict[str, Path]) -> None:
    done = run(*"graft {base} {other} --select layer=0 -o {out} --json".format(**paths).split())
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["coverage"]["parameters"] == {"base": 16, "trained": 11}
