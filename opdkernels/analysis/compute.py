"""Spectra of every matrix, of one run or of several from one source: in what order and memory they are made.

One matrix is one thread's work, with a BLAS of one thread inside: that is fastest, and no figure depends on how many
matrices are at work. The largest go first, and no more at a time than the memory allows. What depends on W alone is made
once for all runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

import torch

from opdkernels.analysis.factors import Factors
from opdkernels.analysis.matrices import TOPK, Matrix, matrices, views_of
from opdkernels.checkpoint.match import ITEM_BYTES, Pair
from opdkernels.formatting import byte_size
from opdkernels.metrics.similarity import DEFICIENT, TOP, Similarity, Vectors, to_the_last
from opdkernels.metrics.spectra import FINAL, SUBSPACE, UNDERFLOW, SpectrumRecord
from opdkernels.metrics.tallies import TallyRecord
from opdkernels.ops.delta import base_and_delta
from opdkernels.ops.gram import gram, symmetric
from opdkernels.progress import Progress
from opdkernels.runs.store import ArrowStore
from opdkernels.spectral import principal
from opdkernels.spectral.exact import (
    BLOCK,
    GRAM_LIMIT,
    LARGE,
    LONG,
    NEAR_SINGULAR,
    Factor,
    Spectra,
    compressed,
    factorise,
    factorise_matrix,
    from_grams,
    from_matrices,
    top_ranks,
)
from opdkernels.spectral.randomized import randomized_svd

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Facts:
    """What spectra need to know of a tensor's tally: why there is none, non-finite coordinates, whether any moved."""

    failure: str
    nonfinite: int
    moved: bool

    @classmethod
    def of(cls, record: TallyRecord) -> Facts:
        tally = record.tally
        return (
            cls("", tally.nonfinite, bool(tally.changed("stored").any()))
            if tally is not None
            else cls(record.failure or "not counted", 0, False)
        )


@dataclass(frozen=True)
class Job:
    """A run: its checkpoint beside the source, what was counted of each match, and the spectra known so far."""

    pair: Pair
    facts: dict[int, Facts]
    spectra: ArrowStore[SpectrumRecord]


@dataclass(frozen=True)
class Rules:
    """kind: "exact" or "topk". limit: bytes for all matrices at work. both: both views of bf16 too, and principal masks also
    where delta is zero. similar: the top directions of each update are made too. factors: where factorisations of W are kept.
    device: where Gram matrices and their eigenproblems are made; masks are made on the CPU."""

    kind: str
    limit: int
    both: bool = False
    similar: bool = False
    factors: Factors | None = None
    device: torch.device = CPU


