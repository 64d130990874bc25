"""`patch create`: writes the changes between two checkpoints to one file; reads both once, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opdkernels.checkpoint.base import DTYPES, MAX_HEADER_BYTES, MAX_TENSORS, TensorInfo
from opdkernels.checkpoint.buffers import is_buffer
from opdkernels.checkpoint.match import Match, Pair
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.checkpoint.safetensors import stored_dtype
from opdkernels.checkpoint.sharded import ShardedCheckpoint
from opdkernels.errors import InputError, printable
from opdkernels.files import UNPAIRED_SURROGATE
from opdkernels.metrics.distance import warn_if_unrelated
from opdkernels.ops.patch import GatherBuffers, digest, gather
from opdkernels.outputs import PATCH, new_file
from opdkernels.patch import output, segments
from opdkernels.patch.manifest import (
    EXTRA_FILE_SUFFIXES,
    MAX_EXTRA_FILE_BYTES,
    ExtraFile,
    Manifest,
    Patch,
    Tensor,
    TensorDigest,
    base_digests,
    digest_all,
    digest_bytes,
    metadata_of,
    summary,
)
from opdkernels.progress import Progress

NO_DIGEST = "0" * 32
LARGEST = 10**17  # has more digits than any size or offset


@dataclass(frozen=True)
class Planned:
    """A trained tensor, the base tensor that it is stored against (None: stored in full), and the entry of its data."""

    info: TensorInfo
    base: TensorInfo | None
    data: str


def create(
    base: str | os.PathLike[str],
    trained: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    zstd: bool = False,
    io: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the changes from base to trained to a file, from which `apply` restores trained bit for bit.

    Tensors of any dtype are matched by name; those with another shape or dtype, or without a match, are stored in full.

    Args:
        base: The checkpoint before training: folder, file or hub id.
        trained: The checkpoint after training.
        out: File to write, atomically.
        zstd: Stores differences, compressed: less than half the size, at the speed of zstd.
        io: How checkpoints are read: "auto", "mmap" or "read".
        overwrite: Replaces an existing patch.
        progress: Called with bytes done, bytes in total and the name of the current tensor.

    Returns:
        What `info` returns.

    Warns:
        UserWarning: The checkpoints do not look like the start and the end of one run.

    Raises:
        InputError: An input cannot be read, or `out` is an input or a file that may not be replaced.
        UsageError: `out` is empty.
        OSError: The output cannot be written.
    """
    with contextlib.ExitStack() as stack:
        base_checkpoint = stack.enter_context(contextlib.closing(open_checkpoint(base, io=io, any_tensors=True)))
        trained_checkpoint = stack.enter_context(contextlib.closing(open_checkpoint(trained, io=io, any_tensors=True)))
        assert isinstance(base_checkpoint, ShardedCheckpoint)
        assert isinstance(trained_checkpoint, ShardedCheckpoint)
        inputs = {"BASE": base, "TRAINED": trained}
        temporary = stack.enter_context(new_file(out, PATCH, inputs=inputs, overwrite=overwrite))
        workers = stack.enter_context(contextlib.closing(output.Workers()))
        work = Creation(base_checkpoint, trained_checkpoint, workers, zstd, progress)
        base_names = {plan.info.name: plan.base.name for plan in work.plan if plan.base is not None}
        warn_if_unrelated(pair_of(base_checkpoint, trained_checkpoint, base_names))
        with contextlib.closing(output.Writer(temporary, os.fspath(out), workers.depth)) as writer:
            work.write(writer)
        base_checkpoint.check()
        trained_checkpoint.check()
    with contextlib.closing(Patch(out)) as patch:
        return summary(patch)


@dataclass
class Stored:
    """A planned tensor while it is written: running digests of both sides, changed items, and bytes of its entry."""

    plan: Planned
    base_digest: TensorDigest
    trained_digest: TensorDigest
    changed: int = 0
    nbytes: int = 0

    @classmethod
    def empty(cls, plan: Planned) -> Stored:
        return cls(plan, TensorDigest(plan.base or plan.info), TensorDigest(plan.info))

    def described(self, plan: Planned) -> Tensor:
        """Returns the manifest entry, under the name of `plan`."""
        return tensor_of(plan, self.base_digest.hexdigest(), self.trained_digest.hexdigest(), self.changed)


