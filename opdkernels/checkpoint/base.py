"""A checkpoint as named, typed ranges of bytes: the protocol, and `open_source`, which finds out what a path holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from opdkernels.errors import InputError, UsageError, printable

if TYPE_CHECKING:
    import torch

DTYPES = ("bf16", "fp16", "fp32", "fp64")
"""The dtypes that have a delta. Every other dtype goes by safetensors' own name in lower case."""

MAX_TENSORS = 200_000
MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit; torch's pickles and index files are held to it too."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; `numel` and `nbytes` are exact Python integers, `file` is a base name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    numel: int
    file: str
    nbytes: int

    @property
    def item_bytes(self) -> int:
        """Bytes of what `read_bits` takes for one item: an element; half of one of 16 bytes; a byte, where several share one."""
        size, rest = divmod(self.nbytes, self.numel or 1)
        return 1 if rest else {2: 2, 4: 4, 8: 8, 16: 8}.get(size, 1)

    @property
    def items(self) -> int:
        return self.nbytes // self.item_bytes


@dataclass(frozen=True)
class FileFact:
    """What tells one state of a file from another; `header_digest` is a blake2b-128 in hexadecimal.

    It covers the header of a safetensors file, and the first and last MiB of a torch file.
    """

    name: str
    bytes: int
    mtime_ns: int
    header_digest: str


class Source(Protocol):
    """An open checkpoint. `tensors` is in file order, so that reading it in that order is sequential.

    `aliases` names the tensors that share all their bytes with an earlier one, `missing` those whose shard is absent.
    `folder` is where the files lie, `index` the name of the one that lists them, if one does.
    """

    path: str
    folder: str
    index: str | None
    kind: str
    tensors: dict[str, TensorInfo]
    config: dict
    files: list[FileFact]
    aliases: dict[str, str]
    missing: dict[str, str]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Flat elements [start, stop) of a tensor, 1-D, in the stored dtype; valid until the next read of this thread."""
        ...

    def read_bits(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Items [start, stop) of a tensor of any dtype, 1-D, as integers of the same bits; valid as those of `read`."""
        ...

    def check(self) -> None:
        """Raises InputError if a file was changed, replaced or cut off since it was opened."""
        ...

    def close(self) -> None:
        """Lets go of the files."""
        ...


def open_source(
    path: str | os.PathLike[str],
    *,
    io: str = "auto",
    revision: str | None = None,
    allow_missing: bool = False,
    any_tensors: bool = False,
) -> Source:
    """Opens the checkpoint at a folder, a file, an index file or a hub id; reads headers only.

    `io` is "mmap", "read" or "auto": mapped on local file systems where a mapping can be guarded, else positioned reads.
    `allow_missing` turns an absent shard from an error into entries of `Source.missing`. `any_tensors` also opens what
    holds quantised or adapter tensors, for `read_bits`: their values mean nothing by themselves, their bits do.
    Raises InputError, before any tensor is read, for everything that cannot be read in full.
    """
    from opdkernels.checkpoint import folder, hub
    from opdkernels.checkpoint.openfile import choose_io

    if io not in ("auto", "mmap", "read"):
        raise UsageError(f"io is {printable(repr(io))}; give 'auto', 'mmap' or 'read'")
    given = os.fspath(path)
    if os.path.isdir(given):
        where = given
    elif os.path.exists(given):
        if not os.path.isfile(given):
            raise InputError(f"{printable(given)} is neither a file nor a folder; give the path of a checkpoint")
        where = given
    elif "://" in given:
        scheme = printable(given.split("://", 1)[0])
        raise InputError(
            f"{printable(given)}: {scheme}:// addresses are not read; download the checkpoint and give its folder"
        )
    elif hub.looks_like_id(given) and not os.path.isdir(given.split("/")[0]):
        where = hub.download(given, revision)
    else:
        raise InputError(
            f"{printable(given)} does not exist; give a folder, a checkpoint file or a hub id such as org/name@revision"
        )
    if revision is not None and where == given:
        raise UsageError(f"{printable(given)} is a local path and has no revision; leave --revision out")
    return folder.open_local(where, given, choose_io(io, where), allow_missing, any_tensors)
