"""The same cause gives the same exit status in every command, with one line on the error stream."""

from __future__ import annotations

import errno
import importlib
import json
import os
from types import SimpleNamespace

import pytest
import torch

from opdkernels import progress
from opdkernels.cli.exit_status import ExitStatus
from tests.analysis.conftest import save
from tests.cli.conftest import CASES, commands

EVERY = pytest.mark.parametrize("command", CASES)
READ_INPUT = [name for name in CASES if name not in ("doctor", "bench", "report", "experiment", "distill")]


def arguments_of(command, inputs, out, **replaced):
    return [*command.split(), *CASES[command].arguments.format(**{**inputs, "out": out, **replaced}).split()]


def replace_function(monkeypatch, command, replacement):
    module, _, path = CASES[command].function.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, name, replacement)


def raising(error):
    def function(*arguments, **keywords):
        raise error

    return function


def assert_one_line(error):
    assert error.startswith("opdkernels: ")
    assert error.count("\n") == 1


def test_cases_cover_every_command():
    assert set(CASES) == set(commands())


@EVERY
def test_bad_option_value(run, inputs, tmp_path, command):
    status, out, error = run(*arguments_of(command, inputs, tmp_path / "out"), *CASES[command].bad_value.split())
    assert (status, out) == (ExitStatus.USAGE, "")
    assert_one_line(error)
    assert CASES[command].bad_value.split()[0] in error


@EVERY
def test_interrupted(run, inputs, tmp_path, monkeypatch, command):
    replace_function(monkeypatch, command, raising(KeyboardInterrupt()))
    status, _, error = run(*arguments_of(command, inputs, tmp_path / "out"))
    assert status == ExitStatus.INTERRUPTED
    assert error == "opdkernels: interrupted; run the same command again to resume\n"


@EVERY
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "No space left on device at out; free some space"),
        (errno.EACCES, "Permission denied at out; choose another folder, and run"),
    ],
    ids=["disk full", "no permission"],
)
def test_output_that_cannot_be_written(run, inputs, tmp_path, monkeypatch, command, code, message):
    replace_function(monkeypatch, command, raising(OSError(code, os.strerror(code), "out")))
    status, _, error = run(*arguments_of(command, inputs, tmp_path / "out"))
    assert status == ExitStatus.INPUT
    assert_one_line(error)
    assert message in error
    assert ("space" in error) == (code == errno.ENOSPC)


def test_closed_error_stream(monkeypatch):
    """Python has no sys.stderr in a process that was started without one, such as a daemon's."""
    monkeypatch.setattr("sys.stderr", None)
    with progress.reporting() as show:
        assert show is progress.no_progress
        show(1, 2, "w")


@pytest.mark.parametrize("command", [*READ_INPUT, "report"])
def test_missing_input(run, inputs, tmp_path, command):
    missing = {name: str(tmp_path / "nowhere") for name in inputs}
    status, out, error = run(*arguments_of(command, inputs, tmp_path / "out", **missing))
    assert (status, out) == (ExitStatus.INPUT, "")
    assert_one_line(error)
    assert "nowhere" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["distill"], ["experiment", "masks"]])
def test_missing_configuration(run, tmp_path, command):
    status, out, error = run(*command, tmp_path / "nowhere.toml", "-o", tmp_path / "out")
    assert (status, out) == (ExitStatus.INPUT, "")
    assert "nowhere.toml does not exist" in error


@pytest.mark.parametrize("command", READ_INPUT)
def test_unreadable_input(run, inputs, tmp_path, command):
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 100)
    damaged = {name: str(tmp_path / "damaged.safetensors") for name in inputs}
    status, out, error = run(*arguments_of(command, inputs, tmp_path / "out", **damaged))
    assert (status, out) == (ExitStatus.INPUT, "")
    assert_one_line(error)
    assert "damaged.safetensors" in error


@pytest.mark.parametrize(
    "command",
    ["inspect", "analyze", "overlap", "trajectory", "graft", "mask changed", "mask top-changed"],
)
def test_checkpoints_of_different_models(run, inputs, tmp_path, command):
    other = save(tmp_path / "other", {"unrelated.weight": torch.ones(3, 5)})
    status, _, error = run(*arguments_of(command, inputs, tmp_path / "out", trained=other))
    assert status == ExitStatus.INPUT
    assert_one_line(error)


@pytest.mark.parametrize("command", ["mask combine", "mask compare"])
def test_masks_of_different_models(run, inputs, tmp_path, command):
    from opdkernels import masks

    masks.near_zero({"unrelated.weight": torch.ones(3, 5)}, 0.5).save(tmp_path / "other")
    arguments = arguments_of(command, inputs, tmp_path / "out")
    arguments[arguments.index(inputs["masks"])] = tmp_path / "other"
    status, out, error = run(*arguments)
    assert (status, out) == (ExitStatus.INPUT, "")
    assert_one_line(error)


@pytest.mark.parametrize("command", ["analyze", "overlap", "trajectory", "patch create", "patch apply", "graft"])
def test_quiet_json_prints_only_json(run, inputs, tmp_path, command):
    extra = ["--spectra", "off"] if command in ("analyze", "trajectory") else []
    status, out, error = run(*arguments_of(command, inputs, tmp_path / "out"), "-q", "--json", *extra)
    assert (status, error) == (ExitStatus.DONE, "")
    assert isinstance(json.loads(out), dict)


def test_quiet_json_of_distill_prints_only_json(run, inputs, tmp_path, monkeypatch):
    from opdkernels.distillation import loop, result

    monkeypatch.setattr(loop, "train", lambda *arguments, **keywords: SimpleNamespace(is_main=True, exit_status=0))
    monkeypatch.setattr(result, "summary", lambda result: {"step": 1})
    monkeypatch.setattr(result, "format_text", lambda result: ["step 1"])
    arguments = arguments_of("distill", inputs, tmp_path / "out")
    assert json.loads(run(*arguments, "-q", "--json")[1]) == {"step": 1}
    assert run(*arguments, "-q")[1] == ""
    assert run(*arguments)[1] == "step 1\n"


def test_group_without_command_prints_help(run):
    for arguments in ((), ("mask",), ("patch",)):
        status, out, error = run(*arguments)
        assert status == ExitStatus.USAGE
        assert "Usage:" in out + error


def test_unknown_command_gets_its_suggestion_once(run):
    status, _, error = run("mask", "randon")
    assert status == ExitStatus.USAGE
    assert "No such command 'randon'" in error
    assert error.count("Did you mean") <= 1  # none with older versions of click and Typer


def test_version(run):
    from opdkernels import __version__

    assert run("--version") == (ExitStatus.DONE, f"opdkernels {__version__}\n", "")
