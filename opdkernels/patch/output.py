"""Output files written by a background thread, and worker threads for segments."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from opdkernels.files import write_early

SMALL = 1 << 16  # items: processing fewer is faster than passing them to another thread
MOST_WORKERS = 8  # more threads do not increase memory bandwidth, and each holds one or two segments

T = TypeVar("T")
R = TypeVar("R")


class Writer:
    """A file that one thread writes in the order of the calls, or several threads write at given offsets.

    A disk error in the thread is raised by a later call, or at the end.

    Args:
        path: File to write, new or empty.
        shown: Name of the file in errors.
        depth: Maximum number of pending calls.
        size: Bytes of disk space to reserve.
    """

    def __init__(self, path: Path, shown: str, depth: int = 1, size: int = 0) -> None:
        self.shown, self.depth = shown, depth
        self._file = io.FileIO(path, "w")
        self._pending: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1)
        try:
            self._reserve(size)
        except BaseException:
            self.close()
            raise

    def __call__(self, parts: Iterable[Any], small: bool = False) -> None:
        """Queues the parts; writes small ones immediately if nothing is pending."""
        while self._pending and (len(self._pending) >= self.depth or self._pending[0].done()):
            self._pending.popleft().result()
        if small and not self._pending:
            self._write(parts)
        else:
            self._pending.append(self._thread.submit(self._write, parts))

    def _write(self, parts: Iterable[Any]) -> None:
        for part in parts:
            view = memoryview(part).cast("B")
            while view:
                with self._named():
                    view = view[self._file.write(view) or 0 :]

    def write_at(self, offset: int, content: Any) -> None:
        """Writes content at an offset, in the thread that calls."""
        view, start = memoryview(content).cast("B"), offset
        while view:
            with self._named():
                written = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[written:], offset + written
        write_early(self._file.fileno(), start, offset - start)

    def _reserve(self, size: int) -> None:
        """Allocates `size` bytes: a full disk is reported before writing, and allocated space is written faster."""
        if not size or not hasattr(os, "posix_fallocate"):
            return
        try:
            with self._named():
                os.posix_fallocate(self._file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # not supported by the file system
                raise

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
        """Overwrites the first bytes of the file."""
        self.finish()
        self._file.seek(0)
        self._write([content])

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._file.close()


class Workers:
    """Threads that compute segments before they are used; each runs single-threaded kernels."""

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        count = min(self._threads, MOST_WORKERS)
        self.depth = count + 1
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def map_ahead(
        self, function: Callable[[T], R], items: Iterable[T], small: Callable[[T], bool]
    ) -> Generator[R, None, None]:
        """Yields `function(item)` in order, computed while earlier results are used; small items on demand.

        When it is closed, or raises, no call is running any more.
        """
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                if small(item) and not pending:
                    yield function(item)
                    continue
                pending.append(self._pool.submit(function, item))
                while pending and (len(pending) >= self.depth or pending[0].done()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            wait([future for future in pending if not future.cancel()])

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # the pool's setting also applies to new threads


class Ring(Generic[T]):
    """Memory by item width: when it is returned again, `Workers` and a `Writer` of that depth are done with it."""

    def __init__(self, depth: int, make: Callable[[int], T]) -> None:
        self._count, self._make = 2 * depth + 1, make
        self._buffers: dict[int, deque[T]] = {}

    def next(self, width: int) -> T:
        """Returns memory for items of `width` bytes."""
        buffers = self._buffers.setdefault(width, deque())
        buffer = self._make(width) if len(buffers) < self._count else buffers.popleft()
        buffers.append(buffer)
        return buffer
