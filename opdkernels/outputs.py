"""Which files and folders a command may write: one decision for every command and every function of the package.

Nothing is replaced or removed that this package did not write. Files that it writes begin with the name of their format
in the metadata of their header; folders of runs have a run.json with the format of their kind. An input of the command
is never an output.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdkernels.errors import InputError, UsageError, printable
from opdkernels.files import atomic_file, atomic_folder, is_temporary, remove_leftovers, remove_path, remove_tree

RUN_FILE = "run.json"
MAX_RUN_FILE_BYTES = 1 << 28
# Names that readers of a model's folder take for a part of it: weights of any name, configuration, tokenizer, adapter.
MODEL_FILE = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|json)|adapter_model\..*|\.metadata", re.DOTALL)
CONFIG_FILE = "config.json"  # which is also read next to a file of weights
IGNORED_NAMES = {"lost+found"}  # of an empty file system
HEADER_START = re.compile(rb'.{8}\{"__metadata__":\{"format":"([ -!#-\[\]-~]{1,64})"', re.DOTALL)

Inputs = Mapping[str, str | os.PathLike[str] | None]
"""Paths that a command reads, by their name in messages. None and paths that do not exist do not count."""


@dataclass(frozen=True)
class FileKind:
    """A kind of file that the package writes, in the layout of safetensors.

    Attributes:
        format: Value of "format" in the metadata of the header, where it is the first key.
        noun: What messages call it.
    """

    format: str
    noun: str


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder in which the package writes, replaces and removes files.

    Attributes:
        format: Value of "format" in run.json.
        noun: What messages call it.
        files: Names of files that runs write to the folder, besides run.json.
        folders: Folders that runs write to, by name, and the names of their files as a regular expression.
        trees: Names of folders that belong to a run with all their content, as a regular expression.
        nested: Names of folders that contain folders of this kind.
    """

    format: str
    noun: str
    files: tuple[str, ...]
    folders: Mapping[str, str] = field(default_factory=dict)
    trees: str = ""
    nested: tuple[str, ...] = ()

    def owns(self, name: str) -> bool:
        """Whether a run writes a file or folder of this name to its folder."""
        return (
            name == RUN_FILE or name in self.files or name in self.folders or name in self.nested or self.is_tree(name)
        )

    def is_tree(self, name: str) -> bool:
        """Whether a folder of this name belongs to a run with all its content."""
        return bool(self.trees and re.fullmatch(self.trees, name))


MASKS = FileKind("opdkernels masks", "a file of masks")
PATCH = FileKind("opdkernels.patch", "a patch")
SYNC_PATCH = FileKind("opdkernels.sync", "a sync patch")

# Written by opdkernels.compat.paper_csv, listed here so that --overwrite of any command removes them.
PAPER_CSV_FILES = (
    "tensor_metrics.csv",
    "svd_metrics.csv",
    "base_geometry_metrics.csv",
    "mask_overlap_metrics.csv",
    "layer_summary.csv",
    "module_summary.csv",
    "block_summary.csv",
    "layer_module_summary.csv",
    "top_delta_tensors.csv",
    "mismatch_report.json",
    "failed_tensors.csv",
    "paper_summary.json",
)
TABLES = ("tensors", "groups", "spectra", "geometry", "overlap", "trajectory")
RECORDS = r"\d+\.[0-9a-f]+\.arrow"
ANALYSIS = FolderKind(
    "opdkernels analysis",
    "a run of analyze, overlap or trajectory",
    files=(
        "summary.json",
        "report.html",
        *(f"{table}.{suffix}" for table in TABLES for suffix in ("parquet", "csv")),
        *PAPER_CSV_FILES,
    ),
    folders={
        "tallies": RECORDS,
        "spectra": RECORDS,
        "similarity": RECORDS,
        "factors": r"[0-9a-f]{40}\.safetensors",
    },
    nested=("steps",),
)
DISTILLATION = FolderKind(
    "opdkernels distillation",
    "a run of distill",
    files=("log.jsonl", "scores.jsonl", "snapshots.jsonl"),
    folders={
        "masks": r"step-\d+\.safetensors",
        "weights": r"(start|snapshot-\d+)-\d+\.bin",
        "tensorboard": r"events\.out\.tfevents\..*",
    },
    trees=r"(checkpoint|derived-at)-\d+",
)
EXPERIMENT = FolderKind(
    "opdkernels experiment",
    "an experiment",
    files=("results.json", "table.md", "report.html"),
    trees=r"analysis|seed-\d+",
)


