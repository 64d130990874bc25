"""`open_checkpoint`: finds which files of a folder are the checkpoint and in which format they are, and opens them."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterable

from opdkernels.checkpoint import formats, hub, unsupported
from opdkernels.checkpoint.base import Checkpoint, FileFormat, Shard
from opdkernels.checkpoint.io import CHECKPOINT_REMEDY, choose_io
from opdkernels.checkpoint.sharded import ShardedCheckpoint, open_sharded, read_index
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.untrusted import open_regular, other_content, read_json

MAX_LISTED = 1000  # folders that are searched for the message about a folder without model
NUMBERED_SHARD = re.compile(r".*-\d+-of-\d+\.[^.]+")


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    io: str = "auto",
    revision: str | None = None,
    allow_missing: bool = False,
    any_tensors: bool = False,
) -> Checkpoint:
    """Opens a checkpoint; reads headers only.

    Args:
        path: A folder, a checkpoint file, an index file, or a hub id such as "org/name@revision".
        io: "mmap", "read" (positioned reads), or "auto": mmap on local file systems if the compiled kernels,
            which guard mappings, are installed, else read.
        revision: Revision of a hub id.
        allow_missing: Lists the tensors of absent shards in `Checkpoint.missing` instead of raising.
        any_tensors: Also opens quantised and adapter tensors, for `read_bits`: their values mean nothing by themselves,
            their bits do.

    Returns:
        The open checkpoint; close it after use.

    Raises:
        InputError: The checkpoint cannot be read in full. Raised before any tensor is read.
        UsageError: An option does not apply.

    Examples:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> save_file({"w": torch.arange(4.0)}, path)
        >>> checkpoint = open_checkpoint(path)
        >>> checkpoint.tensors["w"].shape, checkpoint.read("w", 1, 3)
        ((4,), tensor([1., 2.]))
        >>> checkpoint.close()
    """
    if io not in ("auto", "mmap", "read"):
        raise UsageError(f"io is {printable(repr(io))}; give 'auto', 'mmap' or 'read'")
    given_path = os.fspath(path)
    if os.path.isdir(given_path):
        local_path = given_path
    elif os.path.exists(given_path):
        if not os.path.isfile(given_path):
            raise InputError(f"{printable(given_path)} is neither a file nor a folder; give the path of a checkpoint")
        local_path = given_path
    elif "://" in given_path:
        scheme = printable(given_path.split("://", 1)[0])
        raise InputError(
            f"{printable(given_path)}: {scheme}:// addresses are not read; download the checkpoint and give its folder"
        )
    elif hub.looks_like_id(given_path) and not os.path.isdir(given_path.split("/")[0]):
        local_path = hub.download(given_path, revision)
    else:
        raise InputError(
            f"{printable(given_path)} does not exist;"
            " give a folder, a checkpoint file or a hub id such as org/name@revision"
        )
    if revision is not None and local_path == given_path:
        raise UsageError(f"{printable(given_path)} is a local path and has no revision; leave --revision out")
    return _open_local(local_path, given_path, choose_io(io, local_path), allow_missing, any_tensors)


def repeated_path(paths: Iterable[str]) -> tuple[str, str] | None:
    """Returns the first two paths that lead to one file or folder, also by links; None if there are none.

    >>> repeated_path(["run/step_1", "run/step_2", "run/../run/step_1"])
    ('run/step_1', 'run/../run/step_1')
    """
    first: dict[str, str] = {}
    for path in paths:
        place = os.path.realpath(path)
        if place in first:
            return first[place], path
        first[place] = path
    return None


def checkpoint_bytes(path: str | os.PathLike[str]) -> int:
    """Returns the size of a checkpoint's files in bytes. Raises InputError as `open_checkpoint`."""
    checkpoint = open_checkpoint(path, io="read", any_tensors=True)
    checkpoint.close()
    return sum(file.bytes for file in checkpoint.files)


