"""The sources of CUDA C++ kernels, as one text a family. Needs nothing but Python: the build reads it too."""

from __future__ import annotations

import functools
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
FOLDERS = (PACKAGE / "csrc", PACKAGE.parent / "csrc")  # installed, in a checkout


def flattened(source: Path, seen: set[Path] | None = None) -> str:
    """A source with its own headers in place, each once: a compiler without files, and a cache that sees every change."""
    seen = set() if seen is None else seen

    def included(match: re.Match) -> str:
        header = (source.parent / match[1]).resolve()
        if header in seen:
            return ""
        seen.add(header)
        return flattened(header, seen)

    return re.sub(r'^#include "(.+)"$', included, source.read_text().replace("#pragma once\n", ""), flags=re.MULTILINE)


@functools.cache
def source_of(family: str) -> str:
    folder = next(folder for folder in FOLDERS if (folder / "cuda" / f"{family}.cu").is_file())
    return flattened(folder / "cuda" / f"{family}.cu")
