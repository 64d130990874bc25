"""The sources of CUDA C++ kernels, as one text a family. Needs nothing but Python: the build reads it too."""

from __future__ import annotations

import functools
import hashlib
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


def folder() -> Path:
    return next((one for one in FOLDERS if one.is_dir()), FOLDERS[-1])


@functools.cache
def source_of(family: str) -> str:
    return flattened(folder() / family / "cuda.cu")


@functools.cache
def digest() -> str:
    """SHA-256 of all that a library is built from."""
    compiled = [*sorted(folder().glob("*/cuda.cu")), folder() / "common" / "cuda" / "runtime.cpp"]
    text = "".join(f"{path.parent.name}/{path.name}{flattened(path)}" for path in compiled)
    return hashlib.sha256(text.encode()).hexdigest()


def made(library: Path) -> bool:
    """Whether a library was built from these sources: it holds their digest (csrc/common/cuda/runtime.cpp)."""
    return library.is_file() and digest().encode() in library.read_bytes()