def _open_local(local_path: str, given_path: str, io: str, allow_missing: bool, any_tensors: bool) -> ShardedCheckpoint:
    """Opens the checkpoint in a folder or file; `given_path` is what the user wrote, for messages."""
    if os.path.isdir(local_path):
        names = _list_names(local_path)
        model = _find_model(local_path, names)
        unsupported.validate_folder(local_path, names, model)
        if model is None:
            raise InputError(_no_model_message(local_path, names))
        file = os.path.join(local_path, model)
    else:
        file = local_path
        unsupported.validate_file(file, os.path.basename(file))
    config_path = os.path.join(os.path.dirname(file), "config.json")
    # transformers takes the last value of a key that is there twice
    config = read_json(config_path, allow_duplicates=True) if os.path.lexists(config_path) else {}
    checkpoint = _open_files(file, given_path, io, allow_missing, config)
    try:
        if not any_tensors:
            unsupported.validate_tensors(checkpoint.tensors, given_path)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _open_files(file: str, given_path: str, io: str, allow_missing: bool, config: dict) -> ShardedCheckpoint:
    """Opens a single file, or the shards that an index file lists."""
    format = _detect_format(file)
    missing: dict[str, str] = {}
    if format is None:
        opened, missing = open_sharded(file, _main_file(file), lambda shard: _open_shard(shard, io), allow_missing)
        kind = opened[0][0].sharded_name
    else:
        opened = [(format, format.open(file, io))]
        kind = format.name
    shards = [shard for _, shard in opened]
    try:
        checkpoint = ShardedCheckpoint(given_path, kind, shards, config, missing)
        checkpoint.folder = os.path.dirname(file) or "."
        checkpoint.index = os.path.basename(file) if format is None else None
        if not checkpoint.tensors:
            raise InputError(f"{printable(file)} holds no tensors; give a model's checkpoint")
    except BaseException:
        for shard in shards:
            shard.close()
        raise
    return checkpoint


def _open_shard(path: str, io: str) -> tuple[FileFormat, Shard]:
    format = _detect_format(path)
    if format is None:
        raise InputError(f"{printable(path)} is an index and not a shard; correct the index that lists it")
    return format, format.open(path, io)


def _main_file(index: str) -> str:
    """The usual name of the file that holds all that an index lists."""
    matches = (format.main_file for format in formats.FORMATS if index.endswith(format.index_suffix))
    return next(matches, formats.FORMATS[-1].main_file)


def _detect_format(path: str) -> FileFormat | None:
    """Returns a file's format, None for an index. The content decides; the name only where the content is ambiguous."""
    try:
        with os.fdopen(open_regular(path, remedy=CHECKPOINT_REMEDY), "rb") as file:
            first_bytes = file.read(512)
    except OSError as error:
        raise InputError(
            f"{printable(path)} cannot be read: {printable(error.strerror or str(error))}; make it readable"
        ) from error
    if not first_bytes:
        raise InputError(f"{printable(path)} is empty; copy or download it again")
    content = other_content(first_bytes)
    if content is not None:
        raise InputError(f"{printable(path)} is {content}")
    format = formats.format_by_content(first_bytes[:16])
    if format is not None:
        return format
    for magic, name in unsupported.MAGIC.items():
        if first_bytes.startswith(magic):
            raise InputError(f"{printable(path)} is {name}, which is not read; convert it to safetensors")
    format = formats.format_by_name(path)
    if format is None and not path.endswith(".json"):
        supported = ", ".join(format.name for format in formats.FORMATS)
        raise InputError(
            f"{printable(path)} is not a checkpoint: it is no index and of no supported format ({supported});"
            " give a folder or file that is"
        )
    return format


def _list_names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(
            f"{printable(folder)} cannot be listed: {printable(error.strerror or str(error))}; make it readable"
        ) from error


