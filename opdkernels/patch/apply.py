"""`patch apply`: a source and a patch to the trained checkpoint, in bounded memory; everything is verified before a byte is written."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opdkernels.checkpoint.base import TensorInfo
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.checkpoint.safetensors import SafetensorsFile, stored_dtype
from opdkernels.checkpoint.sharded import ShardedCheckpoint
from opdkernels.checkpoint.torch_pickle import torch_dtype_name
from opdkernels.errors import InputError, printable
from opdkernels.ops.patch import BITS, BLOCK, Changes, bits, digest, scatter
from opdkernels.patch import output, segments
from opdkernels.patch.create import small_file
from opdkernels.patch.manifest import Patch, Tensor, TensorDigest, digest_bytes, summary
from opdkernels.progress import Progress

Read = Callable[[str, int, int], torch.Tensor]


def apply(
    source: str | os.PathLike[str],
    patch: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    io: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the trained checkpoint that a patch makes of its source to the folder `out`, which must be new or empty.

    source: the folder, file or hub id that the patch was made from: any with the same tensors, in whatever files. Files beside
    the weights come from the patch, or where it says so from the source's folder; one that is not there as it was is named in
    `left_out`. progress: called with bytes done, bytes in all and the tensor at hand. Returns what `info` does, and `left_out`.

    Raises InputError, with nothing written, where the patch is damaged or of another source; OSError for a full disk, after
    which nothing is left.
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(contextlib.closing(Patch(patch)))
        before = stack.enter_context(contextlib.closing(open_checkpoint(source, io=io, any_tensors=True)))
        assert isinstance(before, ShardedCheckpoint)
        if not os.fspath(out):
            raise InputError("the output folder has no name; give one to -o")
        workers = stack.enter_context(contextlib.closing(output.Workers()))
        work = Application(opened, before.tensors, before.read_bits, printable(before.path), workers, progress)
        work.verify()
        before.check()
        with output.new_folder(Path(out)) as temporary:
            rooms = output.Ring(workers.depth, lambda width: torch.empty(segments.size_of(width), dtype=BITS[width]))
            for name in opened.files:
                work.write(name, temporary, os.fspath(out), rooms)
            left_out = write_beside(opened, before, temporary)
            before.check()
        return summary(opened) | {"left_out": left_out}


def apply_to(state_dict: Mapping[str, torch.Tensor], patch: str | os.PathLike[str]) -> list[str]:
    """Change the tensors of a live state dict in place into those that a patch makes; returns the names it changed.

    Every tensor is held against its digest first: on an error nothing was changed. Tensors on any device and of any strides;
    parameters keep their identity. Names that the patch does not have stay as they are.

    Raises InputError where the patch is damaged, or a tensor is missing, of another shape or dtype, or not the source's.
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(contextlib.closing(Patch(patch)))
        workers = stack.enter_context(contextlib.closing(output.Workers()))
        stack.enter_context(torch.no_grad())
        live = {name: tensor for name, tensor in state_dict.items() if isinstance(tensor, torch.Tensor)}
        held = Held(live)
        infos = {name: described(name, tensor) for name, tensor in live.items()}
        work = Application(opened, infos, held.read, "the state dict", workers, None)
        targets = changed_in_place(opened, live, infos)
        work.verify()
        # First into memory that is thrown away: what is overwritten cannot be had back.
        rooms = output.Ring(workers.depth, lambda width: torch.empty(segments.size_of(width), dtype=BITS[width]))
        for _ in work.made(targets, lambda info, start, stop: rooms.next(info.item_bytes)[: stop - start]):
            pass
        for target in targets:
            new = held.in_place(target.name)
            for _ in work.made([target], lambda info, start, stop, new=new: new[start:stop]):  # type: ignore[misc]
                pass
            held.put(target.name, new)
        return [info.name for info in targets]


class Held:
    """The bits of live tensors: views of those that lie in memory one after the other, copies of the others."""

    def __init__(self, live: Mapping[str, torch.Tensor]) -> None:
        self.live = live
        self._lock = threading.Lock()
        self._copy: tuple[str, torch.Tensor] | None = None

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        if self._is_plain(name):
            return bits(self.live[name])[start:stop]
        with self._lock:
            if self._copy is None or self._copy[0] != name:
                self._copy = name, bits(self.live[name].detach().cpu())
            return self._copy[1][start:stop]

    def in_place(self, name: str) -> torch.Tensor:
        """Memory for the new bits of a tensor: its own where it can be."""
        return (
            bits(self.live[name])
            if self._is_plain(name)
            else bits(torch.empty_like(self.live[name], device="cpu", memory_format=torch.contiguous_format))
        )

    def put(self, name: str, new: torch.Tensor) -> None:
        tensor = self.live[name]
        self._copy = None
        if self._is_plain(name):
            torch.autograd.graph.increment_version(
                tensor
            )  # written through integer views, which autograd does not follow
        else:
            tensor.detach().copy_(new.view(tensor.dtype).view(tensor.shape))

    def _is_plain(self, name: str) -> bool:
        return self.live[name].device.type == "cpu" and self.live[name].is_contiguous()


