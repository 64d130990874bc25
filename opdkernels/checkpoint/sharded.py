"""A checkpoint of one or more files, and the index file that lists them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opdkernels.checkpoint.base import MAX_TENSORS, FileFormat, Shard, TensorInfo
from opdkernels.checkpoint.io import Buffer
from opdkernels.errors import InputError, printable
from opdkernels.untrusted import read_json

if TYPE_CHECKING:
    import torch


class ShardedCheckpoint:
    """A `Checkpoint` of open files.

    Args:
        path: Path or hub id as the user wrote it.
        kind: Format, for display.
        shards: The open files, in the order in which they are read.
        config: Content of config.json.
        missing: Tensors whose shard is absent, and the name of that shard.

    Raises:
        InputError: Two files hold the same tensor, or there are more than `MAX_TENSORS` tensors.
    """

    def __init__(
        self, path: str, kind: str, shards: list[Shard], config: dict[str, Any], missing: dict[str, str] | None = None
    ) -> None:
        self.path, self.kind, self.config = path, kind, config
        self.folder = "."
        self.index: str | None = None
        self.tensors: dict[str, TensorInfo] = {}
        self.aliases: dict[str, str] = {}
        self._shards = shards
        self._shard_of: dict[str, Shard] = {}
        self._buffer = Buffer()
        for shard in shards:
            for name, info in shard.tensors.items():
                if name in self.tensors:
                    raise InputError(
                        f"{printable(path)}: tensor {printable(name)} is in {printable(self.tensors[name].file)} and in"
                        f" {printable(info.file)}; both are listed in the index: download or save the checkpoint again"
                    )
                self.tensors[name] = info
                self._shard_of[name] = shard
            self.aliases.update(shard.aliases)
        if len(self.tensors) > MAX_TENSORS:
            raise InputError(
                f"{printable(path)} holds {len(self.tensors)} tensors, more than the limit of {MAX_TENSORS};"
                " it is not a checkpoint, or split it"
            )
        self.missing = {name: shard for name, shard in (missing or {}).items() if name not in self.tensors}
        self.files = [shard.fingerprint for shard in shards]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns flat elements [start, stop) of a tensor, 1-D, in the stored dtype; valid until the next read."""
        numel = self.tensors[name].numel
        if not 0 <= start <= stop <= numel:
            raise ValueError(f"elements {start} to {stop} of {printable(name)}, which has {numel}")
        return self._shard_of[name].read(name, start, stop, self._buffer)

    def read_bits(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns items [start, stop) of a tensor of any dtype, 1-D, as integers with the same bits.

        The result is valid until the next read of the same thread.
        """
        items = self.tensors[name].items
        if not 0 <= start <= stop <= items:
            raise ValueError(f"items {start} to {stop} of {printable(name)}, which has {items}")
        return self._shard_of[name].read_bits(name, start, stop, self._buffer)

    def headers(self) -> dict[str, bytes | None]:
        """Returns the bytes before the tensors of each file, by name and in order; None if not a safetensors header."""
        return {shard.fingerprint.name: shard.header() for shard in self._shards}

    def check(self) -> None:
        """Raises InputError if a file was changed, replaced or truncated since it was opened."""
        for shard in self._shards:
            shard.check()

    def close(self) -> None:
        """Closes the files."""
        for shard in self._shards:
            shard.close()
        self._shards = []
        self._shard_of = {}
        self._buffer.clear()


def read_index(path: str) -> dict[str, list[str]]:
    """Returns the tensors that an index file lists, by shard, in the index's order. Names of shards are base names."""
    shown = printable(path)
    weights = read_json(path).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise InputError(f"{shown} has no weight_map, so it lists no shard; download it again")
    if len(weights) > MAX_TENSORS:
        raise InputError(f"{shown} lists {len(weights)} tensors, more than the limit of {MAX_TENSORS}")
    shards: dict[str, list[str]] = {}
    for name, shard in weights.items():
        # Untrusted: joined to the folder unchecked, "../../x" or "/x" would leave it.
        if not isinstance(shard, str) or shard in ("", ".", "..") or any(c in "/\\\0" for c in shard):
            raise InputError(
                f"{shown}: tensor {printable(name)} is said to be in {printable(str(shard))}, which is not a plain file"
                " name inside the folder; correct the index or download it again"
            )
        shards.setdefault(shard, []).append(name)
    return shards


def open_sharded(
    index: str, main_file: str, open_shard: Callable[[str], tuple[FileFormat, Shard]], allow_missing: bool
) -> tuple[list[tuple[FileFormat, Shard]], dict[str, str]]:
    """Opens the shards that an index file lists.

    Args:
        index: Path of the index file.
        main_file: Usual name of a file that holds all tensors of the index, for the error message.
        open_shard: Opens the shard at a path.
        allow_missing: Whether some shards may be absent.

    Returns:
        The open shards with their formats, and the names of the tensors whose shard is absent, each with its shard.
    """
    listed = read_index(index)
    folder = os.path.dirname(index)
    absent = [shard for shard in listed if not os.path.exists(os.path.join(folder, shard))]
    if absent and not (allow_missing and len(absent) < len(listed)):
        raise InputError(_absent_message(absent, len(listed), folder, main_file))
    opened: list[tuple[FileFormat, Shard]] = []
    try:
        for name, tensors in listed.items():
            if name in absent:
                continue
            path = os.path.join(folder, name)
            format, shard = open_shard(path)
            opened.append((format, shard))
            lost = next((tensor for tensor in tensors if tensor not in shard.tensors), None)
            if lost is not None:
                raise InputError(
                    f"{printable(path)} does not hold tensor {printable(lost)}, contrary to the index"
                    f" {printable(os.path.basename(index))}; download both from the same revision"
                )
    except BaseException:
        for _, shard in opened:
            shard.close()
        raise
    return opened, {tensor: name for name in absent for tensor in listed[name]}


def _absent_message(absent: list[str], num_shards: int, folder: str, main_file: str) -> str:
    first = printable(os.path.join(folder, absent[0]))
    more = f" (and {len(absent) - 1} more of {num_shards})" if len(absent) > 1 else ""
    text = f"{first}{more} is listed in the index but missing; download it"
    if main_file not in absent and os.path.isfile(os.path.join(folder, main_file)):
        return f"{text}, or give the path of {main_file} to read that file alone"
    return f"{text}, or pass --allow-missing" if len(absent) < num_shards else f"{text}: no shard is there"