def _find_model(folder: str, names: list[str]) -> str | None:
    """Returns the index or the single file of the checkpoint: formats in order, an index before a file.

    The usual single file is before an index that does not list it: transformers loads that file.
    """
    candidates = [name for name in names if not name.startswith(("adapter_model.", "."))]
    for format in formats.FORMATS:
        indexes = [name for name in candidates if name.endswith(format.index_suffix)]
        if indexes and format.main_file in candidates:
            index = next((name for name in indexes if _lists(os.path.join(folder, name), format.main_file)), None)
            if index is not None:
                _warn_of_other_formats(folder, candidates, index)
                return index
            warnings.warn(
                f"{folder} has {format.main_file} and shards of {indexes[0]}; {format.main_file} is read, as"
                f" transformers loads it. Give the path of {indexes[0]} to read the shards",
                stacklevel=5,
            )
            _warn_of_other_formats(folder, candidates, format.main_file)
            return format.main_file
        index = _choose(folder, indexes, format.main_index)
        if index is not None:
            _warn_of_other_formats(folder, candidates, index)
            return index
        files = [
            name
            for name in candidates
            if name.endswith(format.suffixes)
            and not unsupported.TRAINER_FILES.fullmatch(name)
            and not unsupported.FSDP_SHARD.fullmatch(name)
        ]
        shards = [name for name in files if NUMBERED_SHARD.fullmatch(name)]
        if shards and format.main_file not in files:
            raise InputError(
                f"{printable(os.path.join(folder, shards[0]))} is one shard of several but {format.main_index}, which"
                " lists them, is missing; download the index"
            )
        file = _choose(folder, files, format.main_file)
        if file is not None:
            _warn_of_other_formats(folder, candidates, file)
            return file
    return None


def _warn_of_other_formats(folder: str, names: list[str], chosen: str) -> None:
    """Warns if a folder has the model in a second format with a later time of modification: it may be the newer one."""
    for format in formats.FORMATS:
        for other in (format.main_file, format.main_index):
            if chosen.endswith((*format.suffixes, format.index_suffix)) or other not in names:
                continue
            with contextlib.suppress(OSError):
                if os.stat(os.path.join(folder, other)).st_mtime_ns > os.stat(os.path.join(folder, chosen)).st_mtime_ns:
                    warnings.warn(
                        f"{folder} has {chosen} and a later {other}; {chosen} is read, as transformers loads it. Give"
                        f" the path of {other} to read that",
                        stacklevel=6,
                    )
                    return


def _lists(index: str, file: str) -> bool:
    """Whether an index lists a file as a shard; False for an index that cannot be read."""
    try:
        return file in read_index(index)
    except InputError:
        return False


def _choose(folder: str, candidates: list[str], preferred: str) -> str | None:
    """Returns the preferred name, or the only candidate, or None. Raises InputError if the choice is ambiguous."""
    if preferred in candidates or not candidates:
        return preferred if candidates else None
    if len(candidates) > 1:
        listed = ", ".join(printable(name) for name in candidates[:4]) + (", ..." if len(candidates) > 4 else "")
        raise InputError(
            f"{printable(folder)} holds {len(candidates)} checkpoints ({listed}) and no {preferred};"
            " give the path of one of them"
        )
    return candidates[0]


def _folders_with_model(folder: str, names: list[str]) -> list[str]:
    """Folders in a folder that have a model under its usual name, such as a run's checkpoints, by their steps."""
    usual = [name for format in formats.FORMATS for name in (format.main_file, format.main_index)]
    paths = [os.path.join(folder, name) for name in names[:MAX_LISTED]]
    if "snapshots" in names:  # of the cache of huggingface_hub
        with contextlib.suppress(OSError):
            snapshots = os.path.join(folder, "snapshots")
            paths += [os.path.join(snapshots, name) for name in sorted(os.listdir(snapshots))[:MAX_LISTED]]
    folders = [path for path in paths if any(os.path.isfile(os.path.join(path, name)) for name in usual)]
    return sorted(folders, key=lambda path: [int(digits) for digits in re.findall(r"\d+", os.path.basename(path))])


def _no_model_message(folder: str, names: list[str]) -> str:
    shown = printable(folder)
    trainer_file = next((name for name in names if unsupported.TRAINER_FILES.fullmatch(name)), None)
    if trainer_file is not None:
        return (
            f"{shown} holds {printable(trainer_file)}, the state of a trainer or an optimizer, and no model;"
            " give the model's folder"
        )
    for name in names:
        if name.endswith((".gguf", ".h5", ".msgpack", ".npz", ".onnx")):
            return f"{shown} holds {printable(name)}, a format that is not read; convert it to safetensors"
    inside = _folders_with_model(folder, names)
    if inside:
        return f"{shown} holds no checkpoint itself; give a folder in it that does, such as {printable(inside[-1])}"
    suffixes = ", ".join(f"*{suffix}" for format in formats.FORMATS for suffix in format.suffixes)
    return f"{shown} holds no checkpoint: no {suffixes} or index; give a folder or file that is a checkpoint"