def described(name: str, tensor: torch.Tensor) -> TensorInfo:
    """A live tensor as a header would describe it."""
    if hasattr(tensor, "to_local"):
        raise InputError(
            f"{printable(name)} in the state dict is a DTensor, of which only a part is here; gather the full state dict first"
        )
    return TensorInfo(
        name,
        torch_dtype_name(tensor.dtype),
        tuple(tensor.shape),
        tensor.numel(),
        "",
        tensor.numel() * tensor.element_size(),
    )


def changed_in_place(
    patch: Patch, live: Mapping[str, torch.Tensor], infos: Mapping[str, TensorInfo]
) -> list[TensorInfo]:
    """The tensors to change, each storage once. Raises InputError where the state dict has no place for one."""
    tensors = patch.manifest.tensors
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    found = []
    for info in (info for file in patch.files.values() for info in file):
        mine = infos.get(info.name)
        if mine is None or (mine.dtype, mine.shape) != (info.dtype, info.shape):
            raise InputError(
                f"the state dict has no tensor {printable(info.name)} of {stored_dtype(info.dtype)} {list(info.shape)}, which the patch"
                " makes; give the model's own state_dict()"
            )
        place = (live[info.name].data_ptr(), tuple(live[info.name].shape), live[info.name].stride())
        first = seen.setdefault(place, info.name) if info.numel else info.name
        if first == info.name:
            found.append(info)
        elif tensors[first].digest != tensors[info.name].digest:
            raise InputError(
                f"{printable(info.name)} and {printable(first)} are one tensor in the state dict and two in the patch; untie them"
            )
    # What is made from another tensor comes before that one changes, and nothing may be made from it in turn.
    sources = {tensor.source for tensor in tensors.values()}
    for info in found:
        if tensors[info.name].source not in (None, info.name) and info.name in sources:
            raise patch.bad(f"makes {printable(info.name)} from a tensor that is made from it")
    return sorted(found, key=lambda info: tensors[info.name].source == info.name)


@dataclass(frozen=True)
class Piece:
    """Items [start, stop) of a trained tensor, and where the patch holds their changes (none: they are whole)."""

    info: TensorInfo
    start: int
    stop: int
    segment: segments.Segment | None


