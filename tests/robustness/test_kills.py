"""A few kills of each command that writes; `make kill` does 50 of each."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.robustness.kills import COMMANDS

# One command of each way to write: masks all write alike, and a training run takes seconds.
QUICK = ("mask changed", "mask combine", "patch create", "patch apply", "graft", "analyze", "overlap", "trajectory")


@pytest.mark.parametrize("seed", [0])
def test_killed_commands_leave_nothing_partial_and_the_next_run_gives_the_same(seed):
    done = subprocess.run(
        [sys.executable, "-m", "tests.robustness.kills", "--kills", "2", "--seed", str(seed), *QUICK],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 problems;") == len(QUICK)


def test_every_command_that_writes_is_killed():
    """A new command with an output joins COMMANDS, unless what it writes cannot be compared with another run."""
    import typer

    from opdkernels.cli import app

    def leaves(command, path=()):
        if not hasattr(command, "commands"):
            yield " ".join(path), command
        for name, inner in getattr(command, "commands", {}).items():
            yield from leaves(inner, (*path, name))

    writers = {
        name
        for name, command in leaves(typer.main.get_command(app))
        if any("--out" in parameter.opts for parameter in command.params)
    }
    assert writers - {"bench"} == set(COMMANDS)  # times differ every run
