"""The commands of examples/demo.py, and the notebooks."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from examples import demo
from opdkernels import cli
from tests.in_process import run_cli


def test_two_seeds_of_the_sample_share_more_than_magnitudes_explain(tmp_path):
    _, arguments = demo.COMMANDS["overlap"]
    done = run_cli(*arguments, "-o", tmp_path / "overlap")
    assert done.returncode == 0
    (pair,) = json.loads((tmp_path / "overlap" / "summary.json").read_text())["pairs"]
    assert pair["changed_both"] / pair["changed_a"] > 0.8
    assert 1.2 < pair["over_magnitude"] < 1.5


@pytest.mark.parametrize("name", list(demo.COMMANDS))
def test_commands_of_the_demo_parse(name):
    _, (command, *arguments) = demo.COMMANDS[name]
    group = typer.main.get_command(cli.app)
    context = group.commands[command].make_context(command, [*arguments, "-o", "out"])
    assert context.params["out"] == "out"


ROOT = Path(demo.__file__).parent.parent
FOLDER = ROOT / "examples" / "notebooks"
JUPYTER = ROOT / ".venv-notebooks" / "bin" / "jupyter-execute"
NOTEBOOKS = ["quickstart.ipynb", "masked_run.ipynb"]


def printed(notebook: Any) -> list[str]:
    """What each cell of a notebook printed, for cells that printed."""
    texts = [
        "".join("".join(output["text"]) for output in cell.get("outputs", []) if output.get("name") == "stdout")
        for cell in notebook["cells"]
    ]
    return [text for text in texts if text]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_stored_with_outputs_and_without_paths_of_a_machine(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell["outputs"]) for cell in code) >= 5
    assert all(output["output_type"] != "error" for cell in code for output in cell["outputs"])
    assert not any(part in text for part in ("/tmp/", "/home/", "/work/", "/root/", "site-packages", "stderr"))


@pytest.mark.skipif(not JUPYTER.is_file(), reason="`make test` installs Jupyter in an environment for the notebooks")
@pytest.mark.parametrize("name", ["quickstart.ipynb", pytest.param("masked_run.ipynb", marks=pytest.mark.slow)])
def test_notebooks_run(name, tmp_path):
    notebook = FOLDER / name
    executed = tmp_path / name
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [JUPYTER, "--timeout=-1", f"--output={executed}", notebook]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stored, actual = (printed(json.loads(path.read_text(encoding="utf-8"))) for path in (notebook, executed))
    assert len(actual) == len(stored)
    if name == "quickstart.ipynb":  # the same numbers on every machine
        assert actual == stored
    else:
        assert any("changed outside of the mask: 0" in text for text in actual)
