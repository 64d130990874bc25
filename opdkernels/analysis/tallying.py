"""Tallies of every matched tensor of a pair, slice by slice, on the CPU or on a GPU."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from opdkernels.backends.devices import CPU, empty_cache, probed_device
from opdkernels.checkpoint import streaming
from opdkernels.checkpoint.match import Match, Pair
from opdkernels.metrics.tallies import TallyRecord
from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, Tally, delta
from opdkernels.ops.delta.many import SparseTally, delta_many
from opdkernels.progress import Progress
from opdkernels.runs.store import ArrowStore

SMALL, SMALL_BATCH = 1 << 16, 128  # coordinates of a tensor that is tallied with others in one call, and how many


def probe_device(name: str) -> torch.device:
    """The device of a name, after `delta` has run on it. Raises InputError if it cannot, for example because the
    driver is too old for the kernels: otherwise every tensor would fail."""

    def run_delta(device: torch.device) -> None:
        delta(*(torch.zeros(1, dtype=torch.bfloat16, device=device) for _ in range(2)))

    return probed_device(name, run_delta)


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Sets the number of torch's threads and restores it; None keeps the current number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def slices(numel: int, bytes_per_element: int, memory: int) -> Iterator[tuple[int, int]]:
    """Bounds of slices of a tensor whose buffers for all checkpoints take at most half the memory."""
    step = max(1 << 16, min(streaming.MAX_SLICE, memory // 2 // bytes_per_element))
    for begin in range(0, numel, step):
        yield begin, min(numel, begin + step)


def small_batches(matches: Sequence[tuple[int, Match]], max_bytes: int) -> Iterator[list[tuple[int, Match]]]:
    """Matches in batches of at most SMALL_BATCH and `max_bytes`, but at least one."""
    batch: list[tuple[int, Match]] = []
    nbytes = 0
    for index, match in matches:
        size = match.numel * streaming.pair_bytes(match)
        if batch and (len(batch) == SMALL_BATCH or nbytes + size > max_bytes):
            yield batch
            batch, nbytes = [], 0
        batch.append((index, match))
        nbytes += size
    if batch:
        yield batch


def tally_small(
    pair: Pair,
    matches: Sequence[tuple[int, Match]],
    tallies: ArrowStore[TallyRecord],
    max_bytes: int,
    done: Callable[[Match], None],
) -> list[tuple[int, Match]]:
    """Tallies small matches on the CPU, many in one call: what a call costs would exceed their coordinates.

    Args:
        pair: The matched checkpoints.
        matches: The matches, each with its index.
        tallies: Receives one record per match.
        max_bytes: Bytes of the tensors of a call.
        done: Called with each match that is tallied.

    Returns:
        The matches that failed, and those in one batch with them.
    """
    failed = []
    for batch in small_batches(matches, max_bytes):
        try:
            sides = [[side.clone() for side in pair.read(match, 0, match.numel)] for _, match in batch]
            counted = delta_many([base for base, _ in sides], [trained for _, trained in sides])
        except (MemoryError, RuntimeError):
            failed += batch
            continue
        for (index, match), tally in zip(batch, counted, strict=True):
            tallies.add(tally_record(index, match, tally, ""))
            done(match)
    return failed


def tally_all(
    pair: Pair, tallies: ArrowStore[TallyRecord], memory: int, progress: Progress, device: torch.device = CPU
) -> None:
    """Tallies every match that has no record yet.

    A tensor that fails is recorded with its reason. If the device runs out of memory, the tensor is tallied again in
    smaller slices; it fails only if the smallest slices do not fit either.

    Args:
        pair: The matched checkpoints.
        tallies: Receives one record per match.
        memory: Bytes for the buffers of slices.
        progress: Called with bytes done, total bytes and the name of the tensor.
        device: Where the coordinates are counted; the counts are bit-identical on every device.
    """
    tally, done, total = Tally.empty(DEFAULT_THRESHOLD_BITS), 0, pair.nbytes
    pending: list[tuple[int, Match]] = []

    def count_done(match: Match) -> None:
        nonlocal done
        done += match.numel * streaming.pair_bytes(match)
        progress(done, total, match.name)

    for index, match in enumerate(pair.matches):
        known = tallies.records.get(index)
        if known is None or known.failure:
            pending.append((index, match))
        else:
            count_done(match)
    limit = streaming.slice_limit(memory, device)
    if device.type == "cpu":
        small = [(index, match) for index, match in pending if match.numel <= SMALL]
        pending = [(index, match) for index, match in pending if match.numel > SMALL]
        pending += tally_small(pair, small, tallies, limit, count_done)
    while pending:
        with contextlib.closing(streaming.stream_slices(pair, tuple(pending), limit, device)) as stream:  # type: ignore[type-var]
            for index, group in itertools.groupby(stream, key=lambda item: item[0].index):
                match = pending[0][1]
                tally.reset()
                failure = ""
                try:
                    for piece, read_sides in group:
                        delta(*read_sides(), out=tally)
                        progress(done + piece.end * streaming.pair_bytes(match), total, match.name)
                except (MemoryError, RuntimeError) as error:
                    if isinstance(error, torch.OutOfMemoryError) and limit > streaming.MIN_SLICE_BYTES:
                        break
                    failure = f"{type(error).__name__}: {error}".splitlines()[0]
                tallies.add(tally_record(index, match, None if failure else SparseTally.of(tally), failure))
                count_done(match)
                pending.pop(0)
        if pending:
            limit = max(limit // 4, streaming.MIN_SLICE_BYTES)
            empty_cache(device)


def tally_record(index: int, match: Match, tally: SparseTally | None, failure: str) -> TallyRecord:
    return TallyRecord(
        index,
        match.name,
        match.trained_name,
        match.shape,
        match.base.dtype,
        match.trained.dtype,
        match.match_kind,
        tally,
        failure,
    )
