"""The output folder of a run: whose it is, what run.json says, and that no two processes write to it at once."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdkernels.backends import cpu
from opdkernels.checkpoint.base import Source
from opdkernels.compat import paper_csv
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.runs.records import SCHEMA_VERSION, write_json
from opdkernels.version import __version__

try:
    import fcntl
except ImportError:  # not on Windows, where two writers are not noticed
    fcntl = None  # type: ignore[assignment]

OWN_FOLDERS = ("tallies", "spectra", "steps", "similarity", "factors")
# run.json goes last: until then an interrupted --overwrite is known for what it is.
OWN_FILES = (
    "summary.json",
    "tensors.parquet",
    "groups.parquet",
    "tensors.csv",
    "groups.csv",
    "report.html",
    "overlap.parquet",
    "overlap.csv",
    "spectra.parquet",
    "geometry.parquet",
    "spectra.csv",
    "geometry.csv",
    "trajectory.parquet",
    "trajectory.csv",
    *paper_csv.FILES,
    *OWN_FOLDERS,
    "run.json",
)


def describe(command: str, options: dict[str, Any], sources: dict[str, Source]) -> dict[str, Any]:
    """What run.json says at the start. `identity` covers what decides the result: the inputs and the version; of a trajectory
    the source alone, as checkpoints may be added, and each is a run of its own."""
    inputs: dict[str, dict[str, Any]] = {
        role: {"path": source.path, "kind": source.kind, "files": [vars(fact) for fact in source.files]}
        for role, source in sources.items()
    }
    deciding = {"source": inputs["source"]} if command == "trajectory" else inputs
    facts = [
        command,
        __version__,
        SCHEMA_VERSION,
        {r: [os.path.realpath(i["path"]), i["files"]] for r, i in deciding.items()},
    ]
    if command == "overlap":
        facts.append([options["atol"], options["strata"]])
    return {
        "status": "running",
        "command": command,
        "identity": hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest(),
        "options": options,
        "inputs": inputs,
        "versions": {
            "opdkernels": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "instruction_set": "reference" if cpu.why_not() else cpu._C.current_isa(),
        },
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def opened(out: str | os.PathLike[str] | None, run: dict[str, Any], overwrite: bool) -> Iterator[Path | None]:
    """The folder for the time of a run, locked, with run.json in it: new, or of the same run, which then goes on.

    run.json says `complete` at the end, `failed` after bad input, and stays `running` after anything else. Raises
    InputError where the folder holds another run, is being written to, or cannot be.
    """
    began = time.monotonic()
    if out is None:
        yield None
        run |= {"status": "complete", "seconds": round(time.monotonic() - began, 3)}
        return
    with locked(out) as folder:
        claim(folder, run, overwrite)
        try:
            yield folder
        except InputError:
            write_json(folder / "run.json", run | {"status": "failed", "seconds": round(time.monotonic() - began, 3)})
            raise
        run |= {"status": "complete", "seconds": round(time.monotonic() - began, 3)}
        write_json(folder / "run.json", run)


@contextlib.contextmanager
def locked(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder, made where there is none, that no other process may lock for a while.

    Raises InputError where another process has locked it, or it cannot be written to, UsageError where it has no name.
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


def claim(folder: Path, run: dict[str, Any], overwrite: bool) -> None:
    named = printable(str(folder))
    try:
        keep_apart(folder, run)
        if overwrite:
            clear(folder)
        before = read_run(folder)
        if before is not None and before["identity"] != run["identity"]:
            raise InputError(
                f"{named} holds another run ({before['command']}, {before['status']}, of other inputs, options or another version); "
                "choose another folder, or pass --overwrite"
            )
        write_json(folder / "run.json", run)
    except OSError as error:
        raise InputError(f"cannot write to {named}: {error.strerror}; choose another folder") from None


def keep_apart(folder: Path, run: dict[str, Any]) -> None:
    """Raises InputError where the run would write into, or clear away, a folder that no run made."""
    named = printable(str(folder))
    written = [os.path.realpath(folder / name) for name in OWN_FOLDERS]
    for role, given in run["inputs"].items():
        path = os.path.realpath(given["path"])
        for own in written:
            if os.path.exists(path) and (path == own or path.startswith(own + os.sep)):
                raise InputError(
                    f"{role} {printable(given['path'])} lies in {printable(own)}, which the run writes to; choose another folder than {named}"
                )
    if not (folder / "run.json").exists():
        for name in OWN_FOLDERS:
            if (folder / name).exists() or (folder / name).is_symlink():
                raise InputError(
                    f"{named} has a {name} that is not of a run, as there is no run.json; choose another folder"
                )


def clear(folder: Path) -> None:
    """Removes what runs write, from the folder of one; whatever else lies there stays."""
    for name in OWN_FILES:
        remove(folder / name)


def remove(path: Path) -> None:
    """Removes a folder with all in it, a file or a link, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_run(folder: Path) -> dict[str, Any] | None:
    """run.json of a folder, or None."""
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


def finished(folder: Path) -> dict[str, Any]:
    """run.json of a finished run. Raises InputError where there is none."""
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
def readable(folder: Path) -> Iterator[None]:
    """Turns what goes wrong in reading a run's files into bad input."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are of these kinds
        what = printable(str(error).splitlines()[0])
        raise InputError(
            f"{printable(str(folder))} is damaged ({what}); run the command again with --overwrite"
        ) from None
