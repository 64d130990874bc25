"""Files and folders that are written atomically: complete under their name or absent, even after a power failure.

Everything goes through one sequence: write under a temporary name next to the target, fsync the file, rename it, fsync
the folder. Temporary names are random and created exclusively, so that no two processes share one, also not in two
containers with one volume. A process holds a lock on its temporary file while it writes; `remove_leftovers` removes
temporary files that no process holds: those of killed processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no fcntl: nothing is locked, and nothing is removed as a leftover
    fcntl = None  # type: ignore[assignment]

TEMPORARY = re.compile(r"\..+\.opdkernels-[0-9a-f]{16}\.tmp", re.DOTALL)
UNPAIRED_SURROGATE = re.compile("[\ud800-\udfff]")
MOVED_FILE = ".opdkernels-moved.json"  # which files of a temporary folder are being moved to the folder around it
MAX_NAME_BYTES = 200  # a temporary name adds 33 bytes, and file systems allow 255
SYNC_FILE_RANGE_WRITE = 2  # of the Linux system call
NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file atomically, replacing an existing one. Raises OSError, after which the old file is unchanged."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON atomically; NaN and Inf raise ValueError.

    Bytes of a path that are not UTF-8, which Python represents as unpaired surrogates, are written as text, such as
    "x\\udcff": JSON with an unpaired surrogate is not Unicode text, and `opdkernels.untrusted.parse_json` rejects it.
    """
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    text = UNPAIRED_SURROGATE.sub(lambda surrogate: f"\\\\u{ord(surrogate[0]):04x}", text)
    write_atomically(path, (text + "\n").encode())


@contextlib.contextmanager
def atomic_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yields the path of an empty temporary file, for a file that is written in pieces.

    The file gets its name when the block ends without an exception, and is deleted otherwise.

    Args:
        path: Final path. Its folder must exist.
        replace: Whether a file that exists under the final path at the end of the block is replaced.

    Raises:
        FileExistsError: `replace` is False, and the file exists.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "data.bin"
        >>> with atomic_file(path) as temporary, open(temporary, "wb") as file:
        ...     _ = file.write(b"abc")
        >>> path.read_bytes()
        b'abc'
    """
    temporary, lock = create_temporary(path, create_file)
    try:
        yield temporary
        sync(temporary)
        if replace:
            os.replace(temporary, path)
        else:
            rename_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder, which gets its name if the block ends without an exception, and is deleted otherwise.

    An existing empty folder stays the same folder: it may be a mount, or the current folder of a shell. The temporary
    folder is then inside it, and its files are moved one by one at the end, JSON files such as an index last. If the
    process is killed in between, `remove_leftovers` removes the files that were moved.

    Args:
        path: Final path; absent or an empty folder. Its parent must exist.

    Raises:
        FileExistsError: At the end of the block, `path` is a file or a folder that is not empty.
    """
    inside = path.is_dir()
    temporary, lock = create_temporary(path / path.name if inside else path, create_folder)
    try:
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            sync(entry)
        if inside:
            move_files(temporary, path)
        else:
            try:
                os.rename(temporary, path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)
    sync(path if inside else path.parent)


def move_files(temporary: Path, folder: Path) -> None:
    """Moves the files of a temporary folder to the folder around it, which is empty otherwise."""
    names = sorted(os.listdir(temporary), key=lambda name: (name.endswith(".json"), name))
    existing = next((name for name in names if os.path.lexists(folder / name)), None)
    if existing is not None:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(folder / existing))
    write_json(temporary / MOVED_FILE, {name: file_identity(temporary / name) for name in names})
    try:
        for name in names:
            os.rename(temporary / name, folder / name)
        sync(folder)
    except BaseException:
        remove_moved(temporary)
        raise
    (temporary / MOVED_FILE).unlink()