class Application:
    """A patch on a source of any kind: `read` gives the bits of its tensors."""

    def __init__(
        self,
        patch: Patch,
        source: Mapping[str, TensorInfo],
        read: Read,
        shown: str,
        workers: output.Workers,
        progress: Progress | None,
    ) -> None:
        self.patch, self.source, self.read, self.shown, self.workers = patch, source, read, shown, workers
        self.progress = progress or (lambda done, total, name: None)
        self.infos = [info for file in patch.files.values() for info in file]
        self.done, self.total = 0, 2 * sum(info.nbytes for info in self.infos)

    def _tensor(self, info: TensorInfo) -> Tensor:
        return self.patch.manifest.tensors[info.name]

    def other(self, name: str, what: str) -> InputError:
        return InputError(
            f"{self.shown} {what} ({printable(name)}): {printable(self.patch.path)} is a patch for another source, of digest"
            f" {self.patch.manifest.source_digest}; give the checkpoint that it was made from"
        )

    def verify(self) -> None:
        """Raises InputError unless the source is the patch's and everything in the patch is whole and valid."""
        for info in self.infos:  # from the headers alone: another model is told at once
            name = self._tensor(info).source
            held = self.source.get(name) if name is not None else info
            if held is None:
                raise self.other(info.name, "lacks a tensor that the patch changes")
            if (held.dtype, held.shape, held.nbytes) != (info.dtype, info.shape, info.nbytes):
                raise self.other(
                    info.name,
                    f"has a tensor of {stored_dtype(held.dtype)} {list(held.shape)} where the patch changes {stored_dtype(info.dtype)} {list(info.shape)}",
                )
        hashes = {info.name: TensorDigest(info) for info in self.infos}
        for info, last, digests in self.workers.ahead(self._examined, self._segments(self.infos), is_small):
            hashes[info.name].add(digests)
            self._show(info, digests)
            if last:
                self._compare(info, hashes[info.name].hexdigest())

    def _compare(self, info: TensorInfo, found: str) -> None:
        tensor = self._tensor(info)
        if tensor.source is None and found != tensor.digest:
            raise self.patch.bad(f"holds a tensor {printable(info.name)} of another digest than was written with it")
        if tensor.source is not None and found != tensor.source_digest:
            raise self.other(
                tensor.source, f"has a tensor of digest {found} where the patch was made from {tensor.source_digest}"
            )

    def _segments(self, infos: Iterable[TensorInfo]) -> Iterator[Piece]:
        """What the tensors are made of, in order."""
        for info in infos:
            tensor = self._tensor(info)
            if tensor.source is None:
                for start, stop in segments.ranges(info.items, info.item_bytes):
                    yield Piece(info, start, stop, None)
                continue
            size = self.patch.entry(tensor.data).nbytes
            with self._damage(info):
                for segment in segments.find(
                    lambda start, stop, key=tensor.data: self.patch.read(key, start, stop),
                    size,
                    info.items,
                    info.item_bytes,
                ):  # type: ignore[misc]
                    yield Piece(info, segment.first, segment.last, segment)

    @contextlib.contextmanager
    def _damage(self, info: TensorInfo) -> Iterator[None]:
        try:
            yield
        except segments.Damaged as error:
            raise self.patch.bad(
                f"holds changes of {printable(info.name)} that are not those written: its data {error}"
            ) from None

    def _changes(self, piece: Piece) -> Changes:
        assert piece.segment is not None
        with self._damage(piece.info):
            stored = self.patch.keep(self._tensor(piece.info).data, piece.segment.start, piece.segment.stop)
            return segments.decode(stored, piece.segment, piece.info.item_bytes, self.patch.difference)

    def _examined(self, piece: Piece) -> tuple[TensorInfo, bool, torch.Tensor]:
        """The tensor, whether this was the last of it, and the digests of the source's bits, or of those stored whole."""
        tensor = self._tensor(piece.info)
        last = piece.stop == piece.info.items
        if tensor.source is None:
            return piece.info, last, digest(self.patch.read(tensor.data, piece.start, piece.stop))
        self._changes(piece)
        return piece.info, last, digest(self.read(tensor.source, piece.start, piece.stop))

    def made(
        self, infos: Sequence[TensorInfo], room: Callable[[TensorInfo, int, int], torch.Tensor]
    ) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
        """The trained tensors' bits, segment by segment, each in the room asked for. Raises InputError where they are not their own."""

        def one(job: tuple[Piece, torch.Tensor]) -> tuple[Piece, torch.Tensor, torch.Tensor]:
            piece, target = job
            tensor = self._tensor(piece.info)
            if tensor.source is None:
                target.copy_(self.patch.read(tensor.data, piece.start, piece.stop))
                return piece, target, digest(target)
            changes = self._changes(piece)
            return piece, *scatter(
                self.read(tensor.source, piece.start, piece.stop), changes, difference=self.patch.difference, out=target
            )

        hashes = {info.name: TensorDigest(info) for info in infos}
        jobs = ((piece, room(piece.info, piece.start, piece.stop)) for piece in self._segments(infos))
        for piece, part, digests in self.workers.ahead(one, jobs, lambda job: is_small(job[0])):
            hashes[piece.info.name].add(digests)
            self._show(piece.info, digests)
            yield piece.info, part
        for info in infos:
            if hashes[info.name].hexdigest() != self._tensor(info).digest:
                raise self.patch.bad(
                    f"makes a tensor {printable(info.name)} of another digest than was written with it"
                )

    def write(self, name: str, folder: Path, shown: str, rooms: output.Ring[torch.Tensor]) -> None:
        """One file of the trained checkpoint."""
        header, infos = self.patch.headers[name], self.patch.files[name]
        size = len(header) + sum(info.nbytes for info in infos)
        with contextlib.closing(
            output.Writer(folder / name, os.path.join(shown, name), self.workers.depth, size)
        ) as writer:
            writer([header])
            for _, part in self.made(infos, lambda info, start, stop: rooms.next(info.item_bytes)[: stop - start]):
                writer([part.view(torch.uint8).numpy().data], small=part.numel() < output.SMALL)
            writer.finish()
        SafetensorsFile(str(folder / name), "read").close()  # whoever reads it next has the same library

    def _show(self, info: TensorInfo, digests: torch.Tensor) -> None:
        self.done += min(len(digests) * BLOCK * info.item_bytes, info.nbytes)
        self.progress(min(self.done, self.total), self.total, info.name)


def is_small(piece: Piece) -> bool:
    return piece.stop - piece.start < output.SMALL


def write_beside(patch: Patch, source: ShardedCheckpoint, folder: Path) -> list[str]:
    """Writes the files beside the weights; returns those that the source's folder does not have as they were."""
    left_out = []
    for name, beside in patch.manifest.beside.items():
        content = patch.small(f"beside:{name}", beside.digest) if beside.stored else small_file(source.folder, name)
        if content is None or digest_bytes(content) != beside.digest:
            left_out.append(name)
            continue
        (folder / name).write_bytes(content)
    return left_out
