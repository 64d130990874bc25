"""Progress in bytes and GB/s: a live bar on a terminal, a plain line now and then elsewhere; on the error stream."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from opdkernels.errors import printable
from opdkernels.formatting import byte_size

PLAIN_EVERY_S = 5.0
Progress = Callable[[int, int, str], None]


@contextlib.contextmanager
def reporting(quiet: bool = False) -> Iterator[Progress]:
    """A function (bytes done, bytes in all, what is at hand) that shows how far the work is."""
    if quiet:
        yield lambda done, total, name: None
    elif sys.stderr.isatty():
        with live() as show:
            yield show
    else:
        yield plain()


@contextlib.contextmanager
def live() -> Iterator[Progress]:
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
    began = last = time.monotonic()

    def show(done: int, total: int, name: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_S:
            last = now
            speed = byte_size(done / (now - began))
            print(
                f"{byte_size(done)} of {byte_size(total)}, {speed}/s, at {printable(name)}", file=sys.stderr, flush=True
            )

    return show
