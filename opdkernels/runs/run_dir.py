"""The directory of a run: its identity, run.json, and a lock so that only one process writes to it."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdkernels.backends import cpu
from opdkernels.checkpoint.base import Checkpoint
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.files import write_json
from opdkernels.version import __version__

try:
    import fcntl
except ImportError:  # Windows has no fcntl: two writers are not detected there
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class RunOutputs:
    """Names of the files and folders that runs write to their directory besides run.json."""

    files: tuple[str, ...]
    folders: tuple[str, ...]


def describe_run(
    command: str,
    options: dict[str, Any],
    inputs: Mapping[str, Checkpoint],
    *,
    schema_version: int,
    identity_inputs: Sequence[str] | None = None,
    identity_options: Sequence[str] = (),
) -> dict[str, Any]:
    """The initial content of run.json.

    `identity` is a digest of what determines the result; a directory resumes only a run of the same identity.

    Args:
        command: Name of the command.
        options: All options of the command, as JSON.
        inputs: The open checkpoints by role ("base", "trained", "A").
        schema_version: Version of the stored records; part of the identity.
        identity_inputs: Roles whose files are part of the identity; None for all.
        identity_options: Options that are part of the identity.

    Returns:
        status, command, identity, options, inputs, versions, machine and start time.
    """
    described: dict[str, dict[str, Any]] = {
        role: {"path": checkpoint.path, "kind": checkpoint.kind, "files": [vars(file) for file in checkpoint.files]}
        for role, checkpoint in inputs.items()
    }
    roles = described if identity_inputs is None else identity_inputs
    identity = [
        command,
        __version__,
        schema_version,
        {role: [os.path.realpath(described[role]["path"]), described[role]["files"]] for role in roles},
        *([[options[name] for name in identity_options]] if identity_options else []),
    ]
    return {
        "status": "running",
        "command": command,
        "identity": hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest(),
        "options": options,
        "inputs": described,
        "versions": {
            "opdkernels": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "instruction_set": "reference" if cpu.unavailable_reason() else cpu._C.current_isa(),
        },
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The processor's model name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def open_run_dir(
    out: str | os.PathLike[str] | None, run: dict[str, Any], overwrite: bool, outputs: RunOutputs
) -> Iterator[Path | None]:
    """Locks the directory of a run and writes run.json; a directory with a run of the same identity resumes it.

    The status in run.json becomes `complete` at the end, `failed` after an InputError, and stays `running` otherwise.

    Args:
        out: The directory, created if absent; None to write nothing.
        run: The content of run.json from `describe_run`; "status" and "seconds" are updated in place.
        overwrite: Remove the outputs of an earlier run first.
        outputs: Names that runs write there.

    Yields:
        The directory, or None.

    Raises:
        InputError: The directory contains another run, is locked by another process, or cannot be written.
    """
    started = time.monotonic()
    if out is None:
        yield None
        run |= {"status": "complete", "seconds": round(time.monotonic() - started, 3)}
        return
    with lock_dir(out) as folder:
        acquire(folder, run, overwrite, outputs)
        try:
            yield folder
        except InputError:
            seconds = round(time.monotonic() - started, 3)
            write_json(folder / "run.json", run | {"status": "failed", "seconds": seconds})
            raise
        run |= {"status": "complete", "seconds": round(time.monotonic() - started, 3)}
        write_json(folder / "run.json", run)


@contextlib.contextmanager
def lock_dir(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Creates a directory if absent and holds an exclusive lock on it.

    Raises:
        InputError: Another process holds the lock, or the directory cannot be written.
        UsageError: `out` is empty.
    """
    if not os.fspath(out):
        raise UsageError("the output folder has no name; give one to -o")
    folder = Path(out)
    named = printable(str(folder))
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{named} is a file; give a folder to -o")
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot write to {named}: {error.strerror}; choose another folder") from None
    try:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another process is writing to {named}; wait for it, or choose another folder"
                ) from None
            except OSError:  # a file system without locks
                pass
        yield folder
    finally:
        os.close(lock)


def acquire(folder: Path, run: dict[str, Any], overwrite: bool, outputs: RunOutputs) -> None:
    """Writes run.json to a locked directory. Raises InputError if it contains another run or cannot be written."""
    named = printable(str(folder))
    try:
        check_paths_disjoint(folder, run, outputs.folders)
        if overwrite:
            remove_outputs(folder, outputs)
        existing = read_run(folder)
        if existing is not None and existing["identity"] != run["identity"]:
            raise InputError(
                f"{named} holds another run ({existing['command']}, {existing['status']}, of other inputs, options "
                "or another version); choose another folder, or pass --overwrite"
            )
        write_json(folder / "run.json", run)
    except OSError as error:
        raise InputError(f"cannot write to {named}: {error.strerror}; choose another folder") from None


def check_paths_disjoint(folder: Path, run: dict[str, Any], folders: Sequence[str]) -> None:
    """Raises InputError if the run would write to or remove an input, or a folder that no run created."""
    named = printable(str(folder))
    written_paths = [os.path.realpath(folder / name) for name in folders]
    for role, described in run["inputs"].items():
        path = os.path.realpath(described["path"])
        for written in written_paths:
            if os.path.exists(path) and (path == written or path.startswith(written + os.sep)):
                raise InputError(
                    f"{role} {printable(described['path'])} is inside {printable(written)}, which the run writes to; "
                    f"choose another folder than {named}"
                )
    if not (folder / "run.json").exists():
        for name in folders:
            if (folder / name).exists() or (folder / name).is_symlink():
                raise InputError(
                    f"{named} has a folder {name} that no run created, as there is no run.json; choose another folder"
                )


def remove_outputs(folder: Path, outputs: RunOutputs) -> None:
    """Removes what runs write and leaves every other file. run.json goes last: an interrupted --overwrite is still
    recognised as a run."""
    for name in (*outputs.files, *outputs.folders, "run.json"):
        remove_path(folder / name)


def remove_path(path: Path) -> None:
    """Removes a file, a link or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_run(folder: Path) -> dict[str, Any] | None:
    """run.json of a directory, or None if there is none. Raises InputError if it cannot be read."""
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text())
        return {**run, "command": run["command"], "status": run["status"], "identity": run["identity"]}
    except (ValueError, KeyError, TypeError, OSError):
        raise InputError(
            f"{printable(str(path))} cannot be read; delete the folder, or start again with --overwrite"
        ) from None


def load_finished(folder: Path) -> dict[str, Any]:
    """run.json of a finished run. Raises InputError if there is none."""
    run = read_run(folder)
    if run is None:
        raise InputError(
            f"{printable(str(folder))} holds no run (no run.json); give the folder that a command wrote with -o"
        )
    if run["status"] != "complete":
        raise InputError(
            f"{printable(str(folder))} holds a run that is {run['status']}; run {run['command']} again to finish it"
        )
    return run


@contextlib.contextmanager
def as_input_error(folder: Path) -> Iterator[None]:
    """Turns errors in reading the files of a run into InputError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors derive from these
        reason = printable(str(error).splitlines()[0])
        raise InputError(
            f"{printable(str(folder))} is damaged ({reason}); run the command again with --overwrite"
        ) from None
