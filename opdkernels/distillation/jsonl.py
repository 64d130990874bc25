"""Files of JSON lines, one row per step, snapshot or evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdkernels.errors import InputError, printable
from opdkernels.files import write_atomically
from opdkernels.untrusted import read_file

MAX_LOG_BYTES = 2**30


def finite(value: Any) -> Any:
    """A row that JSON can hold: NaN and infinities become None."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without a truncated end; none if there is no file.

    Raises InputError if the file cannot be read, a row is not an object with a step, or a damaged row has others after
    it, which a run that resumes would delete.
    """
    if not path.exists():
        return []
    rows = []
    shown, remedy = printable(str(path)), "restore it from a copy, or start again with --overwrite"
    lines = read_file(path, max_bytes=MAX_LOG_BYTES, remedy=remedy).decode(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if any(is_row(other) for other in lines[number:]):
                raise InputError(f"{shown} line {number} is not JSON; {remedy}") from None
            break
        step = row.get("step") if isinstance(row, dict) else None
        if type(step) is not int or step < 0:
            raise InputError(f"{shown} has a row without a step; {remedy}")
        rows.append(row)
    return rows


def is_row(line: str) -> bool:
    """Whether a line is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replaces a file atomically."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def append_row(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
