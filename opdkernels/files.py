"""Files that are there whole or not at all, even after a power cut."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """The file is there whole or not at all, even after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """JSON that is written atomically; NaN and Inf raise ValueError."""
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def sync(path: Path) -> None:
    """Waits until the disk holds a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
