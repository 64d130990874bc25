"""JSON of untrusted files: no key twice, no file above the size limit, every error an InputError."""

from __future__ import annotations

import json
import os
from typing import Any

from opdkernels.checkpoint.base import MAX_HEADER_BYTES
from opdkernels.errors import InputError, printable


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


def read_json(path: str) -> dict[str, Any]:
    """Returns the object in a JSON file of a checkpoint. Raises InputError if the file holds anything else."""
    shown = printable(path)
    try:
        size = os.stat(path).st_size
        if size > MAX_HEADER_BYTES:
            raise InputError(f"{shown} has {size} bytes, more than the {MAX_HEADER_BYTES} allowed; download it again")
        with open(path, "rb") as file:
            table = json.loads(file.read(MAX_HEADER_BYTES), object_pairs_hook=unique_keys)
    except OSError as error:
        raise InputError(
            f"{shown} cannot be read: {printable(error.strerror or str(error))}; make it readable, or download it again"
        ) from error
    except DuplicateKeyError as error:
        raise InputError(f"{shown}: key {printable(str(error))} appears twice; download it again") from error
    except InputError:  # a ValueError too
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown} is not JSON ({printable(str(error))}); download it again") from error
    if not isinstance(table, dict):
        raise InputError(f"{shown} holds no JSON object; download it again")
    return table
