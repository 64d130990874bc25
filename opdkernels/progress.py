"""Progress in bytes and GB/s on the error stream: a live bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from opdkernels.errors import printable
from opdkernels.formatting import byte_size

PLAIN_INTERVAL_S = 5.0
Progress = Callable[[int, int, str], None]
"""A function of bytes done, total bytes and the name of the current tensor; some commands count steps, not bytes."""


def no_progress(done: int, total: int, name: str) -> None:
    """Shows nothing."""


@contextlib.contextmanager
def reporting(quiet: bool = False) -> Iterator[Progress]:
    """A progress function that shows nothing if quiet or without error stream, a bar on a terminal, otherwise lines."""
    if quiet or sys.stderr is None:
        yield no_progress
    elif sys.stderr.isatty():
        with live() as show:
            yield show
    else:
        yield plain()


def steps(quiet: bool = False) -> Progress:
    """A progress function that prints a line per step; nothing if quiet or without error stream."""

    def show(done: int, total: int, name: str) -> None:
        print(f"[{done + 1}/{total}] {printable(name)}", file=sys.stderr, flush=True)

    return no_progress if quiet or sys.stderr is None else show


@contextlib.contextmanager
def live() -> Iterator[Progress]:
    """A progress function that shows a bar."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.fields[name]}", markup=False, justify="left"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None, name="")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, name=printable(name)[-40:])


def plain() -> Progress:
    """A progress function that prints a line every few seconds."""
    start = last = time.monotonic()

    def show(done: int, total: int, name: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL_S:
            last = now
            speed = byte_size(done / (now - start))
            print(
                f"{byte_size(done)} of {byte_size(total)}, {speed}/s, at {printable(name)}", file=sys.stderr, flush=True
            )

    return show