def resolve_output(path: str | os.PathLike[str]) -> Path:
    """The absolute path of an output, without links.

    Raises:
        UsageError: The path is empty, "-", the root of the file system or begins with "~", or no file can have this
            name.
    """
    text = os.fspath(path)
    if not text:
        raise UsageError("the output has no name; give one to -o")
    if "\0" in text:
        raise UsageError(f"the output {printable(text)} has a NUL character in its name; give another name to -o")
    if path == "-":  # a Path was interpreted before: Path("./-") is "-"
        raise UsageError("the output is -, but commands do not write to standard output; give ./- for that name")
    if isinstance(path, str) and path.split(os.sep, 1)[0] == "~":
        raise UsageError(
            f"the output {printable(text)} begins with ~, which the shell has not replaced by the home directory; "
            f"give the full path, or ./{printable(text)}"
        )
    resolved = Path(os.path.realpath(text))
    if resolved == resolved.parent:
        raise UsageError(f"the output {printable(text)} is the root of the file system; give a name inside it to -o")
    return resolved


def validate_file(
    path: str | os.PathLike[str], kind: FileKind, *, inputs: Inputs | None = None, overwrite: bool = False
) -> Path:
    """Decides whether a file may be written. Removes what killed processes left of it.

    Args:
        path: File to write.
        kind: Kind of the file.
        inputs: What the command reads.
        overwrite: Whether an existing file of this kind may be replaced.

    Returns:
        The absolute path of the file, without links.

    Raises:
        InputError: The file is an input, exists and is not of this kind, or exists and `overwrite` is False.
        UsageError: The path is empty or the root of the file system.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> validate_file(path, MASKS).name
        'notes.txt'
        >>> _ = path.write_text("mine")
        >>> try:
        ...     validate_file(path, MASKS, overwrite=True)
        ... except InputError as error:
        ...     print(str(error).removeprefix(str(path.parent)))
        /notes.txt exists and is not a file of masks; choose another name
    """
    resolved, shown = resolve_output(path), printable(os.fspath(path))
    remove_leftovers(resolved.parent, resolved.name)
    reject_inputs(resolved, shown, inputs or {}, "name")
    if resolved.is_dir() or os.path.basename(os.fspath(path)) in ("", ".", ".."):
        raise InputError(f"{shown} is a folder; give the name of a file to -o")
    if os.path.lexists(resolved):
        if file_format(resolved) != kind.format:
            raise InputError(f"{shown} exists and is not {kind.noun}; choose another name")
        if not overwrite:
            raise InputError(f"{shown} exists; choose another name, or pass --overwrite")
    validate_parent(resolved, shown)
    return resolved


def validate_new_folder(path: str | os.PathLike[str], *, inputs: Inputs | None = None) -> Path:
    """Decides whether a folder may be written that must be new or empty. Removes what killed processes left of it.

    Args:
        path: Folder to write.
        inputs: What the command reads.

    Returns:
        The absolute path of the folder, without links.

    Raises:
        InputError: The folder is an input, or it exists and is not an empty folder.
        UsageError: The path is empty or the root of the file system.
    """
    resolved, shown = resolve_output(path), printable(os.fspath(path))
    remove_leftovers(resolved)
    remove_leftovers(resolved.parent, resolved.name)
    reject_inputs(resolved, shown, inputs or {}, "folder")
    if os.path.lexists(resolved) and not (resolved.is_dir() and not any(foreign_names(resolved))):
        raise InputError(f"{shown} exists and is not an empty folder; choose another one")
    validate_parent(resolved / resolved.name if resolved.is_dir() else resolved, shown)
    return resolved


def validate_run_folder(
    path: str | os.PathLike[str], kind: FolderKind, *, inputs: Inputs | None = None
) -> dict[str, Any] | None:
    """Decides whether runs of a kind may write to a folder. Whether it may replace the run in it is up to the command.

    A folder that is not of this kind may be used as long as nothing in it has a name that the run writes.

    Args:
        path: The folder.
        kind: Kind of the folder.
        inputs: What the command reads.

    Returns:
        run.json of the run of this kind in the folder; None if there is none.

    Raises:
        InputError: The folder is an input, an input is where the run writes, or the folder contains a run of another
            kind or other files under names that the run writes.
        UsageError: The path is empty or the root of the file system.
    """
    resolved, shown = resolve_output(path), printable(os.fspath(path))
    reject_inputs(resolved, shown, inputs or {}, "folder")
    for role, source in (inputs or {}).items():
        if source is None or not os.path.exists(source):
            continue
        place = Path(os.path.realpath(source))
        if resolved in place.parents and kind.owns(place.relative_to(resolved).parts[0]):
            written = os.path.join(os.fspath(path), place.relative_to(resolved).parts[0])
            raise InputError(
                f"{role} {printable(os.fspath(source))} is inside {printable(written)}, which the run writes to; "
                f"choose another folder than {shown}"
            )
    if not resolved.exists():
        return None
    if not resolved.is_dir():
        raise InputError(f"{shown} is a file; give a folder to -o")
    if os.path.lexists(resolved / RUN_FILE):
        run = read_json_object(resolved / RUN_FILE)
        if run.get("format") != kind.format:
            raise InputError(f"{shown} has a {RUN_FILE} that is not of {kind.noun}; choose another folder")
        return run
    existing = next((name for name in foreign_names(resolved) if kind.owns(name)), None)
    if existing is not None:
        what = "a folder" if (resolved / existing).is_dir() else "a file"
        raise InputError(
            f"{shown} has {what} {printable(existing)} that no run created, as there is no {RUN_FILE}; "
            "choose another folder"
        )
    return None


