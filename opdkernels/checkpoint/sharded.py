"""A source of one or more files, and the index file that says which files count."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from opdkernels.checkpoint.base import MAX_HEADER_BYTES, MAX_TENSORS, FileFingerprint, TensorInfo
from opdkernels.checkpoint.io import Buffer
from opdkernels.checkpoint.safetensors import DuplicateKey, unique_keys
from opdkernels.errors import InputError, printable

if TYPE_CHECKING:
    import torch


class Shard(Protocol):
    """One open file, of either format."""

    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    fact: FileFingerprint

    def read(self, name: str, start: int, stop: int, buffer: Buffer) -> torch.Tensor: ...
    def read_bits(self, name: str, start: int, stop: int, buffer: Buffer) -> torch.Tensor: ...
    def header(self) -> bytes | None: ...
    def check(self) -> None: ...
    def close(self) -> None: ...


class ShardedCheckpoint:
    """A Checkpoint over open files. Raises InputError where two of them hold the same tensor."""

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
        self.files = [shard.fact for shard in shards]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Flat elements [start, stop) of a tensor, 1-D, in the stored dtype; valid until the next read."""
        numel = self.tensors[name].numel
        if not 0 <= start <= stop <= numel:
            raise ValueError(f"elements {start} to {stop} of {printable(name)}, which has {numel}")
        return self._shard_of[name].read(name, start, stop, self._buffer)

    def read_bits(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Items [start, stop) of a tensor of any dtype, 1-D, as integers of the same bits; valid until the next read."""
        items = self.tensors[name].items
        if not 0 <= start <= stop <= items:
            raise ValueError(f"items {start} to {stop} of {printable(name)}, which has {items}")
        return self._shard_of[name].read_bits(name, start, stop, self._buffer)

    def headers(self) -> dict[str, bytes | None]:
        """What stands before the tensors in each file, by name and in order; None where that is no safetensors header."""
        return {shard.fact.name: shard.header() for shard in self._shards}

    def check(self) -> None:
        """Raises InputError if a file was changed, replaced or cut off since it was opened."""
        for shard in self._shards:
            shard.check()

    def close(self) -> None:
        """Closes the files."""
        for shard in self._shards:
            shard.close()
        self._shards = []
        self._shard_of = {}
        self._buffer.clear()


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file that came with a checkpoint. Raises InputError where it is anything else."""
    shown = printable(path)
    try:
        size = os.stat(path).st_size
        if size > MAX_HEADER_BYTES:
            raise InputError(f"{shown} has {size} bytes, more than the {MAX_HEADER_BYTES} allowed; download it again")
        with open(path, "rb") as file:
            table = json.loads(file.read(MAX_HEADER_BYTES), object_pairs_hook=unique_keys)
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"{shown} cannot be read: {printable(error.strerror or str(error))}; make it readable, or download it again"
        ) from error
    except DuplicateKey as error:
        raise InputError(f"{shown}: key {printable(str(error))} stands twice; download it again") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown} is not JSON ({printable(str(error))}); download it again") from error
    if not isinstance(table, dict):
        raise InputError(f"{shown} holds no JSON object; download it again")
    return table


def read_index(path: str) -> dict[str, list[str]]:
    """The tensors that an index file lists, by shard, in the index's order. Names of shards are plain base names."""
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
    index: str, open_shard: Callable[[str], Shard], allow_missing: bool
) -> tuple[list[Shard], dict[str, str]]:
    """The shards that an index lists, open, and the tensors whose shard is absent (with `allow_missing` only)."""
    listed = read_index(index)
    folder = os.path.dirname(index)
    absent = [shard for shard in listed if not os.path.exists(os.path.join(folder, shard))]
    if absent and not (allow_missing and len(absent) < len(listed)):
        raise InputError(_absent(index, absent, len(listed), folder))
    shards: list[Shard] = []
    try:
        for shard, names in listed.items():
            if shard in absent:
                continue
            opened = open_shard(os.path.join(folder, shard))
            shards.append(opened)
            lost = next((name for name in names if name not in opened.tensors), None)
            if lost is not None:
                raise InputError(
                    f"{printable(os.path.join(folder, shard))} does not hold tensor {printable(lost)}, which the index"
                    f" {printable(os.path.basename(index))} says it does; download both from the same revision"
                )
    except BaseException:
        for opened in shards:
            opened.close()
        raise
    return shards, {name: shard for shard in absent for name in listed[shard]}


def _absent(index: str, absent: list[str], count: int, folder: str) -> str:
    one = printable(os.path.join(folder, absent[0]))
    more = f" (and {len(absent) - 1} more of {count})" if len(absent) > 1 else ""
    whole = "model.safetensors" if index.endswith(".safetensors.index.json") else "pytorch_model.bin"
    text = f"{one}{more} is listed in the index but missing; download it"
    if whole not in absent and os.path.isfile(os.path.join(folder, whole)):
        return f"{text}, or give the path of {whole} to read that file alone"
    return f"{text}, or pass --allow-missing" if len(absent) < count else f"{text}: no shard is there"
