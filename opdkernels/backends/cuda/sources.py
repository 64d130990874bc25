"""The sources of the CUDA C++ kernels, as one text per family. Needs only Python: setup.py loads it too."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2]
SOURCE_DIRS = (PACKAGE / "csrc", PACKAGE.parent / "csrc")  # of an install, of a checkout


def inline_includes(source: Path, seen: set[Path] | None = None) -> str:
    """A source with the project's own headers inlined, each once: NVRTC needs no files, and a cache key covers them."""
    seen = set() if seen is None else seen

    def header_text(match: re.Match) -> str:
        header = (source.parent / match[1]).resolve()
        if header in seen:
            return ""
        seen.add(header)
        return inline_includes(header, seen)

    text = source.read_text().replace("#pragma once\n", "")
    return re.sub(r'^#include "(.+)"$', header_text, text, flags=re.MULTILINE)


def source_dir() -> Path:
    """The directory with the sources."""
    return next((folder for folder in SOURCE_DIRS if folder.is_dir()), SOURCE_DIRS[-1])


@functools.cache
def family_source(family: str) -> str:
    """The CUDA source of a kernel family, as one text."""
    return inline_includes(source_dir() / family / "cuda.cu")


@functools.cache
def digest() -> str:
    """SHA-256 of everything that the library is built from."""
    compiled = [*sorted(source_dir().glob("*/cuda.cu")), source_dir() / "common" / "cuda" / "runtime.cpp"]
    text = "".join(f"{path.parent.name}/{path.name}{inline_includes(path)}" for path in compiled)
    return hashlib.sha256(text.encode()).hexdigest()


def is_built_from_sources(library: Path) -> bool:
    """Whether a library was built from these sources: it contains their digest (csrc/common/cuda/runtime.cpp)."""
    return library.is_file() and digest().encode() in library.read_bytes()
