"""Runs a command of `opdkernels` in this process: loading torch for another one takes longer than most commands."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch

from opdkernels import cli


def run_cli(
    *arguments: Any, cwd: str | os.PathLike[str] | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What `opdkernels ARGUMENTS` ends with and prints, as `subprocess.run` returns it.

    Args:
        arguments: Arguments of the command.
        cwd: Working directory.
        env: Variables added to the environment.
    """
    command = [str(argument) for argument in arguments]
    out, error, status = io.StringIO(), io.StringIO(), 0
    previous_cwd, num_threads = os.getcwd(), torch.get_num_threads()
    os.chdir(cwd or previous_cwd)
    try:
        with (
            mock.patch.dict(os.environ, env or {}),
            mock.patch.object(warnings, "formatwarning"),  # which main replaces
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(error),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("default")
            warnings.showwarning = print_warning
            cli.main(command)
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    finally:
        os.chdir(previous_cwd)
        torch.set_num_threads(num_threads)
    return subprocess.CompletedProcess(command, status, out.getvalue(), error.getvalue())


def print_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """`warnings.showwarning` of a process that nothing captures warnings of, as pytest does."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))