@dataclass(frozen=True)
class Work:
    """One matrix of one run, and the views of it that have no record yet."""

    job: Job
    matrix: Matrix
    views: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One matrix of the source in every run that has it; `similar`: how like the last its updates are is wanted too."""

    works: list[Work]
    similar: bool

    @property
    def matrix(self) -> Matrix:
        return self.works[-1].matrix

    @property
    def cost(self) -> float:
        return sum(work.matrix.cost for work in self.works if work.views or self.similar)


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
    jobs: Sequence[Job],
    rules: Rules,
    progress: Progress,
    similarities: ArrowStore[Similarity] | None = None,
    run: str = "",
) -> None:
    """Spectra of every matrix that has no record yet; one that fails is recorded and the rest goes on.

    similarities: where those of the jobs' updates to the last job's go, for matrices that all jobs have; `run` names the jobs.
    """
    tasks = plan(jobs, rules, similarities, run)
    every = [matrix for job in jobs for matrix in matrices(job.pair)]
    total_cost = sum(m.cost for m in every) or 1.0
    total_bytes = sum(m.m * m.n * (ITEM_BYTES[m.match.base.dtype] + ITEM_BYTES[m.match.trained.dtype]) for m in every)
    done = total_cost - sum(task.cost for task in tasks)
    memory = Memory(rules.limit)
    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = {
            pool.submit(examine, task, rules, memory): task for task in sorted(tasks, key=lambda task: -task.cost)
        }
        try:
            for ended in as_completed(list(waiting)):
                task, (found, alike) = waiting.pop(ended), ended.result()
                for work, record in found:
                    work.job.spectra.add(record)
                if similarities is not None and alike is not None:
                    similarities.add(replace(alike, run=run))
                done += task.cost
                progress(int(total_bytes * done / total_cost), total_bytes, task.matrix.match.name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def plan(jobs: Sequence[Job], rules: Rules, similarities: ArrowStore[Similarity] | None, run: str) -> list[Task]:
    """What is left to do, matrix by matrix of the source."""
    by_place: dict[tuple, list[Work]] = {}
    for job in jobs:
        for matrix in matrices(job.pair):
            views = views_of(matrix.match, rules.both)
            missing = (
                view
                for view in views
                if not satisfies(job.spectra.records.get((matrix.index, matrix.part, view)), rules)
            )
            place = (matrix.match.base.name, matrix.match.base_start + matrix.start, matrix.m, matrix.n)
            by_place.setdefault(place, []).append(Work(job, matrix, tuple(missing)))
    tasks = []
    for works in by_place.values():
        last = works[-1].matrix
        known = similarities.records.get((last.index, last.part)) if similarities is not None else None
        similar = similarities is not None and len(works) == len(jobs) and (known is None or known.run != run)
        if similar or any(work.views for work in works):
            tasks.append(Task(works, similar))
    return tasks


def satisfies(record: SpectrumRecord | None, rules: Rules) -> bool:
    """Whether a record is what this run would make; a failure may end better this time."""
    if record is None:
        return False
    if record.method:
        return (record.method == "topk") == (rules.kind == "topk")
    lacks_masks = rules.both and rules.kind == "exact" and record.reason == "delta is zero" and not record.masks.size
    return record.reason.startswith(FINAL) and not lacks_masks


Found = list[tuple[Work, SpectrumRecord]]


def examine(task: Task, rules: Rules, memory: Memory) -> tuple[Found, Similarity | None]:
    """The records that were missing, and how like the last run's update the others' are, where that is wanted."""
    found: Found = []
    tops: list[Vectors | None] = []
    needed = task.matrix.topk_memory if rules.kind == "topk" else task.matrix.memory
    fits = needed <= rules.limit
    sides: dict[bool, Side] = {}
    if fits:
        memory.take(needed)
    try:
        for work in task.works:
            reason = hopeless(work, rules) or ("" if fits else too_large(work.matrix, rules, needed))
            try:
                records, top = ([], None) if reason else examine_one(work, rules, sides, task.similar)
            except (MemoryError, RuntimeError) as error:
                records, top, reason = [], None, f"{type(error).__name__}: {error}".splitlines()[0]
            found += [(work, record) for record in records]
            if reason:
                matrix = work.matrix
                found += [
                    (work, SpectrumRecord(matrix.index, matrix.part, view, matrix.m, matrix.n, reason=reason))
                    for view in work.views
                ]
            tops.append(top)
    finally:
        if fits:
            trim()
            memory.give_back(needed)
    matrix = task.matrix
    return found, Similarity(
        matrix.index, matrix.part, matrix.m, matrix.n, "", *to_the_last(tops)
    ) if task.similar else None


trim_heap: Any = None
with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
    trim_heap = ctypes.CDLL(None).malloc_trim


def trim() -> None:
    """Gives freed memory back to the system: between matrices of many sizes glibc would keep gigabytes in pieces."""
    if trim_heap is not None:
        trim_heap(0)


def hopeless(work: Work, rules: Rules) -> str:
    """Why a matrix has no spectra, as far as its tally tells: no need to read it."""
    facts = work.job.facts[work.matrix.index]
    if facts.nonfinite:
        return f"non-finite: {facts.nonfinite} coordinates of the tensor"
    return facts.failure or ("" if rules.both or facts.moved else "delta is zero")


def too_large(matrix: Matrix, rules: Rules, needed: int) -> str:
    least = f"pass --memory {needed // 10**6 + 1}MB" + (" or --spectra topk" if matrix.topk_memory < needed else "")
    return f"memory: {matrix.m} x {matrix.n} needs {byte_size(needed)}, {byte_size(rules.limit)} are allowed; {least}"


@dataclass
class Side:
    """What all runs share of one W in one view, each made when it is first needed."""

    gram: torch.Tensor | None = None
    factor: Factor | None = None
    masks: list[principal.Masks] | None = None


def examine_one(
    work: Work, rules: Rules, sides: dict[bool, Side], similar: bool
) -> tuple[list[SpectrumRecord], Vectors | None]:
    matrix = work.matrix
    w, v = (
        side.view(matrix.m, matrix.n)
        for side in work.job.pair.read(matrix.match, matrix.start, matrix.start + matrix.m * matrix.n)
    )
    records, top = [], None
    for view in work.views:
        began = time.perf_counter()
        if rules.kind == "topk":
            record, found = top_spectrum(matrix, w, v, view, rules.device)
        else:
            side = sides.setdefault(view == "visible" and matrix.match.base.dtype != "bf16", Side())
            record, found = spectrum(matrix, w, v, view, side, rules)
        records.append(replace(record, seconds=time.perf_counter() - began))
        top = found if view == "stored" else top
    if similar and "stored" not in work.views:
        top = top_directions(matrix, w, v, rules)
    return records, top


def top_directions(matrix: Matrix, w: torch.Tensor, v: torch.Tensor, rules: Rules) -> Vectors | None:
    """The top directions of an update whose spectrum is known already."""
    if rules.kind == "topk":
        return top_spectrum(matrix, w, v, "stored")[1]
    long_w, long_v = (w, v) if matrix.m >= matrix.n else (w.T, v.T)
    (c,) = symmetric(gram(long_w, long_v, parts=("delta",)), ("delta",))
    return directions(matrix, w, v, factorise(c, min(TOP, matrix.short)))


def directions(matrix: Matrix, w: torch.Tensor, v: torch.Tensor, top: Factor) -> Vectors | None:
    """Left and right top singular vectors of the stored delta from those of its shorter side; None where it has fewer than TOP."""
    k = top.vectors.shape[1]
    if matrix.short < TOP or float(top.sigma[k - 1]) <= DEFICIENT * float(top.sigma[0]):
        return None
    tall = matrix.m >= matrix.n
    long_w, long_v = (w, v) if tall else (w.T, v.T)
    blocks = principal.row_blocks(*long_w.shape)
    long = (
        torch.cat([base_and_delta(long_w[rows], long_v[rows], False)[1].double() @ top.vectors for rows in blocks])
        / top.sigma[:k]
    )
    return (long, top.vectors) if tall else (top.vectors, long)


def spectrum(
    matrix: Matrix, w: torch.Tensor, v: torch.Tensor, view: str, side: Side, rules: Rules
) -> tuple[SpectrumRecord, Vectors | None]:
    """The record of one view, and the top directions of delta."""
    visible = view == "visible"
    long_w, long_v = (w, v) if matrix.m >= matrix.n else (w.T, v.T)
    empty = SpectrumRecord(matrix.index, matrix.part, view, matrix.m, matrix.n, reason="delta is zero")
    with turn_on(rules.device):
        found, block, delta, reason = by_grams(matrix, w, v, visible, side, rules)
    if reason:
        return replace(empty, reason=reason), None
    assert side.factor is not None
    top = directions(matrix, w, v, delta) if delta else None
    side.masks = side.masks or principal.masks(long_w, side.factor.vectors, top_ranks(matrix.short), visible=visible)
    overlaps = principal.overlaps(side.masks, long_w, long_v, visible=visible)
    method = "svd" if found is not None and found.method == "svd" else "gram_mixed" if block else "gram"
    return filled(empty, found, overlaps, method), top


device_turn = threading.Lock()


def turn_on(device: torch.device) -> contextlib.AbstractContextManager:
    """On a GPU one matrix at a time, whose products and eigenproblems fill it; threads go on with the masks of others."""
    return contextlib.nullcontext() if device.type == "cpu" else device_turn


def by_grams(
    matrix: Matrix, w: torch.Tensor, v: torch.Tensor, visible: bool, side: Side, rules: Rules
) -> tuple[Spectra | None, int, Factor | None, str]:
    """From Gram matrices, made on the device: spectra, unless delta is zero; the rows of W^T delta summed in fp32, 0 where W is near
    to singular; delta's top where it is wanted; why there are none. What is left is on the CPU."""
    tall = matrix.m >= matrix.n
    long_w, long_v = (one.to(rules.device) for one in ((w, v) if tall else (w.T, v.T)))
    parts = ("base", "delta") if side.gram is None else ("delta",)
    *own, c = symmetric(gram(long_w, long_v, parts=parts, visible=visible), parts)
    side.gram = own[0].to(CPU) if own else side.gram
    assert side.gram is not None
    moved = bool(c.diagonal().sum())
    if not moved and base_and_delta(w, v, visible)[1].any():
        return None, 0, None, UNDERFLOW
    if not moved and not rules.both:
        return None, 0, None, "delta is zero"
    a = own[0] if own else side.gram.to(rules.device)
    side.factor = side.factor or factor_of(matrix, w, visible, a, rules)
    if not moved:
        return None, 0, None, ""
    singular = float(side.factor.sigma[-1]) <= NEAR_SINGULAR * float(side.factor.sigma[0])
    wide = not visible and torch.float64 in (w.dtype, v.dtype)
    block = (
        BLOCK
        if matrix.m * matrix.n >= LARGE and max(w.shape) >= LONG * matrix.short and not singular and not wide
        else 0
    )
    (b,) = gram(long_w, long_v, parts=("cross",), visible=visible, block=block)
    delta = factorise(c, min(TOP, matrix.short)) if rules.similar and not visible else None
    found = from_grams((a, b, c), tall=tall, source=side.factor.to(rules.device), delta=delta) or by_svd(
        matrix, w, v, visible, rules
    )
    return found.to(CPU), block, delta.to(CPU) if delta else None, ""


