"""Files written behind the work, and under temporary names until they are whole."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from opdkernels.errors import InputError, printable
from opdkernels.ops.patch import BITS
from opdkernels.patch.segments import SEGMENT

DEPTH = 3  # segments in flight: one being made, one waiting, one being written

T = TypeVar("T")
R = TypeVar("R")


class Writer:
    """A new file, written by one thread in the order of the calls; `size` reserves its room on the disk.

    An error of the disk is raised, with the name `shown`, by a later call or at the end.
    """

    def __init__(self, path: Path, shown: str, size: int = 0) -> None:
        self.shown = shown
        self._file = io.FileIO(path, "x")
        self._pending: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1)
        if size and hasattr(os, "posix_fallocate"):
            with self._named():
                os.posix_fallocate(self._file.fileno(), 0, size)

    def __call__(self, parts: Callable[[], Iterable[Any]]) -> None:
        """Writes what `parts` returns, when its turn comes; at most DEPTH - 1 calls wait, so that memory can be used again."""
        while len(self._pending) >= DEPTH - 1:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._write, parts))

    def _write(self, parts: Callable[[], Iterable[Any]]) -> None:
        for part in parts():
            view = memoryview(part).cast("B")
            while view:
                with self._named():
                    view = view[self._file.write(view) or 0 :]

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.shown) from None

    def finish(self) -> None:
        """Waits until everything is written."""
        while self._pending:
            self._pending.popleft().result()

    def rewrite(self, content: bytes) -> None:
        """Writes over the first bytes of the file."""
        self.finish()
        self._file.seek(0)
        self._write(lambda: [content])

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._file.close()


class Rooms:
    """Memory for segments in turn: when one comes round again, a Writer is done with it."""

    def __init__(self) -> None:
        self._rooms: dict[int, list[torch.Tensor]] = {}
        self._turn = 0

    def next(self, width: int) -> torch.Tensor:
        """Room for a segment of items of `width` bytes."""
        rooms = self._rooms.setdefault(width, [torch.empty(SEGMENT, dtype=BITS[width]) for _ in range(DEPTH)])
        self._turn += 1
        return rooms[self._turn % DEPTH]


@contextlib.contextmanager
def coders() -> Iterator[Callable[[Callable[[], T]], Future[T]]]:
    """Runs functions side by side, each with kernels of one thread."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool.submit
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the pool's setting is also that of threads to come


def ahead(submit: Callable[[Callable[[], R]], Future[R]], function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`function` of each item, in order, worked on while the one before is used."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(submit(lambda item=item: function(item)))  # type: ignore[misc]
        if len(pending) >= DEPTH:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextlib.contextmanager
def new_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its name if all goes well and is gone if not."""
    if os.path.lexists(path) and not (overwrite and path.is_file()):
        raise InputError(f"{printable(str(path))} exists; choose another name" + (", or pass --overwrite" if not path.is_dir() else ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its name if all goes well and is gone if not."""
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{printable(str(path))} exists and is not an empty folder; choose another one")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
