"""Files that a user hands in are data: opened without blocking, and read up to a limit.

Every error is an InputError of one line, which ends with the caller's remedy.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from typing import Any

from opdkernels.errors import InputError, printable

MAX_JSON_BYTES = 2**25
"""32 MiB: an index of 200,000 tensors has 20 MB. Lists of empty lists take 25 times their size in memory."""

TOO_MANY_FILES = "too many open files; raise the limit with `ulimit -n 4096`"


class DuplicateKeyError(ValueError):
    """A JSON object has the same key twice; the message is the key."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that rejects duplicate keys: readers disagree about which of the two values counts.

    >>> json.loads('{"a": 1, "b": 2}', object_pairs_hook=unique_keys)
    {'a': 1, 'b': 2}
    """
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key)
            seen.add(key)
    return table


def open_regular(path: str | os.PathLike[str], *, remedy: str) -> int:
    """Opens a regular file for reading; never waits, as open() does for the other end of a named pipe.

    Args:
        path: Path of the file.
        remedy: What to do if it is not a regular file, such as "give a file of masks".

    Returns:
        The file descriptor.

    Raises:
        InputError: The file does not exist, is not a regular file or cannot be opened.

    Examples:
        >>> open_regular("/dev/zero", remedy="give a TOML file")
        Traceback (most recent call last):
        opdkernels.errors.InputError: /dev/zero is not a regular file; give a TOML file
    """
    shown = printable(os.fspath(path))
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise InputError(f"{shown} does not exist; {remedy}") from None
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ENXIO):  # a folder on Windows; a socket
            raise InputError(f"{shown} is not a regular file; {remedy}") from None
        raise InputError(f"{shown} cannot be opened: {reason_of(error)}") from None
    except ValueError:  # a NUL in the path
        raise InputError(f"{shown} cannot be the name of a file; {remedy}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{shown} is not a regular file; {remedy}")
    return descriptor


def read_file(path: str | os.PathLike[str], *, remedy: str, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Returns the content of a regular file.

    Args:
        path: Path of the file.
        remedy: What to do if it is missing, too large or no regular file.
        max_bytes: Largest size that is read.

    Raises:
        InputError: The file cannot be read, or is larger.
    """
    shown = printable(os.fspath(path))
    with os.fdopen(open_regular(path, remedy=remedy), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise InputError(f"{shown} has {size} bytes, more than the {max_bytes} allowed; {remedy}")
        try:
            return file.read(size)  # not more: a buffer of max_bytes would be allocated; what is appended later is left
        except OSError as error:
            raise InputError(f"{shown} cannot be read: {reason_of(error)}") from None


def reason_of(error: OSError) -> str:
    """Why a system call failed, and what to do about it."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TOO_MANY_FILES
    reason = error.strerror or str(error)
    remedy = {errno.EACCES: "; make it readable", errno.ENOENT: "; check the path, or download it"}
    return printable(reason) + remedy.get(error.errno or 0, "; check the disk, or copy or download it again")


def parse_json(content: bytes | str, shown: str, *, remedy: str, allow_duplicates: bool = False) -> Any:
    """Returns the value of JSON text, UTF-8 with or without a byte order mark.

    Args:
        content: The text.
        shown: What it is, for messages, such as the printable path.
        remedy: What to do if it is damaged.
        allow_duplicates: Takes the last value of a key that an object has twice, as most readers do.

    Raises:
        InputError: It is not JSON, is nested too deeply, or an object has a key twice.
    """
    kind = other_content(content[:512]) if isinstance(content, bytes) else None
    if kind is not None:
        raise InputError(f"{shown} is {kind}")
    try:
        value = json.loads(content, object_pairs_hook=None if allow_duplicates else unique_keys)
        if isinstance(content, bytes):
            may_have_surrogates = bool(re.search(rb"\\u[dD][89a-fA-F]", content))
        else:
            may_have_surrogates = bool(re.search(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]", content))
        if may_have_surrogates:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise InputError(f"{shown} has an unpaired surrogate, which is not Unicode text; {remedy}") from None
    except DuplicateKeyError as error:
        raise InputError(f"{shown}: key {printable(str(error)[:100])} appears twice; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown} is not JSON ({printable(str(error)[:200])}); {remedy}") from None


def other_content(first_bytes: bytes) -> str | None:
    """What a download left in place of a file, with the remedy; None if it may be the file.

    >>> other_content(b"version https://git-lfs.github.com/spec/v1\\noid sha256:00\\nsize 9\\n")
    'a Git LFS pointer and not the file itself; run `git lfs pull` in its folder, or download the file'
    """
    text = first_bytes.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"version https://git-lfs.github.com/"):
        return "a Git LFS pointer and not the file itself; run `git lfs pull` in its folder, or download the file"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return "an HTML or XML page, such as an error message of a server; download the file again"
    return None


def read_json(
    path: str | os.PathLike[str], *, remedy: str = "download it again", allow_duplicates: bool = False
) -> Any:
    """Returns the object in a JSON file, with `parse_json`. Raises InputError if the file holds anything else."""
    shown = printable(os.fspath(path))
    content = read_file(path, remedy=remedy)
    table = parse_json(content, shown, remedy=remedy, allow_duplicates=allow_duplicates)
    if not isinstance(table, dict):
        raise InputError(f"{shown} holds no JSON object; {remedy}")
    return table