def factor_of(matrix: Matrix, w: torch.Tensor, visible: bool, gram: torch.Tensor, rules: Rules) -> Factor:
    """The factor of W from its Gram matrix, or from W itself where its top fifth is too near to singular."""
    keep = top_ranks(matrix.short)[-1]

    def make() -> Factor:
        found = factorise(gram, keep).to(CPU)
        if float(found.sigma[keep - 1]) > GRAM_LIMIT * float(found.sigma[0]):
            return found
        with alone(matrix, rules):
            return factorise_matrix(small(matrix, w, w, visible)[0], keep)

    return make() if rules.factors is None else rules.factors.of(w, visible, keep, make)


def by_svd(matrix: Matrix, w: torch.Tensor, v: torch.Tensor, visible: bool, rules: Rules) -> Spectra:
    with alone(matrix, rules):
        return from_matrices(*small(matrix, w, v, visible))


def small(matrix: Matrix, w: torch.Tensor, v: torch.Tensor, visible: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """W and delta in fp64, or, of a long matrix, what an orthonormal factor leaves of them."""
    m, n = matrix.m, matrix.n
    if max(m, n) < 3 * matrix.short:
        return base_and_delta(w, v, visible)
    long_w, long_v = (w, v) if m >= n else (w.T, v.T)
    step = max(2 * matrix.short, principal.BLOCK // matrix.short)
    blocks = (base_and_delta(long_w[i : i + step], long_v[i : i + step], visible) for i in range(0, max(m, n), step))
    found = compressed(blocks)
    return found if m >= n else (found[0].T, found[1].T)


one_at_a_time = threading.Lock()


@contextlib.contextmanager
def alone(matrix: Matrix, rules: Rules) -> Iterator[None]:
    """Of the SVDs that matrices near to singular need, one runs at a time, beyond the memory that was taken for Gram matrices."""
    if matrix.svd_memory > rules.limit:
        raise MemoryError(
            f"{matrix.m} x {matrix.n} is near to singular: its SVD needs {byte_size(matrix.svd_memory)}, {byte_size(rules.limit)} are "
            f"allowed; pass --memory {matrix.svd_memory // 10**6 + 1}MB"
        )
    with one_at_a_time:
        yield


def top_spectrum(
    matrix: Matrix, w: torch.Tensor, v: torch.Tensor, view: str, device: torch.device = CPU
) -> tuple[SpectrumRecord, Vectors | None]:
    """The record of one view with the top of delta's spectrum alone, by block Krylov, and its top directions."""
    empty = SpectrumRecord(matrix.index, matrix.part, view, matrix.m, matrix.n, reason="delta is zero")
    delta = base_and_delta(w, v, view == "visible")[1]
    with turn_on(device):
        found = randomized_svd(delta.to(device), min(TOPK, matrix.short), names=[f"{matrix.match.name} {matrix.part}"])
        assert not isinstance(found, list)
        found = found.to(CPU)
    if not (found.frobenius**2):
        return empty if not found.frobenius else replace(empty, reason=UNDERFLOW), None
    record = replace(
        empty,
        method="topk",
        reason="",
        energy=found.frobenius**2,
        remainder=found.remainder,
        delta=found.sigma.numpy(),
        bounds=torch.stack([found.lower, found.upper]).numpy(),
    )
    deficient = matrix.short < TOP or float(found.sigma[TOP - 1]) <= DEFICIENT * float(found.sigma[0])
    return record, None if deficient else (found.u[:, :TOP].double(), found.v[:, :TOP].double())


def filled(
    empty: SpectrumRecord, found: Spectra | None, overlaps: list[principal.Overlaps], method: str
) -> SpectrumRecord:
    content: dict[str, Any] = {
        "masks": torch.stack([torch.from_numpy(one.counts) for one in overlaps]).numpy(),
        "mask_sizes": torch.tensor([[one.size, one.taken, one.low_taken] for one in overlaps]).numpy(),
    }
    if found is not None:
        content |= {name: getattr(found, name).numpy() for name in ("source", "trained", "delta")}
        content["subspace"] = torch.stack([getattr(found, name) for name in SUBSPACE]).numpy()
        return replace(empty, method=method, reason="", energy=float(found.delta.square().sum()), **content)
    return replace(empty, **content)
