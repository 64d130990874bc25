"""The directory of an analysis: its identity, run.json, and a lock so that only one process writes to it."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field

from opdkernels.backends import cpu, lapack
from opdkernels.checkpoint.base import Checkpoint
from opdkernels.errors import InputError, printable
from opdkernels.files import remove_leftovers, try_lock, write_json
from opdkernels.models import Strict, validate
from opdkernels.outputs import ANALYSIS, RUN_FILE, remove_outputs, resolve_output, validate_run_folder
from opdkernels.untrusted import read_file, read_json
from opdkernels.version import __version__

REMEDY = "run the command again with --overwrite"
MAX_OUTPUT_BYTES = 2**31
OUTPUTS = tuple(name for name in ANALYSIS.files if name == "summary.json" or name.endswith(".parquet"))
"""Files that are read again; run.json has their digests."""


class Part(Strict):
    """A part of run.json; versions of the package may add keys."""

    model_config = ConfigDict(extra="allow")


class FileEntry(Part):
    name: str
    bytes: int = Field(ge=0)
    mtime_ns: int
    header_digest: str


class Input(Part):
    path: str
    kind: str
    files: list[FileEntry]


class Options(Part):
    memory: int | None = Field(None, ge=0)


class Machine(Part):
    processor: str
    threads: int
    instruction_set: str
    lapack: str | None = None


class Versions(Part):
    opdkernels: str


class RunFile(Part):
    """The content of run.json."""

    status: Literal["running", "complete", "failed"]
    command: Literal["analyze", "overlap", "trajectory"]
    identity: str = Field(pattern="^[0-9a-f]{32}$")
    options: Options
    inputs: dict[str, Input]
    versions: Versions
    machine: Machine
    started: str
    seconds: float | None = Field(None, ge=0)
    resumed_tensors: int | None = Field(None, ge=0)
    outputs: dict[Literal[OUTPUTS], Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]] = Field({})  # type: ignore[valid-type]


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
        "format": ANALYSIS.format,
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
            "instruction_set": "reference" if cpu.unavailable_reason() else cpu.native.current_isa(),
            "lapack": lapack.chosen_library(),
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
def open_run_dir(out: str | os.PathLike[str] | None, run: dict[str, Any], overwrite: bool) -> Iterator[Path | None]:
    """Locks the directory of a run and writes run.json; a directory with a run of the same identity resumes it.

    The status in run.json becomes `complete` at the end, `failed` after an InputError, and stays `running` otherwise.

    Args:
        out: The directory, created if absent; None to write nothing.
        run: The content of run.json from `describe_run`; "status" and "seconds" are updated in place.
        overwrite: Remove the outputs of an earlier run first.

    Yields:
        The directory, or None.

    Raises:
        InputError: The directory may not be written (see `validate_run_folder`), contains another run, is locked by
            another process, or cannot be written.
    """
    started = time.monotonic()
    if out is None:
        yield None
        run |= {"status": "complete", "seconds": round(time.monotonic() - started, 3)}
        return
    with lock_dir(out) as folder:
        acquire(folder, run, overwrite)
        try:
            yield folder
        except InputError:
            seconds = round(time.monotonic() - started, 3)
            write_json(folder / RUN_FILE, run | {"status": "failed", "seconds": seconds})
            raise
        run |= {
            "status": "complete",
            "seconds": round(time.monotonic() - started, 3),
            "outputs": {name: digest_of(folder / name) for name in OUTPUTS if (folder / name).exists()},
        }
        write_json(folder / RUN_FILE, run)


def digest_of(path: Path) -> str:
    """Digest of the bytes of a table or summary. Raises InputError if it cannot be read."""
    return hashlib.blake2b(read_file(path, max_bytes=MAX_OUTPUT_BYTES, remedy=REMEDY), digest_size=16).hexdigest()


@contextlib.contextmanager
def lock_dir(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Creates a directory if absent and holds an exclusive lock on it. Removes what killed processes left in it.

    Raises:
        InputError: Another process holds the lock, or the directory cannot be written.
        UsageError: `out` is empty or the root of the file system.
    """
    resolved, folder = resolve_output(out), Path(out)
    named = printable(str(folder))
    try:
        if resolved.exists() and not resolved.is_dir():
            raise InputError(f"{named} is a file; give a folder to -o")
        resolved.mkdir(parents=True, exist_ok=True)  # also where `out` is a link to a folder that does not exist yet
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot write to {named}: {error.strerror}; choose another folder") from None
    try:
        if try_lock(lock) is False:
            raise InputError(f"another process is writing to {named}; wait for it, or choose another folder")
        for place in (folder, *(path for path in folder.glob("*") if path.is_dir())):
            remove_leftovers(place)
        yield folder
    finally:
        os.close(lock)


def acquire(folder: Path, run: dict[str, Any], overwrite: bool) -> None:
    """Writes run.json to a locked directory. Raises InputError if it contains another run or cannot be written."""
    named = printable(str(folder))
    try:
        validate_run_folder(
            folder, ANALYSIS, inputs={role: described["path"] for role, described in run["inputs"].items()}
        )
        existing = read_run(folder) if not overwrite else None
        if overwrite:
            remove_outputs(folder, ANALYSIS)
        if existing is not None and existing["identity"] != run["identity"]:
            raise InputError(
                f"{named} holds another run ({existing['command']}, {existing['status']}, of other inputs, options "
                "or another version); choose another folder, or pass --overwrite"
            )
        write_json(folder / RUN_FILE, run)
    except OSError as error:
        raise InputError(f"cannot write to {named}: {error.strerror}; choose another folder") from None


def read_run(folder: Path) -> dict[str, Any] | None:
    """run.json of a directory, or None if there is none. Raises InputError if it cannot be read."""
    path = folder / RUN_FILE
    if not path.exists():
        return None
    remedy = "restore it, or choose another folder"
    run = read_json(path, remedy=remedy)
    validate(RunFile, run, printable(os.fspath(path)), remedy=remedy)
    return run


def load_finished(folder: Path) -> dict[str, Any]:
    """run.json of a finished run. Raises InputError if there is none, or if its tables or its summary were changed."""
    run = read_run(folder)
    if run is None:
        raise InputError(
            f"{printable(str(folder))} holds no run (no run.json); give the folder that a command wrote with -o"
        )
    if run.get("format") != ANALYSIS.format:
        raise InputError(
            f"{printable(str(folder))} has a {RUN_FILE} that is not of {ANALYSIS.noun}; give the folder of such a run"
        )
    if run["status"] != "complete":
        raise InputError(
            f"{printable(str(folder))} holds a run that is {run['status']}; run {run['command']} again to finish it"
        )
    for name, digest in run.get("outputs", {}).items():
        if digest_of(folder / name) != digest:
            raise InputError(
                f"{printable(str(folder / name))} is damaged: its bytes are not those that were written; {REMEDY}"
            )
    return run
