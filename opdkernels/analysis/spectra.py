"""Which matrices get spectra, in what order and memory, and the record of each; figures follow from it in geometry.py.

One matrix is one thread's work, with a BLAS of one thread inside: that is fastest, and no figure depends on how many
matrices are at work. The largest go first, and no more at a time than the memory allows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from opdkernels.analysis.matrices import TOPK, Matrix, matrices, views_of
from opdkernels.analysis.records import Record, Records
from opdkernels.checkpoint.pair import ITEM_BYTES, Pair
from opdkernels.ops.gram import change, gram, symmetric
from opdkernels.progress import Progress, amount
from opdkernels.spectral import principal
from opdkernels.spectral.exact import (
    BLOCK,
    LONG,
    NEAR_SINGULAR,
    RATIOS,
    Spectra,
    factorise,
    from_grams,
    from_matrices,
    top_ranks,
)
from opdkernels.spectral.randomized import randomized_svd

SCHEMA_VERSION = 1
SUBSPACE = ("projection", "projection_left", "projection_right", "rotation_left", "rotation_right")
ARRAYS = ("source", "trained", "delta", "bounds", "subspace", "masks", "mask_sizes")
NOTHING = np.zeros(0)


@dataclass(frozen=True)
class SpectrumRecord:
    """Spectra of one matrix in one view, or the reason why there are none.

    `source`, `trained`, `delta`: singular values; of method "topk" only the top of `delta`, with guaranteed `bounds`
    [2, top] and the share of the energy, `remainder`, that may be missing from their squares. `energy`: that of delta.
    `method`: "gram", fp64 Gram matrices; "gram_mixed", W^T delta of them in fp32 blocks; "svd"; "topk"; "" for none. `subspace` [5, ratios] as SUBSPACE names them. `masks` int64
    [ratios, subsets, counts] as in spectral.principal, `mask_sizes` [ratios, 3] their size and what they take of ties.
    """

    index: int
    part: int
    view: str
    m: int
    n: int
    method: str = ""
    reason: str = ""
    seconds: float = 0.0
    energy: float = 0.0
    remainder: float = 0.0
    source: np.ndarray = field(default_factory=lambda: NOTHING)
    trained: np.ndarray = field(default_factory=lambda: NOTHING)
    delta: np.ndarray = field(default_factory=lambda: NOTHING)
    bounds: np.ndarray = field(default_factory=lambda: NOTHING)
    subspace: np.ndarray = field(default_factory=lambda: NOTHING)
    masks: np.ndarray = field(default_factory=lambda: NOTHING.astype(np.int64))
    mask_sizes: np.ndarray = field(default_factory=lambda: NOTHING.astype(np.int64))

    @property
    def key(self) -> tuple[int, int, str]:
        return self.index, self.part, self.view


def to_table(records: list[SpectrumRecord]) -> pa.Table:
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(r, name) for r in records]) for name in ("index", "part", "view", "m", "n", "method", "reason", "seconds", "energy", "remainder")
    }
    for name in ARRAYS:
        arrays = [getattr(r, name).ravel() for r in records]
        offsets = np.concatenate(([0], np.cumsum([a.size for a in arrays])))
        columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(np.concatenate(arrays)))
    return pa.table(columns, metadata={"opdkernels_spectra": str(SCHEMA_VERSION)})


def from_table(table: pa.Table) -> Iterator[SpectrumRecord]:
    if (table.schema.metadata or {}).get(b"opdkernels_spectra") != str(SCHEMA_VERSION).encode():
        raise ValueError("written by another version of opdkernels")
    lists = {name: table[name].combine_chunks() for name in ARRAYS}
    plain = table.drop_columns(list(ARRAYS)).to_pylist()
    shapes = {"bounds": (2, -1), "subspace": (len(SUBSPACE), -1), "masks": (len(RATIOS), len(principal.SUBSETS), -1), "mask_sizes": (len(RATIOS), -1)}
    for i, row in enumerate(plain):
        arrays = {name: lists[name][i].values.to_numpy(zero_copy_only=False) for name in ARRAYS}
        yield SpectrumRecord(**row, **{name: a.reshape(shapes[name]) if name in shapes and a.size else a for name, a in arrays.items()})


def spectra(folder: Path | None) -> Records[SpectrumRecord]:
    """The spectra of a run, kept in `folder`."""
    return Records(folder, to_table, from_table)


class Memory:
    """Bytes that tasks take and give back; `take` waits until there are enough."""

    def __init__(self, limit: int):
        self.free = limit
        self.changed = threading.Condition()

    def take(self, size: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.free >= size)
            self.free -= size

    def give_back(self, size: int) -> None:
        with self.changed:
            self.free += size
            self.changed.notify_all()


def compute_all(
    pair: Pair, counted: Records[Record], spectra: Records[SpectrumRecord], limit: int, *, kind: str, both: bool, progress: Progress
) -> None:
    """Spectra of every matrix that has no record yet; one that fails is recorded and the rest goes on. kind: exact, topk."""
    waiting = []
    everything = list(matrices(pair))
    for matrix in everything:
        missing = [view for view in views_of(matrix.match, both) if not satisfies(spectra.done.get((matrix.index, matrix.part, view)), kind)]
        if missing:
            waiting.append((matrix, tuple(missing)))
    total_cost = sum(m.cost for m in everything) or 1.0
    total_bytes = sum(m.m * m.n * (ITEM_BYTES[m.match.source.dtype] + ITEM_BYTES[m.match.trained.dtype]) for m in everything)
    done = total_cost - sum(matrix.cost for matrix, _ in waiting)
    memory = Memory(limit)
    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        tasks = {
            pool.submit(examine, pair, matrix, views, counted.done[matrix.index], limit, memory, kind, both): matrix
            for matrix, views in sorted(waiting, key=lambda task: -task[0].cost)
        }
        try:
            for task in as_completed(tasks):
                for record in task.result():
                    spectra.add(record)
                done += tasks[task].cost
                progress(int(total_bytes * done / total_cost), total_bytes, tasks[task].match.name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def satisfies(record: SpectrumRecord | None, kind: str) -> bool:
    """Whether a record is what this run would make; a failure may end better this time."""
    if record is None:
        return False
    return (record.method == "topk") == (kind == "topk") if record.method else record.reason.startswith(FINAL)


UNDERFLOW = "delta is below 1e-154: fp64 does not hold its squares"
FINAL = ("delta is zero", "delta is below", "non-finite")


def examine(
    pair: Pair, matrix: Matrix, views: Iterable[str], counted: Record, limit: int, memory: Memory, kind: str, whole: bool
) -> list[SpectrumRecord]:
    """The records of one matrix. whole: principal masks also where delta is zero."""

    def without(reason: str) -> list[SpectrumRecord]:
        return [SpectrumRecord(matrix.index, matrix.part, view, matrix.m, matrix.n, reason=reason) for view in views]

    if counted.tally is None:
        return without(counted.failure or "not counted")
    if counted.tally.nonfinite:
        return without(f"non-finite: {counted.tally.nonfinite} coordinates of the tensor")
    if not whole and not counted.tally.changed("stored").any():
        return without("delta is zero")  # no need to read it
    needed = matrix.topk_memory if kind == "topk" else matrix.memory
    if needed > limit:
        least = f"pass --memory {needed // 10**6 + 1}MB" + (" or --spectra topk" if matrix.topk_memory < needed else "")
        return without(f"memory: {matrix.m} x {matrix.n} needs {amount(needed)}, {amount(limit)} are allowed; {least}")
    memory.take(needed)
    try:
        w, v = (side.view(matrix.m, matrix.n) for side in pair.read(matrix.match, matrix.start, matrix.start + matrix.m * matrix.n))
        found = []
        for view in views:
            began = time.perf_counter()
            record = top_spectrum(matrix, w, v, view) if kind == "topk" else spectrum(matrix, w, v, view, whole)
            found.append(replace(record, seconds=time.perf_counter() - began))
        return found
    except (MemoryError, RuntimeError) as error:
        return without(f"{type(error).__name__}: {error}".splitlines()[0])
    finally:
        memory.give_back(needed)


def spectrum(matrix: Matrix, w: torch.Tensor, v: torch.Tensor, view: str, whole: bool) -> SpectrumRecord:
    """The record of one view. Sums in fp32 are made again in fp64 where W is near to singular."""
    visible = view == "visible"
    tall = matrix.m >= matrix.n
    long_w, long_v = (w, v) if tall else (w.T, v.T)
    wide = torch.float64 in (w.dtype, v.dtype)
    long = max(matrix.m, matrix.n)
    block = BLOCK if long >= LONG * matrix.short and (visible or not wide) else 0
    grams = symmetric(gram(long_w, long_v, visible=visible, block=block))
    empty = SpectrumRecord(matrix.index, matrix.part, view, matrix.m, matrix.n, reason="delta is zero")
    moved = bool(grams[2].diagonal().sum())
    if not moved and change(w, v, visible)[1].any():
        return replace(empty, reason=UNDERFLOW)
    if not moved and not whole:
        return empty
    ranks = top_ranks(matrix.short)
    source = factorise(grams[0], ranks[-1])
    if block and float(source.sigma[-1]) <= NEAR_SINGULAR * float(source.sigma[0]):
        block, grams = 0, symmetric(gram(long_w, long_v, visible=visible))
    found = from_grams(grams, tall=tall, source=source) if moved else None
    if moved and found is None:
        found = from_matrices(*change(w, v, visible))
    basis = found.basis if found is not None else source.vectors
    masks = principal.overlaps(long_w, long_v, basis, ranks, visible=visible)
    method = "svd" if found is not None and found.method == "svd" else "gram_mixed" if block else "gram"
    return filled(empty, found, masks, method)


def top_spectrum(matrix: Matrix, w: torch.Tensor, v: torch.Tensor, view: str) -> SpectrumRecord:
    """The record of one view with the top of delta's spectrum alone, by block Krylov."""
    empty = SpectrumRecord(matrix.index, matrix.part, view, matrix.m, matrix.n, reason="delta is zero")
    delta = change(w, v, view == "visible")[1]
    found = randomized_svd(delta, min(TOPK, matrix.short), names=[f"{matrix.match.name} {matrix.part}"])
    assert not isinstance(found, list)
    if not found.frobenius**2:
        return empty if not found.frobenius else replace(empty, reason=UNDERFLOW)
    return replace(
        empty, method="topk", reason="", energy=found.frobenius**2, remainder=found.remainder, delta=found.sigma.numpy(),
        bounds=torch.stack([found.lower, found.upper]).numpy(),
    )  # fmt: skip


def filled(empty: SpectrumRecord, found: Spectra | None, masks: list[principal.Overlaps], method: str) -> SpectrumRecord:
    content: dict[str, Any] = {
        "masks": np.stack([one.counts for one in masks]),
        "mask_sizes": np.array([[one.size, one.taken, one.low_taken] for one in masks], np.int64),
    }
    if found is not None:
        content |= {name: getattr(found, name).numpy() for name in ("source", "trained", "delta")}
        content["subspace"] = np.stack([getattr(found, name).numpy() for name in SUBSPACE])
        return replace(empty, method=method, reason="", energy=float(found.delta.square().sum()), **content)
    return replace(empty, **content)
