"""`patch apply`: restores the trained checkpoint from a base and a patch; reads both once, in bounded memory."""

from __future__ import annotations

import contextlib
import functools
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
from opdkernels.ops.arguments import sharing_memory
from opdkernels.ops.patch import BITS, Changes, bits, digest, scatter
from opdkernels.ops.patch.layout import BLOCK
from opdkernels.outputs import new_folder, validate_new_folder
from opdkernels.patch import output, segments
from opdkernels.patch.create import small_file
from opdkernels.patch.manifest import Patch, Tensor, TensorDigest, digest_bytes, summary
from opdkernels.progress import Progress

Read = Callable[[str, int, int], torch.Tensor]


def apply(
    base: str | os.PathLike[str],
    patch: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    io: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the trained checkpoint that a base and a patch give.

    Args:
        base: The checkpoint that the patch was made from: folder, file or hub id. Its tensors must be the same, but
            may be in other files.
        patch: File that `create` wrote.
        out: Folder to write; must be new or empty.
        io: How the base is read: "auto", "mmap" or "read".
        progress: Called with bytes done, bytes in total and the name of the current tensor.

    Returns:
        What `info` returns, and `left_out`: files of configuration and tokenizer that should come from the base's
        folder and are missing or different there.

    Raises:
        InputError: The patch is damaged or belongs to another base, or `out` is not new or empty; nothing is left of
            the output.
        UsageError: `out` is empty.
        OSError: The output cannot be written; nothing is left of it.
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(contextlib.closing(Patch(patch)))
        base_checkpoint = stack.enter_context(contextlib.closing(open_checkpoint(base, io=io, any_tensors=True)))
        assert isinstance(base_checkpoint, ShardedCheckpoint)
        validate_new_folder(out, inputs={"BASE": base})  # before the base is read
        workers = stack.enter_context(contextlib.closing(output.Workers()))
        work = Application(
            opened,
            base_checkpoint.tensors,
            base_checkpoint.read_bits,
            printable(base_checkpoint.path),
            workers,
            progress,
        )
        work.compare_headers()
        with new_folder(out, inputs={"BASE": base}) as temporary:
            for name in opened.files:
                work.write(name, temporary, os.fspath(out))
            left_out = write_extra_files(opened, base_checkpoint, temporary)
            base_checkpoint.check()
        return summary(opened) | {"left_out": left_out}


def apply_to(state_dict: Mapping[str, torch.Tensor], patch: str | os.PathLike[str]) -> list[str]:
    """Applies a patch to a state dict in place.

    Every tensor is verified against its digest first: after an error nothing is changed. Parameters keep identity.

    Args:
        state_dict: The base's tensors, on any device, with any strides. Names that are not in the patch are unchanged.
        patch: File that `create` wrote.

    Returns:
        The names of the tensors that now equal the trained ones: every tensor of the patch, a tied one once.

    Raises:
        InputError: The patch is damaged, or a tensor is missing, of another shape or dtype, or not the base's.
        TypeError: `state_dict` is no mapping, such as a module.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is of type {type(state_dict).__name__}; give model.state_dict()")
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(contextlib.closing(Patch(patch)))
        workers = stack.enter_context(contextlib.closing(output.Workers()))
        stack.enter_context(torch.no_grad())
        live = {name: tensor for name, tensor in state_dict.items() if isinstance(tensor, torch.Tensor)}
        tensors = LiveTensors(live)
        infos = {name: described(name, tensor) for name, tensor in live.items()}
        work = Application(opened, infos, tensors.read, "the state dict", workers, None)
        targets = changed_in_place(opened, live, infos)
        work.compare_headers()
        work.restore(targets, work.scratch)  # and discarded: overwritten tensors could not be restored
        for target in targets:
            new = tensors.in_place(target.name)
            work.restore([target], slices_of(new), compare_base=False)
            tensors.put(target.name, new)
        return [info.name for info in targets]


def slices_of(target: torch.Tensor) -> Callable[[TensorInfo, int, int], torch.Tensor]:
    """Returns a function that returns items [start, stop) of the bits of one tensor."""
    return lambda info, start, stop: target[start:stop]


class LiveTensors:
    """The bits of live tensors: views of contiguous CPU tensors, copies of the others."""

    def __init__(self, live: Mapping[str, torch.Tensor]) -> None:
        self.live = live
        self._lock = threading.Lock()
        self._copy: tuple[str, torch.Tensor] | None = None

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns items [start, stop) of a tensor as integers."""
        if self._is_plain(name):
            return bits(self.live[name])[start:stop]
        with self._lock:
            if self._copy is None or self._copy[0] != name:
                self._copy = name, bits(self.live[name].detach().cpu())
            return self._copy[1][start:stop]

    def in_place(self, name: str) -> torch.Tensor:
        """Returns memory for the new bits of a tensor: the tensor's own memory if it is contiguous on the CPU."""
        return (
            bits(self.live[name])
            if self._is_plain(name)
            else bits(torch.empty_like(self.live[name], device="cpu", memory_format=torch.contiguous_format))
        )

    def put(self, name: str, new: torch.Tensor) -> None:
        """Stores the new bits of a tensor."""
        tensor = self.live[name]
        self._copy = None
        if self._is_plain(name):
            # Written through integer views, which autograd does not track.
            torch.autograd.graph.increment_version(tensor)
        else:
            tensor.detach().copy_(new.view(tensor.dtype).view(tensor.shape))

    def _is_plain(self, name: str) -> bool:
        return self.live[name].device.type == "cpu" and self.live[name].is_contiguous()


def described(name: str, tensor: torch.Tensor) -> TensorInfo:
    """Returns the header entry of a live tensor."""
    if hasattr(tensor, "to_local"):
        raise InputError(
            f"{printable(name)} in the state dict is a DTensor, which holds only a shard;"
            " gather the full state dict first"
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
    """Returns the tensors to change, each storage once. Raises InputError if the state dict lacks one."""
    tensors = patch.manifest.tensors
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    targets = []
    for info in (info for file in patch.files.values() for info in file):
        live_info = infos.get(info.name)
        if live_info is None or (live_info.dtype, live_info.shape) != (info.dtype, info.shape):
            name, needed = printable(info.name), f"{stored_dtype(info.dtype)} {list(info.shape)}"
            raise InputError(
                f"the state dict has no tensor {name} of {needed}, which the patch restores;"
                " give the model's own state_dict()"
                if live_info is None
                else f"{name} is {stored_dtype(live_info.dtype)} {list(live_info.shape)} in the state dict"
                f" and {needed} in the patch; load the model with the dtype and the shapes of the checkpoint"
            )
        storage = (live[info.name].data_ptr(), tuple(live[info.name].shape), live[info.name].stride())
        first = seen.setdefault(storage, info.name) if info.numel else info.name
        if first == info.name:
            targets.append(info)
        elif tensors[first].digest != tensors[info.name].digest:
            raise InputError(
                f"{printable(info.name)} and {printable(first)} are one tensor in the state dict and two in the"
                " patch; untie them"
            )
    if shared := sharing_memory((info.name, live[info.name]) for info in targets):
        names = " and ".join(printable(name) for name in shared if name is not None)
        raise InputError(f"elements of {names} in the state dict share memory; give tensors with memory of their own")
    # A tensor that is made from another one is written before that one changes; such chains are rejected.
    base_tensors = {tensor.base for tensor in tensors.values()}
    for info in targets:
        if tensors[info.name].base not in (None, info.name) and info.name in base_tensors:
            raise patch.bad(f"makes {printable(info.name)} from a tensor that is made from it")
    return sorted(targets, key=lambda info: tensors[info.name].base == info.name)


@dataclass(frozen=True)
class Piece:
    """Items [start, stop) of a trained tensor, and the segment of their changes (None: they are stored in full)."""

    info: TensorInfo
    start: int
    stop: int
    segment: segments.Segment | None


@dataclass(frozen=True)
class Restored:
    """Digests of a restored piece, and of the base's bits that it was made from, None where these are not compared."""

    digests: torch.Tensor
    base_digests: torch.Tensor | None


class Application:
    """Applies a patch to a base and verifies both; `read` returns the bits of the base's tensors."""

    def __init__(
        self,
        patch: Patch,
        base: Mapping[str, TensorInfo],
        read: Read,
        shown: str,
        workers: output.Workers,
        progress: Progress | None,
    ) -> None:
        self.patch, self.base, self.read, self.shown, self.workers = patch, base, read, shown, workers
        self.progress = progress or (lambda done, total, name: None)
        self.infos = [info for file in patch.files.values() for info in file]
        self.done, self.total = 0, sum(info.nbytes for info in self.infos)
        self._memory = threading.local()

    def _tensor(self, info: TensorInfo) -> Tensor:
        return self.patch.manifest.tensors[info.name]

    def wrong_base(self, name: str, what: str) -> InputError:
        return InputError(
            f"{self.shown} {what} ({printable(name)}): {printable(self.patch.path)} is a patch for another base, with"
            f" digest {self.patch.manifest.base_digest}; give the checkpoint that it was made from"
        )

    def compare_headers(self) -> None:
        """Raises InputError unless the base has the tensors of the patch's base: detects another model at once."""
        for info in self.infos:
            name = self._tensor(info).base
            base_info = self.base.get(name) if name is not None else info
            if base_info is None:
                raise self.wrong_base(info.name, "lacks a tensor that the patch changes")
            if (base_info.dtype, base_info.shape, base_info.nbytes) != (info.dtype, info.shape, info.nbytes):
                raise self.wrong_base(
                    info.name,
                    f"has a tensor of {stored_dtype(base_info.dtype)} {list(base_info.shape)} where the patch changes"
                    f" {stored_dtype(info.dtype)} {list(info.shape)}",
                )

    def _compare_base(self, info: TensorInfo, hexdigest: str) -> None:
        tensor = self._tensor(info)
        assert tensor.base is not None
        if hexdigest == tensor.base_digest:
            return
        if hexdigest == tensor.digest:
            raise InputError(
                f"{self.shown} already has the trained {printable(info.name)}: {printable(self.patch.path)} was "
                "applied to it, or it is the trained checkpoint; give the base"
            )
        raise self.wrong_base(
            tensor.base, f"differs from the base: its digest is {hexdigest}, that of the base {tensor.base_digest}"
        )

    def _segments(self, infos: Iterable[TensorInfo]) -> Iterator[Piece]:
        """Yields the pieces of the tensors, in order."""
        for info in infos:
            tensor = self._tensor(info)
            if tensor.base is None:
                for start, stop in segments.ranges(info.items, info.item_bytes):
                    yield Piece(info, start, stop, None)
                continue
            size = self.patch.entry(tensor.data).nbytes
            with self._damage(info):
                read = functools.partial(self.patch.read, tensor.data)
                for segment in segments.find(read, size, info.items, info.item_bytes):
                    yield Piece(info, segment.first, segment.last, segment)

    @contextlib.contextmanager
    def _damage(self, info: TensorInfo) -> Iterator[None]:
        try:
            yield
        except segments.Damaged as error:
            raise self.patch.bad(f"holds damaged changes of {printable(info.name)}: the data {error}") from None

    def _changes(self, piece: Piece) -> Changes:
        assert piece.segment is not None
        with self._damage(piece.info):
            stored = self.patch.keep(self._tensor(piece.info).data, piece.segment.start, piece.segment.stop)
            return segments.decode(stored, piece.segment, piece.info.item_bytes, self.patch.difference)

    def scratch(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Returns memory for items [start, stop) of a tensor; the next call of the same thread may return the same."""
        buffers = self._memory.__dict__.setdefault("by_width", {})
        if info.item_bytes not in buffers:
            buffers[info.item_bytes] = torch.empty(segments.size_of(info.item_bytes), dtype=BITS[info.item_bytes])
        return buffers[info.item_bytes][: stop - start]

    def restore(
        self,
        infos: Sequence[TensorInfo],
        memory: Callable[[TensorInfo, int, int], torch.Tensor],
        use: Callable[[TensorInfo, int, torch.Tensor], None] = lambda info, start, restored: None,
        *,
        compare_base: bool = True,
    ) -> None:
        """Restores trained tensors piece by piece and compares the digests of both sides.

        No worker calls `memory` or `use` after it returned or raised.

        Args:
            infos: The tensors.
            memory: Returns memory for the bits of items [start, stop) of a tensor; called by any worker.
            use: Called with a tensor, start and the bits, by the worker that restored them.
            compare_base: Whether the base's tensors are compared with their digests; False where they were.

        Raises:
            InputError: The base is another one, or the patch is damaged.
        """

        def restore_piece(piece: Piece) -> tuple[Piece, Restored]:
            target, tensor = memory(piece.info, piece.start, piece.stop), self._tensor(piece.info)
            if tensor.base is None:
                target.copy_(self.patch.read(tensor.data, piece.start, piece.stop))
                restored = Restored(digest(target), None)
            else:
                changes, base = self._changes(piece), self.read(tensor.base, piece.start, piece.stop)
                # Before `target`, which may be the base's memory, is written.
                base_digests = digest(base) if compare_base else None
                _, digests = scatter(base, changes, difference=self.patch.difference, out=target)
                restored = Restored(digests, base_digests)
            use(piece.info, piece.start, target)
            return piece, restored

        base_hashes = {info.name: TensorDigest(info) for info in infos}
        hashes = {info.name: TensorDigest(info) for info in infos}
        with contextlib.closing(self.workers.map_ahead(restore_piece, self._segments(infos), is_small)) as pieces:
            for piece, restored in pieces:
                name = piece.info.name
                hashes[name].add(restored.digests)
                if restored.base_digests is not None:
                    base_hashes[name].add(restored.base_digests)
                    if piece.stop == piece.info.items:
                        self._compare_base(piece.info, base_hashes[name].hexdigest())
                self._show(piece.info, restored.digests)
        for info in infos:
            if hashes[info.name].hexdigest() != self._tensor(info).digest:
                verb = "holds" if self._tensor(info).base is None else "gives"
                raise self.patch.bad(f"{verb} a tensor {printable(info.name)} with a wrong digest")

    def write(self, name: str, folder: Path, shown: str) -> None:
        """Writes one file of the trained checkpoint."""
        header, infos = self.patch.headers[name], self.patch.files[name]
        starts, size = {}, len(header)
        for info in infos:
            starts[info.name] = size
            size += info.nbytes
        with contextlib.closing(output.Writer(folder / name, os.path.join(shown, name), size=size)) as writer:
            writer.write_at(0, header)
            self.restore(
                infos,
                self.scratch,
                lambda info, start, restored: writer.write_at(
                    starts[info.name] + start * info.item_bytes, restored.view(torch.uint8).numpy().data
                ),
            )
        SafetensorsFile(str(folder / name), "read").close()  # validates the header with the library

    def _show(self, info: TensorInfo, digests: torch.Tensor) -> None:
        self.done += min(len(digests) * BLOCK * info.item_bytes, info.nbytes)
        self.progress(min(self.done, self.total), self.total, info.name)


def is_small(piece: Piece) -> bool:
    return piece.stop - piece.start < output.SMALL


def write_extra_files(patch: Patch, base: ShardedCheckpoint, folder: Path) -> list[str]:
    """Writes configuration and tokenizer; returns the files that the base's folder lacks or has with other content."""
    left_out = []
    for name, extra in patch.manifest.extra_files.items():
        content = patch.small(f"extra:{name}", extra.digest) if extra.stored else small_file(base.folder, name)
        if content is None or digest_bytes(content) != extra.digest:
            left_out.append(name)
            continue
        (folder / name).write_bytes(content)
    return left_out
