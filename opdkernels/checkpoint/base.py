"""A checkpoint as named, typed ranges of bytes: the protocols that formats implement, and the types they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from opdkernels.checkpoint.io import Buffer

DTYPES = ("bf16", "fp16", "fp32", "fp64")
"""The dtypes that have a delta. Every other dtype has the name that safetensors gives it, in lower case."""

MAX_TENSORS = 200_000
MAX_DIMS = 64
"""The limit of NumPy. The product of 400,000 sizes would be a number of 3 MB."""
MAX_HEADER_BYTES = 100_000_000
"""The limit of safetensors; it applies to the pickles of torch files and to index files too."""


@dataclass(frozen=True)
class TensorInfo:
    """The header entry of one tensor.

    Attributes:
        name: Name in the checkpoint.
        dtype: Name of the dtype, see `DTYPES`.
        shape: Sizes of the dimensions.
        numel: Number of elements, an exact Python integer.
        file: Base name of the file that stores the tensor.
        nbytes: Number of stored bytes, an exact Python integer.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    numel: int
    file: str
    nbytes: int

    @property
    def item_bytes(self) -> int:
        """Bytes per item of `read_bits`.

        An item is one element; half an element where elements have 16 bytes; one byte where several elements share it.
        """
        size, rest = divmod(self.nbytes, self.numel or 1)
        return 1 if rest else {2: 2, 4: 4, 8: 8, 16: 8}.get(size, 1)

    @property
    def items(self) -> int:
        """Number of items of `read_bits`."""
        return self.nbytes // self.item_bytes


@dataclass(frozen=True)
class FileFingerprint:
    """Identifies one state of a file.

    Attributes:
        name: Base name.
        bytes: Size of the file.
        mtime_ns: Time of the last modification, in nanoseconds.
        ctime_ns: Time of the last change of content or status, in nanoseconds: no program can set it back.
        header_digest: blake2b-128, in hexadecimal, of the header of a safetensors file, or of the first and the last
            MiB of a torch file.
    """

    name: str
    bytes: int
    mtime_ns: int
    ctime_ns: int
    header_digest: str


class Checkpoint(Protocol):
    """An open checkpoint.

    Attributes:
        path: Path or hub id as the user wrote it.
        folder: Folder that contains the files.
        index: Base name of the index file, or None.
        kind: Format, for display.
        tensors: Tensors by name, in file order: reading them in this order is sequential.
        config: Content of config.json; empty if there is none.
        files: Fingerprints of the files.
        aliases: Tensors that share all their bytes with an earlier tensor, and the name of that tensor.
        missing: Tensors whose shard is absent, and the name of that shard.
    """

    path: str
    folder: str
    index: str | None
    kind: str
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    files: list[FileFingerprint]
    aliases: dict[str, str]
    missing: dict[str, str]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns flat elements [start, stop) of a tensor, 1-D, in the stored dtype.

        The result is valid until the next read of the same thread.
        """
        ...

    def read_bits(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns items [start, stop) of a tensor of any dtype, 1-D, as integers with the same bits.

        The result is valid until the next read of the same thread.
        """
        ...

    def check(self) -> None:
        """Raises InputError if a file was changed, replaced or truncated since it was opened."""
        ...

    def close(self) -> None:
        """Closes the files."""
        ...


class Shard(Protocol):
    """One open file of any format; `tensors` is in the order of the bytes."""

    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    fingerprint: FileFingerprint

    def read(self, name: str, start: int, stop: int, buffer: Buffer) -> torch.Tensor:
        """Returns flat elements [start, stop) of a tensor, 1-D: a view of a mapping, of `buffer`, or a new tensor."""
        ...

    def read_bits(self, name: str, start: int, stop: int, buffer: Buffer) -> torch.Tensor:
        """Returns items [start, stop) of a tensor of any dtype, 1-D, as integers with the same bits."""
        ...

    def header(self) -> bytes | None:
        """Returns the bytes before the tensors if they are a safetensors header, else None."""
        ...

    def check(self) -> None:
        """Raises InputError if the file was changed, replaced or truncated since it was opened."""
        ...

    def close(self) -> None:
        """Closes the file."""
        ...


@dataclass(frozen=True)
class FileFormat:
    """What `open_checkpoint` and the hub download need to know about a file format.

    Attributes:
        name: Value of `Checkpoint.kind` for a single file.
        sharded_name: Value of `Checkpoint.kind` for several files with an index.
        main_file: Usual name of the only file of a model; with ".index.json" appended, usual name of its index.
        suffixes: Suffixes of file names; shards have the first one.
        hub_patterns: Patterns of file names to download where a repository has no index, in the order of the attempts.
        recognizes: Whether the first 16 bytes of a file are those of this format.
        open: Opens the file at a path with an `io` mode ("mmap" or "read"). Raises InputError for an invalid file.
    """

    name: str
    sharded_name: str
    main_file: str
    suffixes: tuple[str, ...]
    hub_patterns: tuple[str, ...]
    recognizes: Callable[[bytes], bool]
    open: Callable[[str, str], Shard]

    @property
    def main_index(self) -> str:
        return self.main_file + ".index.json"

    @property
    def index_suffix(self) -> str:
        return self.suffixes[0] + ".index.json"