def tensor_of(plan: Planned, base_digest: str, trained_digest: str, changed: int) -> Tensor:
    """Returns the manifest entry of a planned tensor."""
    name, digest = (None, None) if plan.base is None else (plan.base.name, base_digest)
    return Tensor(base=name, base_digest=digest, digest=trained_digest, data=plan.data, changed=changed)


class Creation:
    """Writes a patch: entries after space reserved for the header, which is written last."""

    def __init__(
        self,
        base: ShardedCheckpoint,
        trained: ShardedCheckpoint,
        workers: output.Workers,
        zstd: bool,
        progress: Progress | None,
    ) -> None:
        self.base, self.trained, self.workers, self.zstd = base, trained, workers, zstd
        self.progress = progress or (lambda done, total, name: None)
        self.plan = planned(base, trained)
        self.headers = headers_of(trained, [plan.info for plan in self.plan])
        for name in filter(UNPAIRED_SURROGATE.search, self.headers):
            raise InputError(
                f"{printable(trained.path)}: the name of its file {printable(name)} is not UTF-8; rename the file"
            )
        self.extra_files, self.stored_extra_files = extra_files_of(base, trained, list(self.headers))
        self.reserved = self._reserve()

    def _reserve(self) -> int:
        """Returns the size of a header with the longest possible numbers and digests."""
        keys = {plan.data: plan.info for plan in self.plan}
        entries = {
            key: entry(stored_dtype(info.dtype), list(info.shape), LARGEST, LARGEST)
            if key.startswith("whole:")
            else entry("U8", [LARGEST], LARGEST, LARGEST)
            for key, info in keys.items()
        }
        for key in (
            *(f"header:{name}" for name in self.headers),
            *(f"extra:{name}" for name in self.stored_extra_files),
        ):
            entries[key] = entry("U8", [LARGEST], LARGEST, LARGEST)
        if len(entries) > MAX_TENSORS:
            raise InputError(
                f"a patch of {len(self.plan)} tensors would have more than the limit of {MAX_TENSORS} entries;"
                " split the checkpoint"
            )
        blank = {plan.info.name: tensor_of(plan, NO_DIGEST, NO_DIGEST, LARGEST) for plan in self.plan}
        size = len(patch_header(entries, self._manifest(blank)))
        if size > MAX_HEADER_BYTES:
            raise InputError(
                f"the header of the patch would take {size} bytes, more than the {MAX_HEADER_BYTES} that safetensors"
                " allows; split the checkpoint"
            )
        return size

    def _manifest(self, tensors: dict[str, Tensor]) -> Manifest:
        return Manifest(
            values="difference" if self.zstd else "new",
            base_digest=digest_all(base_digests(tensors.values())),
            digest=digest_all({name: tensor.digest for name, tensor in tensors.items()}),
            headers={name: digest_bytes(header) for name, header in self.headers.items()},
            extra_files=self.extra_files,
            tensors=tensors,
        )

    def write(self, writer: output.Writer) -> None:
        """Writes everything: segments as they are computed, the header at the end."""
        small = {f"header:{name}": header for name, header in self.headers.items()}
        small |= {f"extra:{name}": content for name, content in self.stored_extra_files.items()}
        writer([bytes(self.reserved), *small.values()])
        entries: dict[str, Stored] = {}
        for plan in self.plan:
            entries.setdefault(plan.data, Stored.empty(plan))  # one storage with two names is stored once
        done, total = 0, sum(stored.plan.info.nbytes * (2 if stored.plan.base else 1) for stored in entries.values())
        buffers = output.Ring(self.workers.depth, lambda width: GatherBuffers.of(segments.size_of(width), width))
        jobs = (
            (stored, start, stop, buffers.next(stored.plan.info.item_bytes))
            for stored in entries.values()
            for start, stop in segments.ranges(stored.plan.info.items, stored.plan.info.item_bytes)
        )
        for stored, digests, changed, parts, nbytes in self.workers.map_ahead(
            self._segment, jobs, lambda job: job[2] - job[1] < output.SMALL
        ):
            stored.base_digest.add(digests[0])
            stored.trained_digest.add(digests[1])
            stored.changed += changed
            stored.nbytes += sum(map(len, parts))
            writer(parts, small=nbytes < output.SMALL)
            done += nbytes
            self.progress(done, total, stored.plan.info.name)
        tensors = {plan.info.name: entries[plan.data].described(plan) for plan in self.plan}
        writer.rewrite(patch_header(self._entries(small, entries), self._manifest(tensors), self.reserved))

    def _segment(
        self, job: tuple[Stored, int, int, GatherBuffers]
    ) -> tuple[Stored, Sequence[torch.Tensor], int, list[memoryview], int]:
        """Returns the tensor, digests of both sides, number of changes, bytes to write, and number of bytes read."""
        stored, start, stop, buffers = job
        trained = self.trained.read_bits(stored.plan.info.name, start, stop)
        if stored.plan.base is None:
            # Copied: the next read may overwrite the buffer of this read.
            values = buffers.values[: stop - start].copy_(trained)
            digests = digest(values)
            return (
                stored,
                (digests, digests),
                stop - start,
                [memoryview(values.view(torch.uint8).numpy().data)],
                values.nbytes,
            )
        base = self.base.read_bits(stored.plan.base.name, start, stop)
        changes, both = gather(base, trained, difference=self.zstd, buffers=buffers)
        return stored, both.unbind(), changes.changed, segments.encode(changes, self.zstd), base.nbytes + trained.nbytes

    def _entries(self, small: dict[str, bytes], stored: dict[str, Stored]) -> dict[str, dict[str, Any]]:
        """Returns the header entries of everything that was written."""
        entries, offset = {}, 0
        for key, size in [
            *((key, len(content)) for key, content in small.items()),
            *((key, tensor.nbytes) for key, tensor in stored.items()),
        ]:
            info = stored[key].plan.info if key in stored and stored[key].plan.base is None else None
            dtype, shape = (stored_dtype(info.dtype), list(info.shape)) if info else ("U8", [size])
            entries[key] = entry(dtype, shape, offset, offset + size)
            offset += size
        return entries


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def header_bytes(metadata: dict[str, str], entries: dict[str, dict[str, Any]], size: int = 0) -> bytes:
    """Returns a safetensors header after its length, padded to `size` bytes, or to a multiple of 8."""
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text = text.ljust(max(size - 8, (len(text) + 7) // 8 * 8))
    return len(text).to_bytes(8, "little") + text


def patch_header(entries: dict[str, dict[str, Any]], manifest: Manifest, size: int = 0) -> bytes:
    return header_bytes(metadata_of(manifest), entries, size)


def planned(base: ShardedCheckpoint, trained: ShardedCheckpoint) -> list[Planned]:
    """Returns what is stored of each trained tensor, in the order of the bytes of the files that `apply` writes."""
    plans = []
    for info in in_order(trained):
        holder = trained.aliases.get(info.name, info.name)
        base_info = base.tensors.get(info.name) or base.tensors.get(holder)
        if base_info is not None and (base_info.dtype, base_info.shape) == (info.dtype, info.shape):
            plans.append(Planned(info, base_info, f"changes:{base_info.name}"))
        else:
            plans.append(Planned(info, None, f"whole:{holder}"))
    return plans


def pair_of(base: ShardedCheckpoint, trained: ShardedCheckpoint, base_names: Mapping[str, str]) -> Pair:
    """Returns the trained parameters that have a delta, each with the base tensor named in `base_names`."""
    return Pair(
        base,
        trained,
        [
            Match(name, name, base.tensors[base_name], info, info.numel, info.shape, 0, 0, "exact")
            for name, base_name in base_names.items()
            if (info := trained.tensors[name]).dtype in DTYPES and not is_buffer(name, info.shape, info.dtype)
        ],
    )


def in_order(trained: ShardedCheckpoint) -> list[TensorInfo]:
    """Returns the tensors in the order in which `apply` writes them."""
    infos = list(trained.tensors.values())
    if trained.kind != "torch":
        return infos
    order = {name: index for index, name in enumerate(trained.headers())}
    return sorted(infos, key=lambda info: (order[info.file], -info.item_bytes))  # aligned, in the order of safetensors


def headers_of(trained: ShardedCheckpoint, infos: list[TensorInfo]) -> dict[str, bytes]:
    """Returns the header of each file that `apply` writes: the trained file's, or a new one for other formats."""
    headers: dict[str, bytes] = {}
    for name, header in trained.headers().items():
        target = name if header is not None else weights_name(name)
        if target in headers:
            raise InputError(
                f"{printable(trained.path)}: two of its files would be written as {printable(target)};"
                " rename one of them"
            )
        if header is None:
            header = make_header([info for info in infos if info.file == name], trained.path)
        headers[target] = header
    return headers


def weights_name(name: str) -> str:
    """Returns the name of the file that holds a PyTorch file's tensors after `apply`.

    >>> weights_name("pytorch_model-00001-of-00002.bin")
    'model-00001-of-00002.safetensors'
    """
    return os.path.splitext(name)[0].replace("pytorch_model", "model", 1) + ".safetensors"


def make_header(infos: list[TensorInfo], path: str) -> bytes:
    """Returns a safetensors header of the tensors."""
    entries, offset = {}, 0
    for info in infos:
        if info.dtype == "c128":
            raise InputError(
                f"{printable(path)}: tensor {printable(info.name)} is complex128, which safetensors does not"
                " support; convert it"
            )
        entries[info.name] = entry(stored_dtype(info.dtype), list(info.shape), offset, offset + info.nbytes)
        offset += info.nbytes
    return header_bytes({"format": "pt"}, entries)


def extra_files_of(
    base: ShardedCheckpoint, trained: ShardedCheckpoint, files: list[str]
) -> tuple[dict[str, ExtraFile], dict[str, bytes]]:
    """Returns the files that belong to the weights, and the content of those that differ in the base's folder."""
    names = extra_file_names(trained)
    content = {name: small_file(trained.folder, name) for name in names}
    if trained.kind == "torch" and trained.index is not None:
        content["model.safetensors.index.json"] = make_index(trained)
    extra_files, stored = {}, {}
    for name, text in content.items():
        if text is None or name in files:
            continue
        in_base = small_file(base.folder, name) == text and not os.path.isfile(base.path)
        extra_files[name] = ExtraFile(stored=not in_base, digest=digest_bytes(text))
        if not in_base:
            stored[name] = text
    return extra_files, stored


def extra_file_names(trained: ShardedCheckpoint) -> list[str]:
    """Returns the names of configuration, tokenizer, and the index of these weights."""
    index = [trained.index] if trained.index is not None and trained.kind != "torch" else []
    if os.path.isfile(trained.path):  # the user gave a file, not its folder
        return index
    names = sorted(
        name for name in os.listdir(trained.folder) if name.endswith(EXTRA_FILE_SUFFIXES) and not name.startswith(".")
    )
    return [*index, *(name for name in names if not name.endswith(".index.json"))]


def small_file(folder: str, name: str) -> bytes | None:
    """Returns the content of a regular file of at most 64 MiB; None for anything else."""
    try:
        status = os.stat(os.path.join(folder, name))
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_EXTRA_FILE_BYTES:
            return None
        with open(os.path.join(folder, name), "rb") as file:
            return file.read(MAX_EXTRA_FILE_BYTES)
    except OSError:
        return None


def make_index(trained: ShardedCheckpoint) -> bytes:
    """Returns the index of the safetensors files that replace PyTorch files."""
    weights = {info.name: weights_name(info.file) for info in trained.tensors.values()}
    total = sum(info.nbytes for info in trained.tensors.values())
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weights}, indent=2) + "\n").encode()
