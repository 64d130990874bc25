"""Files and folders that are written atomically: complete under their name or absent, even after a power failure.

Everything goes through one sequence: write under a temporary name next to the target, fsync the file, rename it, fsync
the folder. Readers may delete files that match `.*.tmp`: they are leftovers of killed processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file atomically, replacing an existing one. Raises OSError, after which the old file is unchanged."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON atomically; NaN and Inf raise ValueError."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path for a file that is written in pieces.

    The file gets its name when the block ends without an exception, and is deleted otherwise.

    Args:
        path: Final path; an existing file is replaced. Its folder must exist.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "data.bin"
        >>> with atomic_file(path) as temporary, open(temporary, "xb") as file:
        ...     _ = file.write(b"abc")
        >>> path.read_bytes()
        b'abc'
    """
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path, *, temporary: Path | None = None, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder, which gets its name if the block ends without an exception, and is deleted otherwise.

    Args:
        path: Final path; an empty folder is replaced.
        temporary: Path of the temporary folder, where several processes must know it.
        overwrite: Also replaces a folder that is not empty.
    """
    temporary = temporary or temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            sync(entry)
        if overwrite:
            shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(path.parent)


def temporary_path(path: Path) -> Path:
    """Returns the path next to `path` under which this thread writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")


def sync(path: Path) -> None:
    """Waits until the disk holds a file's content, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