def validate_parent(output: Path, shown: str) -> None:
    """Raises InputError, before anything is computed, unless a file can be created at a path and its folders too."""
    folder = next(parent for parent in output.parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise InputError(f"cannot write to {shown}: {printable(str(folder))} is not a folder; choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {shown}: {printable(str(folder))} is not writable; choose another place")


def reject_inputs(output: Path, shown: str, inputs: Inputs, noun: str) -> None:
    """Raises InputError if an output is an input, or a file in a folder that is an input, or would be read as one."""
    for role, source in inputs.items():
        if source is None or not os.path.exists(source):
            continue
        if not output.exists():
            is_file = not os.path.isdir(source)
            folder = os.path.dirname(os.path.realpath(source)) if is_file else source
            taken = output.name == CONFIG_FILE if is_file else MODEL_FILE.fullmatch(output.name)
            if taken and output.parent.exists() and output.parent.samefile(folder):
                raise InputError(
                    f"{shown} would be read as a file of the checkpoint that is an input of this command ({role}); "
                    f"choose another {noun} for the output"
                )
        elif os.path.samefile(output, source) or (output.is_file() and is_in_folder(output, source)):
            raise InputError(f"{shown} is an input of this command ({role}); choose another {noun} for the output")


def is_in_folder(file: Path, folder: str | os.PathLike[str]) -> bool:
    """Whether a file is one of those in a folder, also by a link; False if the folder cannot be listed."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return any(os.path.samefile(file, entry.path) for entry in entries if os.path.exists(entry.path))
    return False


def foreign_names(folder: Path) -> Iterator[str]:
    """Names in a folder, without temporary files of this package and what an empty file system contains."""
    return (name for name in sorted(os.listdir(folder)) if not is_temporary(name) and name not in IGNORED_NAMES)


def file_format(path: Path) -> str | None:
    """The format of a file of this package, from its first bytes; None for any other file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb") as file:
            match = HEADER_START.match(file.read(128))
    except OSError:
        return None
    return match[1].decode() if match else None


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if it cannot be read or is not an object."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_RUN_FILE_BYTES:
            return {}
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def new_file(
    path: str | os.PathLike[str], kind: FileKind, *, inputs: Inputs | None = None, overwrite: bool = False
) -> Iterator[Path]:
    """Yields a temporary path for a file of a kind (see `atomic_file`).

    Raises:
        InputError: The file may not be written (see `validate_file`).
        OSError: It cannot be written.
    """
    resolved = validate_file(path, kind, inputs=inputs, overwrite=overwrite)
    create_parent(resolved, path)
    with no_second_writer(path), atomic_file(resolved, replace=overwrite) as temporary:
        yield temporary


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, inputs: Inputs | None = None) -> Iterator[Path]:
    """Yields a temporary folder for a folder that is new or empty (see `atomic_folder`).

    Raises:
        InputError: The folder may not be written (see `validate_new_folder`).
        OSError: It cannot be written.
    """
    resolved = validate_new_folder(path, inputs=inputs)
    create_parent(resolved, path)
    with no_second_writer(path), atomic_folder(resolved) as temporary:
        yield temporary


def create_parent(resolved: Path, path: str | os.PathLike[str]) -> None:
    """Creates the folder of an output. Raises InputError if that is not possible."""
    try:
        resolved.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        shown = printable(os.fspath(path))
        raise InputError(f"cannot write to {shown}: {error.strerror}; choose another place") from None


@contextlib.contextmanager
def no_second_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the discovery that the output has appeared while it was written into InputError."""
    try:
        yield
    except FileExistsError:
        raise InputError(
            f"another process has written {printable(os.fspath(path))} in the meantime; choose another name"
        ) from None


def remove_outputs(folder: Path, kind: FolderKind) -> None:
    """Removes what runs of a kind wrote to a folder and leaves every other file.

    run.json goes last: a folder whose removal was interrupted is still recognised.
    """
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name in kind.nested and path.is_dir():
            for inner in sorted(path.iterdir()):
                if read_json_object(inner / RUN_FILE).get("format") == kind.format:
                    remove_outputs(inner, kind)
                    remove_if_empty(inner)
            remove_if_empty(path)
        elif name in kind.folders and path.is_dir():
            for inner in sorted(path.iterdir()):
                if re.fullmatch(kind.folders[name], inner.name) or is_temporary(inner.name):
                    remove_path(inner)
            remove_if_empty(path)
        elif kind.is_tree(name) and path.is_dir():
            remove_tree(path)
        elif name in kind.files and not path.is_dir():
            remove_path(path)
    (folder / RUN_FILE).unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    """Removes a folder, or a link to one, if nothing is left in it."""
    if not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
