"""Slices of matched tensors, one after another, where they are to be counted: on the CPU as they were read, or on a GPU.

For a GPU a thread reads the next slice into pinned memory and has it copied to the device while the one before is counted: two
slots, each of host and device memory, in turn. The core knows no GPU, so that all but pinning and streams runs on any machine.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from opdkernels.checkpoint.match import ITEM_BYTES, Match, Pair

SLOTS = 2
LARGEST_SLICE = 1 << 26  # coordinates: a tenth of a second, so that progress moves
LARGEST_SLOT, LEAST_SLOT = 1 << 27, 1 << 20  # bytes: long enough to copy at full speed; too little to go on with
ALIGNED = 64  # bytes
Sides = tuple[torch.Tensor, torch.Tensor]
Item = TypeVar("Item")
Ready = TypeVar("Ready")


@dataclass(frozen=True)
class Slice:
    """Elements [begin, end) of the match at `index`."""

    index: int
    match: Match
    begin: int
    end: int


def pair_bytes(match: Match) -> int:
    """Bytes of a coordinate on both sides."""
    return ITEM_BYTES[match.base.dtype] + ITEM_BYTES[match.trained.dtype]


def cut(matches: Sequence[tuple[int, Match]], limit: int) -> Iterator[Slice]:
    """The matches in slices of at most `limit` bytes on both sides, and at least one each."""
    for index, match in matches:
        step = max(1 << 16, min(LARGEST_SLICE, limit // pair_bytes(match)))
        for begin in range(0, max(match.numel, 1), step):
            yield Slice(index, match, begin, min(match.numel, begin + step))


def read(pair: Pair, slices: Iterable[Slice]) -> Iterator[tuple[Slice, Callable[[], Sides]]]:
    """Each slice and a call that reads it, which raises what goes wrong; valid until the next."""
    for one in slices:
        yield one, lambda one=one: pair.read(one.match, one.begin, one.end)  # type: ignore[misc]


def ahead(items: Iterable[Item], load: Callable[[Item, int], Ready]) -> Iterator[tuple[Item, Callable[[], Ready]]]:
    """Each item and a call that waits for `load(item, slot)` and raises what it raised. The next is loaded meanwhile, by one
    thread; a slot is used again once its item is let go."""
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        waiting: deque = deque()
        try:
            for number, item in enumerate(items):
                waiting.append((item, pool.submit(load, item, number % SLOTS)))
                if len(waiting) == SLOTS:
                    first, future = waiting.popleft()
                    yield first, future.result
            for last, future in waiting:
                yield last, future.result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Slot:
    """Memory for one slice of both sides, on the host and on a device, and when each may be used again."""

    def __init__(self, nbytes: int, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.on_gpu)
        self.near = torch.empty(nbytes, dtype=torch.uint8, device=device) if self.on_gpu else self.host
        self.copied: Any = torch.cuda.Event() if self.on_gpu else None
        self.counted: Any = torch.cuda.Event() if self.on_gpu else None

    def fill(self, sides: Sides, stream: Any) -> Sides:
        """The sides on the device, once the stream has copied them."""
        if self.on_gpu:
            self.copied.synchronize()  # what was here before has left
        found, start = [], 0
        for side in sides:
            self.host[start : start + side.nbytes].view(side.dtype).copy_(side)
            found.append(self.near[start : start + side.nbytes].view(side.dtype))
            start += -(-side.nbytes // ALIGNED) * ALIGNED
        if self.on_gpu:
            stream.wait_event(self.counted)
            with torch.cuda.stream(stream):
                self.near[:start].copy_(self.host[:start], non_blocking=True)
                self.copied.record(stream)
        return found[0], found[1]

    def take(self) -> None:
        """What the current stream does next waits for the copy."""
        if self.on_gpu:
            torch.cuda.current_stream(self.device).wait_event(self.copied)

    def let_go(self) -> None:
        """The next copy waits for what the current stream has been given."""
        if self.on_gpu:
            self.counted.record(torch.cuda.current_stream(self.device))


def staged(
    pair: Pair, slices: Iterable[Slice], nbytes: int, device: torch.device
) -> Iterator[tuple[Slice, Callable[[], Sides]]]:
    """As `read`, on the device, for slices of at most nbytes."""
    on_gpu = device.type == "cuda"
    stream: Any = torch.cuda.Stream(device) if on_gpu else None
    slots: dict[int, Slot] = {}

    def load(one: Slice, number: int) -> tuple[Slot, Sides]:
        with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            if number not in slots:
                slots[number] = Slot(nbytes + 2 * ALIGNED, device)
            slot = slots[number]
            return slot, slot.fill(pair.read(one.match, one.begin, one.end), stream)

    with contextlib.closing(ahead(slices, load)) as flow:  # type: ignore[type-var]
        for one, loaded in flow:
            taken: list[Slot] = []

            def sides(loaded: Callable[[], tuple[Slot, Sides]] = loaded, taken: list[Slot] = taken) -> Sides:
                slot, found = loaded()
                taken.append(slot)
                slot.take()
                return found

            yield one, sides
            for slot in taken:
                slot.let_go()


def feed(
    pair: Pair, matches: Sequence[tuple[int, Match]], limit: int, device: torch.device
) -> Iterator[tuple[Slice, Callable[[], Sides]]]:
    """The slices of the matches on a device; `limit` is the most bytes of one."""
    slices = cut(matches, limit)
    return read(pair, slices) if device.type == "cpu" else staged(pair, slices, max(limit, least(matches)), device)


def least(matches: Sequence[tuple[int, Match]]) -> int:
    """Bytes of the least slice that `cut` makes."""
    return max(((1 << 16) * pair_bytes(match) for _, match in matches), default=0)


def slice_limit(memory: int, device: torch.device) -> int:
    """Most bytes of a slice: half the memory on the CPU; of a GPU two slots, and what is read, take that half."""
    return memory // 2 if device.type == "cpu" else min(LARGEST_SLOT, memory // 6)
