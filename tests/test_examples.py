"""The commands of examples/demo.py."""

from __future__ import annotations

import json

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
