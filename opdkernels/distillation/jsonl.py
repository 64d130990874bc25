"""Files of JSON lines, one row per step, snapshot or evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdkernels.files import write_atomically


def finite(value: Any) -> Any:
    """A row that JSON can hold: NaN and infinities become None."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without a truncated last line; none if there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replaces a file atomically."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def append_row(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
