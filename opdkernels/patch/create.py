"""`patch create`: two checkpoints to one file, read once in the trained one's order, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdkernels.checkpoint.safetensors import stored_dtype
from opdkernels.checkpoint.sharded import FileSource
from opdkernels.checkpoint.source import MAX_HEADER_BYTES, MAX_TENSORS, TensorInfo, open_source
from opdkernels.errors import InputError, printable
from opdkernels.ops.patch import Room, digest, gather
from opdkernels.patch import output, segments
from opdkernels.patch.manifest import (
    BESIDE_BYTES,
    BESIDE_SUFFIXES,
    Beside,
    Manifest,
    Patch,
    Tensor,
    TensorDigest,
    digest_all,
    digest_bytes,
    metadata_of,
    source_digests,
    summary,
)
from opdkernels.progress import Progress

NO_DIGEST = "0" * 32
LARGEST = 10**17  # longer in decimals than any size or offset


@dataclass(frozen=True)
class Planned:
    """A trained tensor, the source's that it is stored against (none: whole), and the entry that holds its data."""

    info: TensorInfo
    source: TensorInfo | None
    data: str


def create(
    source: str | os.PathLike[str],
    trained: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    zstd: bool = False,
    io: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write what changed from source to trained to the file `out`; `apply` makes trained from source and it, bit for bit.

    source, trained: folders, files or hub ids, of any dtypes; tensors are matched by name, and those with another shape or
    dtype, or without a match, are stored whole. zstd: store differences, compressed: less than half the size, at the speed of
    zstd. overwrite: replace an existing file. progress: called with bytes done, bytes in all and the tensor at hand.
    Returns what `info` does. `out` is there whole or not at all.

    Raises InputError for input that cannot be read, OSError for an output that cannot be written.
    """
    with contextlib.ExitStack() as stack:
        before = stack.enter_context(contextlib.closing(open_source(source, io=io, any_tensors=True)))
        after = stack.enter_context(contextlib.closing(open_source(trained, io=io, any_tensors=True)))
        assert isinstance(before, FileSource)
        assert isinstance(after, FileSource)
        if not os.fspath(out):
            raise InputError("the patch has no name; give one to -o")
        temporary = stack.enter_context(output.new_file(Path(out), overwrite))
        work = stack.enter_context(contextlib.closing(Creation(before, after, temporary, os.fspath(out), zstd, progress)))
        with output.coders() as submit:
            work.run(submit)
        before.check()
        after.check()
    with contextlib.closing(Patch(out)) as patch:
        return summary(patch)


class Creation:
    """A patch while it is written: entries follow each other behind room for the header, which comes last."""

    def __init__(
        self, source: FileSource, trained: FileSource, path: Path, shown: str, zstd: bool, progress: Progress | None
    ) -> None:
        self.source, self.trained, self.zstd = source, trained, zstd
        self.progress = progress or (lambda done, total, name: None)
        self.plan = planned(source, trained)
        self.headers = headers_of(trained, [one.info for one in self.plan])
        self.beside, self.stored_beside = beside_of(source, trained, list(self.headers))
        self.tensors: dict[str, Tensor] = {}
        self.sizes: dict[str, int] = {}
        self.rooms: dict[int, list[Room]] = {}
        self.done, self.total = 0, sum(one.info.nbytes * (2 if one.source else 1) for one in self.plan)
        self.reserved = self._reserve()
        self.writer = output.Writer(path, shown)
        self.turn = 0

    def close(self) -> None:
        self.writer.close()

    def _reserve(self) -> int:
        """Bytes of a header whose numbers and digests are as long as they can get."""
        keys = {one.data: one.info for one in self.plan}
        entries = {
            key: entry(stored_dtype(info.dtype), list(info.shape), LARGEST, LARGEST) if key.startswith("whole:") else entry("U8", [LARGEST], LARGEST, LARGEST)
            for key, info in keys.items()
        }
        for key in (*(f"header:{name}" for name in self.headers), *(f"beside:{name}" for name in self.stored_beside)):
            entries[key] = entry("U8", [LARGEST], LARGEST, LARGEST)
        if len(entries) > MAX_TENSORS:
            raise InputError(f"a patch of {len(self.plan)} tensors would hold more than the limit of {MAX_TENSORS} entries; split the checkpoint")
        blank = {one.info.name: self._tensor(one, NO_DIGEST, NO_DIGEST, LARGEST) for one in self.plan}
        size = len(patch_header(entries, self._manifest(blank)))
        if size > MAX_HEADER_BYTES:
            raise InputError(f"the header of the patch would take {size} bytes, more than the {MAX_HEADER_BYTES} that safetensors allows; split the checkpoint")
        return size

    def _tensor(self, one: Planned, before: str, after: str, changed: int) -> Tensor:
        name, found = (None, None) if one.source is None else (one.source.name, before)
        return Tensor(source=name, source_digest=found, digest=after, data=one.data, changed=changed)

    def _manifest(self, tensors: dict[str, Tensor]) -> Manifest:
        return Manifest(
            values="difference" if self.zstd else "new",
            source_digest=digest_all(source_digests(tensors.values())),
            digest=digest_all({name: tensor.digest for name, tensor in tensors.items()}),
            headers={name: digest_bytes(header) for name, header in self.headers.items()},
            beside=self.beside,
            tensors=tensors,
        )

    def run(self, submit: Callable[..., Future[Any]]) -> None:
        """Writes everything; `submit` runs the coding of segments beside the reading."""
        self.writer(lambda: [bytes(self.reserved)])
        for name, header in self.headers.items():
            self._append(f"header:{name}", header)
        for name, content in self.stored_beside.items():
            self._append(f"beside:{name}", content)
        first: dict[str, Tensor] = {}
        for one in self.plan:
            if one.data in first:  # one storage under two names
                self.tensors[one.info.name] = first[one.data]
                continue
            tensor = self._whole(one) if one.source is None else self._changes(one, one.source, submit)
            self.tensors[one.info.name] = first[one.data] = tensor
        self.writer.finish()
        self.writer.rewrite(patch_header(self._entries(), self._manifest(self.tensors), self.reserved))

    def _entries(self) -> dict[str, dict[str, Any]]:
        """What the header says of what was written."""
        whole = {one.data: one.info for one in self.plan if one.source is None}
        found, at = {}, 0
        for key, size in self.sizes.items():
            dtype, shape = (stored_dtype(whole[key].dtype), list(whole[key].shape)) if key in whole else ("U8", [size])
            found[key] = entry(dtype, shape, at, at + size)
            at += size
        return found

    def _append(self, key: str, content: bytes) -> None:
        self.sizes[key] = len(content)
        self.writer(lambda: [content])

    def _whole(self, one: Planned) -> Tensor:
        hashed = TensorDigest(one.info)
        for start, stop in segments.ranges(one.info.items):
            part = self.trained.read_bits(one.info.name, start, stop)
            hashed.add(digest(part))
            self.writer(lambda part=part: [part.numpy().data])  # type: ignore[misc]
            self.writer.finish()  # what was read may be a buffer that the next reading overwrites
            self._show(part.nbytes, one)
        self.sizes[one.data] = one.info.nbytes
        return self._tensor(one, NO_DIGEST, hashed.hexdigest(), one.info.items)

    def _changes(self, one: Planned, source: TensorInfo, submit: Callable[..., Future[Any]]) -> Tensor:
        before, after, changed = TensorDigest(source), TensorDigest(one.info), 0
        self.sizes[one.data] = 0
        for start, stop in segments.ranges(one.info.items):
            w = self.source.read_bits(source.name, start, stop)
            v = self.trained.read_bits(one.info.name, start, stop)
            changes, digests = gather(w, v, difference=self.zstd, room=self._room(one.info.item_bytes))
            before.add(digests[0])
            after.add(digests[1])
            changed += changes.changed
            coded = submit(segments.encode, changes, self.zstd)
            self.writer(lambda coded=coded: self._sized(one.data, coded.result()))  # type: ignore[misc]
            self._show(w.nbytes + v.nbytes, one)
        return self._tensor(one, before.hexdigest(), after.hexdigest(), changed)

    def _sized(self, key: str, parts: list[memoryview]) -> list[memoryview]:
        """The parts, their length added to the entry's: known only once they are coded."""
        self.sizes[key] += sum(map(len, parts))
        return parts

    def _room(self, width: int) -> Room:
        """Memory that no segment in flight uses."""
        rooms = self.rooms.setdefault(width, [segments.room(width) for _ in range(output.DEPTH)])
        self.turn += 1
        return rooms[self.turn % output.DEPTH]

    def _show(self, nbytes: int, one: Planned) -> None:
        self.done += nbytes
        self.progress(self.done, self.total, one.info.name)


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def header_bytes(metadata: dict[str, str], entries: dict[str, dict[str, Any]], size: int = 0) -> bytes:
    """A safetensors header with its length in front, padded to `size` bytes, or so that what follows is aligned."""
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text = text.ljust(max(size - 8, (len(text) + 7) // 8 * 8))
    return len(text).to_bytes(8, "little") + text


def patch_header(entries: dict[str, dict[str, Any]], manifest: Manifest, size: int = 0) -> bytes:
    return header_bytes(metadata_of(manifest), entries, size)


def planned(source: FileSource, trained: FileSource) -> list[Planned]:
    """What is stored of each trained tensor, in the order of the bytes of the files that `apply` will write."""
    found = []
    for info in in_order(trained):
        holder = trained.aliases.get(info.name, info.name)
        twin = source.tensors.get(info.name) or source.tensors.get(holder)
        if twin is not None and (twin.dtype, twin.shape) == (info.dtype, info.shape):
            found.append(Planned(info, twin, f"changes:{twin.name}"))
        else:
            found.append(Planned(info, None, f"whole:{holder}"))
    return found


def in_order(trained: FileSource) -> list[TensorInfo]:
    infos = list(trained.tensors.values())
    if trained.kind != "torch":
        return infos
    order = {name: place for place, name in enumerate(trained.headers())}
    return sorted(infos, key=lambda info: (order[info.file], -info.item_bytes))  # aligned, as safetensors writes them


def headers_of(trained: FileSource, infos: list[TensorInfo]) -> dict[str, bytes]:
    """What begins each file that `apply` writes: as it is in the trained checkpoint, or made where that is no safetensors."""
    found: dict[str, bytes] = {}
    for name, header in trained.headers().items():
        target = name if header is not None else weights_name(name)
        if target in found:
            raise InputError(f"{printable(trained.path)}: two of its files would be written as {printable(target)}; rename one of them")
        found[target] = header if header is not None else made_header([info for info in infos if info.file == name], trained.path)
    return found


def weights_name(name: str) -> str:
    """The name under which a PyTorch file's tensors are written.

    >>> weights_name("pytorch_model-00001-of-00002.bin")
    'model-00001-of-00002.safetensors'
    """
    return os.path.splitext(name)[0].replace("pytorch_model", "model", 1) + ".safetensors"


def made_header(infos: list[TensorInfo], path: str) -> bytes:
    entries, at = {}, 0
    for info in infos:
        if info.dtype == "c128":
            raise InputError(f"{printable(path)}: tensor {printable(info.name)} is complex128, which safetensors does not hold; convert it")
        entries[info.name] = entry(stored_dtype(info.dtype), list(info.shape), at, at + info.nbytes)
        at += info.nbytes
    return header_bytes({"format": "pt"}, entries)


def beside_of(source: FileSource, trained: FileSource, files: list[str]) -> tuple[dict[str, Beside], dict[str, bytes]]:
    """The files that go with the weights, and the content of those that the source's folder does not have alike."""
    names = beside_names(trained)
    content = {name: small_file(trained.folder, name) for name in names}
    if trained.kind == "torch" and trained.index is not None:
        content["model.safetensors.index.json"] = made_index(trained)
    found, stored = {}, {}
    for name, text in content.items():
        if text is None or name in files:
            continue
        alike = small_file(source.folder, name) == text and not os.path.isfile(source.path)
        found[name] = Beside(stored=not alike, digest=digest_bytes(text))
        if not alike:
            stored[name] = text
    return found, stored


def beside_names(trained: FileSource) -> list[str]:
    """Configuration and tokenizer, and the index of these weights but of no others."""
    index = [trained.index] if trained.index is not None and trained.kind != "torch" else []
    if os.path.isfile(trained.path):  # a file was given, not its folder
        return index
    names = sorted(name for name in os.listdir(trained.folder) if name.endswith(BESIDE_SUFFIXES) and not name.startswith("."))
    return [*index, *(name for name in names if not name.endswith(".index.json"))]


def small_file(folder: str, name: str) -> bytes | None:
    """The content of a regular file of not more than 64 MiB; None for anything else."""
    try:
        status = os.stat(os.path.join(folder, name))
        if not stat.S_ISREG(status.st_mode) or status.st_size > BESIDE_BYTES:
            return None
        with open(os.path.join(folder, name), "rb") as file:
            return file.read(BESIDE_BYTES)
    except OSError:
        return None


def made_index(trained: FileSource) -> bytes:
    weights = {info.name: weights_name(info.file) for info in trained.tensors.values()}
    total = sum(info.nbytes for info in trained.tensors.values())
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weights}, indent=2) + "\n").encode()