def remove_moved(temporary: Path) -> None:
    """Removes the files that `move_files` moved out of a temporary folder before it was interrupted."""
    try:
        moved = json.loads((temporary / MOVED_FILE).read_text())
    except (OSError, ValueError):  # absent: nothing was moved
        return
    for name, identity in moved.items():
        path = temporary.parent / name
        with contextlib.suppress(OSError):
            if file_identity(path) == identity:
                remove_path(path)


def file_identity(path: Path) -> list[int]:
    """What tells a file that was written here from one that replaced it: inode, size, and time of modification."""
    status = os.lstat(path)
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def rename_new(temporary: Path, path: Path) -> None:
    """Renames a file. Raises FileExistsError if the new name exists, also if another process has just created it."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path)) from None
        os.rename(temporary, path)


def create_temporary(path: Path, create: Callable[[Path], int]) -> tuple[Path, int]:
    """Creates a temporary file or folder next to a path. Returns its path, and a descriptor that holds a lock on it."""
    while True:
        temporary = path.with_name(f"{temporary_prefix(path.name)}{secrets.token_hex(8)}.tmp")
        try:
            lock = create(temporary)
        except FileExistsError:
            continue
        # Another process may have taken it for a leftover before it was locked, and removed it.
        if try_lock(lock) is not False and is_open_at(temporary, lock):
            return temporary, lock
        os.close(lock)


def create_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def create_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)


def temporary_prefix(name: str) -> str:
    """How the temporary names of a file begin. Of a very long name it holds a digest.

    >>> temporary_prefix("model.safetensors")
    '.model.safetensors.opdkernels-'
    """
    encoded = os.fsencode(name)
    short = name if len(encoded) <= MAX_NAME_BYTES else hashlib.blake2b(encoded, digest_size=16).hexdigest()
    return f".{short}.opdkernels-"


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes temporary files and folders that killed processes left in a folder.

    Those that a process holds a lock on are kept, and all of them on a file system without locks.

    Args:
        folder: The folder; nothing is done if it cannot be read.
        name: Only leftovers of the output of this name; None for all.
    """
    prefix = "." if name is None else temporary_prefix(name)
    with contextlib.suppress(OSError):
        for leftover in os.listdir(folder):
            if leftover.startswith(prefix) and TEMPORARY.fullmatch(leftover):
                with contextlib.suppress(OSError):
                    remove_unless_locked(folder / leftover)


def remove_unless_locked(leftover: Path) -> None:
    """Removes a temporary file or folder unless a process holds a lock on it."""
    is_folder = leftover.is_dir()
    lock = os.open(leftover, (os.O_RDONLY if is_folder else os.O_RDWR) | getattr(os, "O_NOFOLLOW", 0))
    try:
        if try_lock(lock) and is_open_at(leftover, lock):
            if is_folder:
                remove_moved(leftover)
            remove_path(leftover)
    finally:
        os.close(lock)


def try_lock(descriptor: int) -> bool | None:
    """Locks an open file or folder exclusively. False if another process holds the lock, None if there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def is_open_at(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file or folder."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError:
        return False


def is_temporary(name: str) -> bool:
    """Whether a name is that of a temporary file or folder of this module.

    >>> is_temporary(".run.json.opdkernels-00112233445566ff.tmp"), is_temporary(".notes.tmp")
    (True, False)
    """
    return TEMPORARY.fullmatch(name) is not None


def remove_path(path: Path) -> None:
    """Removes a file, a link or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Removes a folder with its content; if the process is killed, no part of it is left under its name."""
    temporary = path.with_name(f"{temporary_prefix(path.name)}{secrets.token_hex(8)}.tmp")
    os.rename(path, temporary)
    remove_path(temporary)


def write_early(handle: int, offset: int, size: int) -> None:
    """Lets the disk write a part of a file while the rest is computed; `sync` is still needed. Only on Linux."""
    if sys.platform == "linux" and (start := getattr(ctypes.CDLL(None), "sync_file_range", None)):
        start.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        start(handle, offset, size, SYNC_FILE_RANGE_WRITE)  # a hint: what fails here, `sync` reports


def sync(path: Path) -> None:
    """Waits until the disk holds a file's content, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
