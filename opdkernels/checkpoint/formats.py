"""The file formats that are read. CONTRIBUTING.md, "Add a checkpoint format", describes how to add one."""

from __future__ import annotations

from opdkernels.checkpoint import safetensors, torch_pickle
from opdkernels.checkpoint.base import FileFormat

# A safetensors header of 640 bytes begins with the bytes of a pickle: safetensors must be the first.
FORMATS: tuple[FileFormat, ...] = (safetensors.FORMAT, torch_pickle.FORMAT)
"""In order of preference, where a folder or a repository holds several formats."""


def format_by_content(first_bytes: bytes) -> FileFormat | None:
    """Returns the format whose signature the first 16 bytes of a file have, or None."""
    return next((format for format in FORMATS if format.recognizes(first_bytes)), None)


def format_by_name(name: str) -> FileFormat | None:
    """Returns the format that a file name's suffix belongs to, or None.

    >>> format_by_name("pytorch_model.bin").name
    'torch'
    """
    return next((format for format in FORMATS if name.endswith(format.suffixes)), None)
