"""Slices of matched tensors, one after another, on the device where they are counted: the CPU or a GPU.

On the CPU a slice is used as it is read. For a GPU, `opdkernels.backends.staging` reads the next slice and copies it to
the device while the current one is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from opdkernels.backends.staging import stage_to_device
from opdkernels.checkpoint.match import ITEM_BYTES, Match, Pair

MAX_SLICE = 1 << 26  # coordinates: a tenth of a second, so that progress is shown
MIN_SLICE = 1 << 16  # coordinates
MAX_SLICE_BYTES = 1 << 27  # on a GPU: enough to copy at full speed
MIN_SLICE_BYTES = 1 << 20  # on a GPU: with less memory, give up
TensorPair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Slice:
    """Elements [begin, end) of the match at `index`."""

    index: int
    match: Match
    begin: int
    end: int


def pair_bytes(match: Match) -> int:
    """Bytes per coordinate of both tensors."""
    return ITEM_BYTES[match.base.dtype] + ITEM_BYTES[match.trained.dtype]


def split_matches(matches: Sequence[tuple[int, Match]], max_bytes: int) -> Iterator[Slice]:
    """The matches in slices of at most `max_bytes`, but at least MIN_SLICE coordinates; one slice per empty match."""
    for index, match in matches:
        step = max(MIN_SLICE, min(MAX_SLICE, max_bytes // pair_bytes(match)))
        for begin in range(0, max(match.numel, 1), step):
            yield Slice(index, match, begin, min(match.numel, begin + step))


def read_slices(pair: Pair, slices: Iterable[Slice]) -> Iterator[tuple[Slice, Callable[[], TensorPair]]]:
    """Each slice, and a call that reads it on the CPU and raises what fails."""
    for item in slices:
        yield item, lambda item=item: pair.read(item.match, item.begin, item.end)  # type: ignore[misc]


def stage_slices(
    pair: Pair, slices: Iterable[Slice], max_bytes: int, device: torch.device
) -> Iterator[tuple[Slice, Callable[[], TensorPair]]]:
    """As `read_slices`, on a device, for slices of at most `max_bytes`; the tensors are valid until the next slice."""
    staged = stage_to_device(slices, lambda item: pair.read(item.match, item.begin, item.end), max_bytes, 2, device)
    return cast(Iterator[tuple[Slice, Callable[[], TensorPair]]], staged)


def stream_slices(
    pair: Pair, matches: Sequence[tuple[int, Match]], max_bytes: int, device: torch.device
) -> Iterator[tuple[Slice, Callable[[], TensorPair]]]:
    """Stream the slices of matches to a device.

    Args:
        pair: The open pair of checkpoints.
        matches: The matches, each with its index.
        max_bytes: The most bytes of a slice.
        device: Where the tensors are needed.

    Yields:
        Each slice, and a call that returns its two tensors on the device and raises what reading them raises; the
        tensors are valid until the next slice.
    """
    slices = split_matches(matches, max_bytes)
    if device.type == "cpu":
        return read_slices(pair, slices)
    return stage_slices(pair, slices, max(max_bytes, min_slice_bytes(matches)), device)


def min_slice_bytes(matches: Sequence[tuple[int, Match]]) -> int:
    """Bytes of the smallest slices that `split_matches` makes of these matches."""
    return max((MIN_SLICE * pair_bytes(match) for _, match in matches), default=0)


def slice_limit(memory: int, device: torch.device) -> int:
    """The most bytes of a slice: half the memory on the CPU; on a GPU two buffers and the read data take that half."""
    return memory // 2 if device.type == "cpu" else min(MAX_SLICE_BYTES, memory // 6)
