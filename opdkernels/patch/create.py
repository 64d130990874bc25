"""`patch create`: two checkpoints to one file, read once in the trained one's order, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opdkernels.checkpoint.base import MAX_HEADER_BYTES, MAX_TENSORS, TensorInfo
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.checkpoint.safetensors import stored_dtype
from opdkernels.checkpoint.sharded import ShardedCheckpoint
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
        before = stack.enter_context(contextlib.closing(open_checkpoint(source, io=io, any_tensors=True)))
        after = stack.enter_context(contextlib.closing(open_checkpoint(trained, io=io, any_tensors=True)))
        assert isinstance(before, ShardedCheckpoint)
        assert isinstance(after, ShardedCheckpoint)
        if not os.fspath(out):
            raise InputError("the patch has no name; give one to -o")
        temporary = stack.enter_context(output.new_file(Path(out), overwrite))
        workers = stack.enter_context(contextlib.closing(output.Workers()))
        work = Creation(before, after, workers, zstd, progress)
        with contextlib.closing(output.Writer(temporary, os.fspath(out), workers.depth)) as writer:
            work.write(writer)
        before.check()
        after.check()
    with contextlib.closing(Patch(out)) as patch:
        return summary(patch)


@dataclass
class Stored:
    """A planned tensor while it is stored: what its digests have seen, and the bytes of its entry."""

    plan: Planned
    before: TensorDigest
    after: TensorDigest
    changed: int = 0
    nbytes: int = 0

    @classmethod
    def empty(cls, one: Planned) -> Stored:
        return cls(one, TensorDigest(one.source or one.info), TensorDigest(one.info))

    def described(self, plan: Planned) -> Tensor:
        """What the manifest says of it, under the name of `plan`."""
        return tensor_of(plan, self.before.hexdigest(), self.after.hexdigest(), self.changed)


def tensor_of(plan: Planned, before: str, after: str, changed: int) -> Tensor:
    name, found = (None, None) if plan.source is None else (plan.source.name, before)
    return Tensor(source=name, source_digest=found, digest=after, data=plan.data, changed=changed)


class Creation:
    """A patch to be written: entries follow each other behind room for the header, which comes last."""

    def __init__(
        self,
        source: ShardedCheckpoint,
        trained: ShardedCheckpoint,
        workers: output.Workers,
        zstd: bool,
        progress: Progress | None,
    ) -> None:
        self.source, self.trained, self.workers, self.zstd = source, trained, workers, zstd
        self.progress = progress or (lambda done, total, name: None)
        self.plan = planned(source, trained)
        self.headers = headers_of(trained, [one.info for one in self.plan])
        self.beside, self.stored_beside = beside_of(source, trained, list(self.headers))
        self.reserved = self._reserve()

    def _reserve(self) -> int:
        """Bytes of a header whose numbers and digests are as long as they can get."""
        keys = {one.data: one.info for one in self.plan}
        entries = {
            key: entry(stored_dtype(info.dtype), list(info.shape), LARGEST, LARGEST)
            if key.startswith("whole:")
            else entry("U8", [LARGEST], LARGEST, LARGEST)
            for key, info in keys.items()
        }
        for key in (*(f"header:{name}" for name in self.headers), *(f"beside:{name}" for name in self.stored_beside)):
            entries[key] = entry("U8", [LARGEST], LARGEST, LARGEST)
        if len(entries) > MAX_TENSORS:
            raise InputError(
                f"a patch of {len(self.plan)} tensors would hold more than the limit of {MAX_TENSORS} entries; split the checkpoint"
            )
        blank = {one.info.name: tensor_of(one, NO_DIGEST, NO_DIGEST, LARGEST) for one in self.plan}
        size = len(patch_header(entries, self._manifest(blank)))
        if size > MAX_HEADER_BYTES:
            raise InputError(
                f"the header of the patch would take {size} bytes, more than the {MAX_HEADER_BYTES} that safetensors allows; split the checkpoint"
            )
        return size

    def _manifest(self, tensors: dict[str, Tensor]) -> Manifest:
        return Manifest(
            values="difference" if self.zstd else "new",
            source_digest=digest_all(source_digests(tensors.values())),
            digest=digest_all({name: tensor.digest for name, tensor in tensors.items()}),
            headers={name: digest_bytes(header) for name, header in self.headers.items()},
            beside=self.beside,
            tensors=tensors,
        )

    def write(self, writer: output.Writer) -> None:
        """Writes everything: segments as they come, the header when all is known."""
        small = {f"header:{name}": header for name, header in self.headers.items()}
        small |= {f"beside:{name}": content for name, content in self.stored_beside.items()}
        writer([bytes(self.reserved), *small.values()])
        kept: dict[str, Stored] = {}
        for plan in self.plan:
            kept.setdefault(plan.data, Stored.empty(plan))  # one storage under two names is stored once
        done, total = 0, sum(one.plan.info.nbytes * (2 if one.plan.source else 1) for one in kept.values())
        rooms = output.Ring(self.workers.depth, lambda width: Room.of(segments.size_of(width), width))
        jobs = (
            (one, start, stop, rooms.next(one.plan.info.item_bytes))
            for one in kept.values()
            for start, stop in segments.ranges(one.plan.info.items, one.plan.info.item_bytes)
        )
        for one, digests, changed, parts, nbytes in self.workers.ahead(
            self._segment, jobs, lambda job: job[2] - job[1] < output.SMALL
        ):
            one.before.add(digests[0])
            one.after.add(digests[1])
            one.changed += changed
            one.nbytes += sum(map(len, parts))
            writer(parts, small=nbytes < output.SMALL)
            done += nbytes
            self.progress(done, total, one.plan.info.name)
        tensors = {plan.info.name: kept[plan.data].described(plan) for plan in self.plan}
        writer.rewrite(patch_header(self._entries(small, kept), self._manifest(tensors), self.reserved))

    def _segment(
        self, job: tuple[Stored, int, int, Room]
    ) -> tuple[Stored, Sequence[torch.Tensor], int, list[memoryview], int]:
        """One segment: the tensor, the digests of both sides, how many changed, the bytes to write, and how many were read."""
        one, start, stop, room = job
        trained = self.trained.read_bits(one.plan.info.name, start, stop)
        if one.plan.source is None:
            # Copied: what was read may be a buffer that the next reading overwrites.
            kept = room.values[: stop - start].copy_(trained)
            digests = digest(kept)
            return one, (digests, digests), stop - start, [memoryview(kept.view(torch.uint8).numpy().data)], kept.nbytes
        source = self.source.read_bits(one.plan.source.name, start, stop)
        changes, both = gather(source, trained, difference=self.zstd, room=room)
        return one, both.unbind(), changes.changed, segments.encode(changes, self.zstd), source.nbytes + trained.nbytes

    def _entries(self, small: dict[str, bytes], kept: dict[str, Stored]) -> dict[str, dict[str, Any]]:
        """What the header says of what was written."""
        found, at = {}, 0
        for key, size in [
            *((key, len(content)) for key, content in small.items()),
            *((key, one.nbytes) for key, one in kept.items()),
        ]:
            whole = kept[key].plan.info if key in kept and kept[key].plan.source is None else None
            dtype, shape = (stored_dtype(whole.dtype), list(whole.shape)) if whole else ("U8", [size])
            found[key] = entry(dtype, shape, at, at + size)
            at += size
        return found


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def header_bytes(metadata: dict[str, str], entries: dict[str, dict[str, Any]], size: int = 0) -> bytes:
    """A safetensors header with its length in front, padded to `size` bytes, or so that what follows is aligned."""
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text = text.ljust(max(size - 8, (len(text) + 7) // 8 * 8))
    return len(text).to_bytes(8, "little") + text


def patch_header(entries: dict[str, dict[str, Any]], manifest: Manifest, size: int = 0) -> bytes:
    return header_bytes(metadata_of(manifest), entries, size)


def planned(source: ShardedCheckpoint, trained: ShardedCheckpoint) -> list[Planned]:
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


def in_order(trained: ShardedCheckpoint) -> list[TensorInfo]:
    infos = list(trained.tensors.values())
    if trained.kind != "torch":
        return infos
    order = {name: place for place, name in enumerate(trained.headers())}
    return sorted(infos, key=lambda info: (order[info.file], -info.item_bytes))  # aligned, as safetensors writes them


def headers_of(trained: ShardedCheckpoint, infos: list[TensorInfo]) -> dict[str, bytes]:
    """What begins each file that `apply` writes: as it is in the trained checkpoint, or made where that is no safetensors."""
    found: dict[str, bytes] = {}
    for name, header in trained.headers().items():
        target = name if header is not None else weights_name(name)
        if target in found:
            raise InputError(
                f"{printable(trained.path)}: two of its files would be written as {printable(target)}; rename one of them"
            )
        found[target] = (
            header if header is not None else made_header([info for info in infos if info.file == name], trained.path)
        )
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
            raise InputError(
                f"{printable(path)}: tensor {printable(info.name)} is complex128, which safetensors does not hold; convert it"
            )
        entries[info.name] = entry(stored_dtype(info.dtype), list(info.shape), at, at + info.nbytes)
        at += info.nbytes
    return header_bytes({"format": "pt"}, entries)


def beside_of(
    source: ShardedCheckpoint, trained: ShardedCheckpoint, files: list[str]
) -> tuple[dict[str, Beside], dict[str, bytes]]:
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


def beside_names(trained: ShardedCheckpoint) -> list[str]:
    """Configuration and tokenizer, and the index of these weights but of no others."""
    index = [trained.index] if trained.index is not None and trained.kind != "torch" else []
    if os.path.isfile(trained.path):  # a file was given, not its folder
        return index
    names = sorted(
        name for name in os.listdir(trained.folder) if name.endswith(BESIDE_SUFFIXES) and not name.startswith(".")
    )
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


def made_index(trained: ShardedCheckpoint) -> bytes:
    weights = {info.name: weights_name(info.file) for info in trained.tensors.values()}
    total = sum(info.nbytes for info in trained.tensors.values())
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weights}, indent=2) + "\n").encode()
