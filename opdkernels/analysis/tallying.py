"""Tallies of every matched tensor of a pair, slice by slice, on the CPU or on a GPU."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch

from opdkernels.backends.devices import CPU, empty_cache, probed_device
from opdkernels.checkpoint import streaming
from opdkernels.checkpoint.match import Match, Pair
from opdkernels.metrics.batch import SparseTally
from opdkernels.metrics.tallies import TallyRecord
from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, Tally, delta
from opdkernels.progress import Progress
from opdkernels.runs.store import ArrowStore


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
    for index, match in enumerate(pair.matches):
        known = tallies.records.get(index)
        if known is None or known.failure:
            pending.append((index, match))
        else:
            done += match.numel * streaming.pair_bytes(match)
            progress(done, total, match.name)
    limit = streaming.slice_limit(memory, device)
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
                done += match.numel * streaming.pair_bytes(match)
                progress(done, total, match.name)
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
