"""Which spectra are computed, in what order, and within what memory; for one run or for several runs of one base.

One matrix is the work of one thread with single-threaded BLAS: that is fastest, and no result depends on the number of
matrices in progress. The largest matrices go first, as many at a time as the memory allows. What depends only on W is
computed once for all runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

import torch

from opdkernels.analysis.matrices import Matrix, matrices, views_of
from opdkernels.analysis.matrix_spectra import BaseFactors, SpectraConfig, matrix_spectra
from opdkernels.backends import lapack
from opdkernels.checkpoint.match import ITEM_BYTES, Pair
from opdkernels.formatting import byte_size
from opdkernels.metrics.similarity import Similarity, Vectors, similarity_to_last
from opdkernels.metrics.spectra import FINAL, SpectrumRecord
from opdkernels.metrics.tallies import TallyRecord
from opdkernels.progress import Progress
from opdkernels.runs.store import ArrowStore


@dataclass(frozen=True)
class TallyStatus:
    """What the tally of a tensor says about its spectra: why there is no tally, the number of non-finite coordinates,
    and whether any stored coordinate changed."""

    failure: str
    nonfinite: int
    changed: bool

    @classmethod
    def of(cls, record: TallyRecord) -> TallyStatus:
        tally = record.tally
        if tally is None:
            return cls(record.failure or "not counted", 0, False)
        return cls("", tally.nonfinite, bool(tally.changed("stored").any()))


def tally_statuses(tallies: ArrowStore[TallyRecord]) -> dict[int, TallyStatus]:
    """By the index of the tensor in the pair."""
    return {index: TallyStatus.of(record) for index, record in tallies.records.items()}


@dataclass(frozen=True)
class RunJob:
    """One run: its checkpoint with the base, the status of each tensor's tally by index, and the spectra known so
    far."""

    pair: Pair
    statuses: dict[int, TallyStatus]
    spectra: ArrowStore[SpectrumRecord]


@dataclass(frozen=True)
class MatrixJob:
    """One matrix of one run, and the views of it that have no record yet."""

    run: RunJob
    matrix: Matrix
    views: tuple[str, ...]


@dataclass(frozen=True)
class MatrixTask:
    """One matrix of the base in every run that has it. similarity: whether the similarity of the updates to the last
    one is also missing."""

    jobs: list[MatrixJob]
    similarity: bool

    @property
    def matrix(self) -> Matrix:
        return self.jobs[-1].matrix

    @property
    def cost(self) -> float:
        return sum(job.matrix.cost for job in self.jobs if job.views or self.similarity)


class MemoryBudget:
    """Bytes that tasks reserve and release; `reserve` blocks until enough are free."""

    def __init__(self, limit: int):
        self.free = limit
        self.released = threading.Condition()

    def reserve(self, size: int) -> None:
        with self.released:
            self.released.wait_for(lambda: self.free >= size)
            self.free -= size

    def release(self, size: int) -> None:
        with self.released:
            self.free += size
            self.released.notify_all()


def compute_spectra(
    runs: Sequence[RunJob],
    config: SpectraConfig,
    progress: Progress,
    similarities: ArrowStore[Similarity] | None = None,
    run_id: str = "",
) -> None:
    """Computes the spectra of every matrix that has no record yet. A matrix that fails is recorded with its reason.

    Args:
        runs: The runs, whose `spectra` receive the records.
        config: How spectra are computed.
        progress: Called with bytes done, total bytes and the name of the tensor.
        similarities: Receives the similarity of each run's update to the last run's, for matrices that all runs have.
        run_id: Names the runs in the similarity records.
    """
    tasks = plan(runs, config, similarities, run_id)
    all_matrices = [matrix for run in runs for matrix in matrices(run.pair)]
    total_cost = sum(matrix.cost for matrix in all_matrices) or 1.0
    total_bytes = sum(matrix_bytes(matrix) for matrix in all_matrices)
    done = total_cost - sum(task.cost for task in tasks)
    memory = MemoryBudget(config.memory)
    num_workers = torch.get_num_threads()
    with (
        lapack.ONE_THREAD,
        ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        pending = {
            pool.submit(process_matrix, task, config, memory): task
            for task in sorted(tasks, key=lambda task: -task.cost)
        }
        try:
            for future in as_completed(list(pending)):
                task, (records, similarity) = pending.pop(future), future.result()
                for job, record in records:
                    job.run.spectra.add(record)
                if similarities is not None and similarity is not None:
                    similarities.add(replace(similarity, run=run_id))
                done += task.cost
                progress(int(total_bytes * done / total_cost), total_bytes, task.matrix.match.name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def matrix_bytes(matrix: Matrix) -> int:
    """Bytes of the matrix in both checkpoints."""
    return matrix.m * matrix.n * (ITEM_BYTES[matrix.match.base.dtype] + ITEM_BYTES[matrix.match.trained.dtype])


def plan(
    runs: Sequence[RunJob], config: SpectraConfig, similarities: ArrowStore[Similarity] | None, run_id: str
) -> list[MatrixTask]:
    """The tasks that are left to do, one per matrix of the base."""
    jobs_by_matrix: dict[tuple, list[MatrixJob]] = {}
    for run in runs:
        for matrix in matrices(run.pair):
            missing = (
                view
                for view in views_of(matrix.match, config.both_views)
                if not is_up_to_date(run.spectra.records.get((matrix.index, matrix.part, view)), config)
            )
            elements = (matrix.match.base.name, matrix.match.base_start + matrix.start, matrix.m, matrix.n)
            jobs_by_matrix.setdefault(elements, []).append(MatrixJob(run, matrix, tuple(missing)))
    tasks = []
    for jobs in jobs_by_matrix.values():
        last = jobs[-1].matrix
        known = similarities.records.get((last.index, last.part)) if similarities is not None else None
        similarity = similarities is not None and len(jobs) == len(runs) and (known is None or known.run != run_id)
        if similarity or any(job.views for job in jobs):
            tasks.append(MatrixTask(jobs, similarity))
    return tasks


def is_up_to_date(record: SpectrumRecord | None, config: SpectraConfig) -> bool:
    """Whether a record is what this run would compute. Failures that may not recur are computed again."""
    if record is None:
        return False
    if record.method:
        return (record.method == "topk") == (config.kind == "topk")
    needs_masks = config.both_views and config.kind == "exact" and record.reason == "delta is zero"
    return record.reason.startswith(FINAL) and not (needs_masks and not record.masks.size)


def process_matrix(
    task: MatrixTask, config: SpectraConfig, memory: MemoryBudget
) -> tuple[list[tuple[MatrixJob, SpectrumRecord]], Similarity | None]:
    """The missing records of one matrix in every run, and the similarity of the updates to the last, if missing."""
    matrix = task.matrix
    records: list[tuple[MatrixJob, SpectrumRecord]] = []
    tops: list[Vectors | None] = []
    needed = matrix.topk_memory if config.kind == "topk" else matrix.memory
    fits = needed <= config.memory
    shared: dict[bool, BaseFactors] = {}
    if fits:
        memory.reserve(needed)
    try:
        for job in task.jobs:
            reason = skip_reason(job, config) or ("" if fits else memory_reason(job.matrix, config, needed))
            computed: list[SpectrumRecord] = []
            top: Vectors | None = None
            if not reason:
                try:
                    computed, top = matrix_spectra(job.run.pair, job.matrix, job.views, config, shared, task.similarity)
                except (MemoryError, RuntimeError) as error:
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if reason:
                computed = [failed_record(job.matrix, view, reason) for view in job.views]
            records += [(job, record) for record in computed]
            tops.append(top)
    finally:
        if fits:
            trim_heap()
            memory.release(needed)
    if not task.similarity:
        return records, None
    left, right = similarity_to_last(tops)
    return records, Similarity(matrix.index, matrix.part, matrix.m, matrix.n, "", left, right)


def failed_record(matrix: Matrix, view: str, reason: str) -> SpectrumRecord:
    return SpectrumRecord(matrix.index, matrix.part, view, matrix.m, matrix.n, reason=reason)


def skip_reason(job: MatrixJob, config: SpectraConfig) -> str:
    """Why a matrix has no spectra, as far as its tally shows without reading the matrix; "" if it may have."""
    status = job.run.statuses[job.matrix.index]
    if status.nonfinite:
        return f"non-finite: {status.nonfinite} coordinates of the tensor"
    return status.failure or ("" if config.both_views or status.changed else "delta is zero")


def memory_reason(matrix: Matrix, config: SpectraConfig, needed: int) -> str:
    """Why a matrix does not fit, and the options that help."""
    remedy = f"pass --memory {needed // 10**6 + 1}MB" + (" or --spectra topk" if matrix.topk_memory < needed else "")
    size = f"{matrix.m} x {matrix.n} needs {byte_size(needed)}, {byte_size(config.memory)} are allowed"
    return f"memory: {size}; {remedy}"


malloc_trim: Any = None
with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
    malloc_trim = ctypes.CDLL(None).malloc_trim


def trim_heap() -> None:
    """Returns freed memory to the system: between matrices of many sizes glibc would keep gigabytes of fragments."""
    if malloc_trim is not None:
        malloc_trim(0)
