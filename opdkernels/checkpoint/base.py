"""A checkpoint as named, typed ranges of bytes: the protocol that every format implements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

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
class FileFingerprint:
    """What tells one state of a file from another; `header_digest` is a blake2b-128 in hexadecimal.

    It covers the header of a safetensors file, and the first and last MiB of a torch file.
    """

    name: str
    bytes: int
    mtime_ns: int
    header_digest: str


class Checkpoint(Protocol):
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
    files: list[FileFingerprint]
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
