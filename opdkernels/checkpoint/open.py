"""`open_checkpoint`: finds which files of a folder are the checkpoint and in which format they are, and opens them."""

from __future__ import annotations

import os
import re

from opdkernels.checkpoint import formats, hub
from opdkernels.checkpoint.base import MAX_HEADER_BYTES, Checkpoint
from opdkernels.checkpoint.io import choose_io
from opdkernels.checkpoint.safetensors import SafetensorsFile
from opdkernels.checkpoint.sharded import Shard, ShardedCheckpoint, open_sharded, read_json
from opdkernels.checkpoint.torch_pickle import TorchFile
from opdkernels.errors import InputError, UsageError, printable

PART_OF_MANY = re.compile(r".*-\d+-of-\d+\.(safetensors|bin|pt|pth)")


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    io: str = "auto",
    revision: str | None = None,
    allow_missing: bool = False,
    any_tensors: bool = False,
) -> Checkpoint:
    """Opens the checkpoint at a folder, a file, an index file or a hub id; reads headers only.

    `io` is "mmap", "read" or "auto": mapped on local file systems where a mapping can be guarded, else positioned reads.
    `allow_missing` turns an absent shard from an error into entries of `Checkpoint.missing`. `any_tensors` also opens what
    holds quantised or adapter tensors, for `read_bits`: their values mean nothing by themselves, their bits do.
    Raises InputError, before any tensor is read, for everything that cannot be read in full.
    """
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
    return open_local(where, given, choose_io(io, where), allow_missing, any_tensors)


def open_local(where: str, given: str, io: str, allow_missing: bool, any_tensors: bool = False) -> ShardedCheckpoint:
    """Opens the checkpoint in the folder or file `where`; `given` is what the user called it."""
    if os.path.isdir(where):
        names = _names(where)
        model = _find(where, names)
        formats.refuse_folder(where, names, model)
        if model is None:
            raise InputError(_nothing(where, names))
        file = os.path.join(where, model)
    else:
        file = where
        formats.refuse_file(file, os.path.basename(file))
    config_path = os.path.join(os.path.dirname(file), "config.json")
    config = read_json(config_path) if os.path.exists(config_path) else {}
    source = _open(file, given, io, allow_missing, config)
    try:
        if not any_tensors:
            formats.refuse_tensors(source.tensors, given)
    except BaseException:
        source.close()
        raise
    return source


def _open(file: str, given: str, io: str, allow_missing: bool, config: dict) -> ShardedCheckpoint:
    sharded = _format(file) == "index"
    missing: dict[str, str] = {}
    if sharded:
        shards, missing = open_sharded(file, lambda shard: _open_file(shard, io), allow_missing)
    else:
        shards = [_open_file(file, io)]
    kind = "torch" if isinstance(shards[0], TorchFile) else "safetensors sharded" if sharded else "safetensors"
    try:
        source = ShardedCheckpoint(given, kind, shards, config, missing)
        source.folder, source.index = os.path.dirname(file) or ".", os.path.basename(file) if sharded else None
        if not source.tensors:
            raise InputError(f"{printable(file)} holds no tensors; give a model's checkpoint")
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return source


def _open_file(path: str, io: str) -> Shard:
    kind = _format(path)
    if kind == "index":
        raise InputError(f"{printable(path)} is an index and not a shard; correct the index that lists it")
    return SafetensorsFile(path, io) if kind == "safetensors" else TorchFile(path, io)


def _format(path: str) -> str:
    """'safetensors', 'torch' or 'index', from the first bytes; the name decides only what they leave open."""
    try:
        if not os.path.isfile(path):
            raise InputError(f"{printable(path)} is not a regular file; give the path of a checkpoint file")
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        raise InputError(
            f"{printable(path)} cannot be read: {printable(error.strerror or str(error))}; make it readable"
        ) from error
    if not start:
        raise InputError(f"{printable(path)} is empty; copy or download it again")
    length = int.from_bytes(start[:8], "little")
    if len(start) > 8 and start[8:9] == b"{" and length <= MAX_HEADER_BYTES:
        return "safetensors"  # first: a header of 640 bytes begins as a pickle does
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return "torch"
    for magic, name in formats.MAGIC.items():
        if start.startswith(magic):
            raise InputError(f"{printable(path)} is {name}, which is not read; convert it to safetensors")
    if path.endswith(".safetensors"):
        return "safetensors"
    if path.endswith(".json"):
        return "index"
    if path.endswith((".bin", ".pt", ".pth")):
        return "torch"
    raise InputError(
        f"{printable(path)} is not a checkpoint: it is neither safetensors nor a PyTorch file nor an index;"
        " give a folder or file that is"
    )


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(
            f"{printable(folder)} cannot be listed: {printable(error.strerror or str(error))}; make it readable"
        ) from error


def _find(folder: str, names: list[str]) -> str | None:
    """The index or the one file that is the checkpoint, safetensors before torch, an index before a file."""
    rest = [name for name in names if not name.startswith(("adapter_model.", "."))]
    for suffix, preferred in ((".safetensors", "model.safetensors"), (".bin", "pytorch_model.bin")):
        index = _one(
            folder, [name for name in rest if name.endswith(suffix + ".index.json")], preferred + ".index.json"
        )
        if index is not None:
            return index
        suffixes = (suffix,) if suffix == ".safetensors" else (".bin", ".pt", ".pth")
        files = [
            name
            for name in rest
            if name.endswith(suffixes)
            and not formats.TRAINER_FILES.fullmatch(name)
            and not formats.FSDP_SHARD.fullmatch(name)
        ]
        parts = [name for name in files if PART_OF_MANY.fullmatch(name)]
        if parts and preferred not in files:
            raise InputError(
                f"{printable(os.path.join(folder, parts[0]))} is one shard of several but {preferred}.index.json, which"
                " lists them, is missing; download the index"
            )
        file = _one(folder, files, preferred)
        if file is not None:
            return file
    return None


def _one(folder: str, candidates: list[str], preferred: str) -> str | None:
    if preferred in candidates or not candidates:
        return preferred if candidates else None
    if len(candidates) > 1:
        listed = ", ".join(printable(name) for name in candidates[:4]) + (", ..." if len(candidates) > 4 else "")
        raise InputError(
            f"{printable(folder)} holds {len(candidates)} checkpoints ({listed}) and no {preferred};"
            " give the path of the one that is meant"
        )
    return candidates[0]


def _nothing(folder: str, names: list[str]) -> str:
    shown = printable(folder)
    trainer = next((name for name in names if formats.TRAINER_FILES.fullmatch(name)), None)
    if trainer is not None:
        return f"{shown} holds {printable(trainer)}, a trainer's or optimizer's state, and no model; give the model's folder"
    for name in names:
        if name.endswith((".gguf", ".h5", ".msgpack", ".npz", ".onnx")):
            return f"{shown} holds {printable(name)}, a format that is not read; convert it to safetensors"
    return f"{shown} holds no checkpoint: no *.safetensors, *.bin, *.pt or index; give a folder or file that is one"
