"""Spectra of one matrix in one run: from Gram matrices, from an SVD where those are too inaccurate, or by block
Krylov."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from opdkernels.analysis.factors import FactorCache
from opdkernels.analysis.matrices import TOPK, Matrix
from opdkernels.analysis.matrix_nulls import expected_arrays
from opdkernels.backends.devices import CPU, device_lock
from opdkernels.checkpoint.match import Pair
from opdkernels.formatting import byte_size
from opdkernels.metrics.similarity import DEFICIENT, TOP, Vectors
from opdkernels.metrics.spectra import SUBSPACE, UNDERFLOW, SpectrumRecord
from opdkernels.ops.delta import base_and_delta
from opdkernels.ops.gram import gram, symmetric
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


@dataclass(frozen=True)
class SpectraConfig:
    """How spectra are computed.

    kind: "exact" or "topk". memory: bytes for all matrices in progress. both_views: also the visible view of bf16
    pairs, and principal masks also where delta is zero. similarity: also keep the top directions of each update.
    factors: where factorisations of W are stored. device: where Gram matrices and their eigenproblems are computed;
    masks always use the CPU.
    """

    kind: str
    memory: int
    both_views: bool = False
    similarity: bool = False
    factors: FactorCache | None = None
    device: torch.device = CPU


@dataclass
class BaseFactors:
    """What all runs share of one W in one view; each is computed at first use."""

    gram: torch.Tensor | None = None  # W^T W [short, short]
    factor: Factor | None = None
    projected: torch.Tensor | None = None  # W times the factor's vectors [long, K]
    masks: list[principal.Masks] | None = None


def matrix_spectra(
    pair: Pair,
    matrix: Matrix,
    views: tuple[str, ...],
    config: SpectraConfig,
    shared: dict[bool, BaseFactors],
    similarity: bool,
) -> tuple[list[SpectrumRecord], Vectors | None]:
    """Reads one matrix of a pair and computes its spectra.

    Args:
        views: Views to compute.
        shared: `BaseFactors` of W by whether W is rounded to bf16; filled as needed.
        similarity: Whether the top directions of the stored delta are wanted.

    Returns:
        One record per view, and the top directions, or None if not wanted or delta has fewer than TOP.
    """
    w, v = (
        tensor.view(matrix.m, matrix.n)
        for tensor in pair.read(matrix.match, matrix.start, matrix.start + matrix.m * matrix.n)
    )
    records, top = [], None
    for view in views:
        started = time.perf_counter()
        if config.kind == "topk":
            record, directions = topk_spectrum(matrix, w, v, view, config.device)
        else:
            rounded = view == "visible" and matrix.match.base.dtype != "bf16"
            record, directions = exact_spectrum(matrix, w, v, view, shared.setdefault(rounded, BaseFactors()), config)
        records.append(replace(record, seconds=time.perf_counter() - started))
        if view == "stored":
            top = directions
    if similarity and "stored" not in views:
        top = top_directions(matrix, w, v, config)
    return records, top


def exact_spectrum(
    matrix: Matrix, w: torch.Tensor, v: torch.Tensor, view: str, shared: BaseFactors, config: SpectraConfig
) -> tuple[SpectrumRecord, Vectors | None]:
    """The record of one view of W [m, n] and W' [m, n], and the top directions of delta."""
    visible = view == "visible"
    long_w, long_v = as_long(matrix, w, v)
    empty = SpectrumRecord(matrix.index, matrix.part, view, matrix.m, matrix.n, reason="delta is zero")
    with device_lock(config.device):
        spectra, block, delta, reason = spectra_from_grams(matrix, w, v, visible, shared, config)
    if reason:
        return replace(empty, reason=reason), None
    assert shared.factor is not None
    top = long_directions(matrix, w, v, delta) if delta else None
    vectors = shared.factor.vectors
    if shared.projected is None:
        shared.projected = principal.project(long_w, vectors, visible=visible)
    if not shared.masks:
        shared.masks = principal.masks(long_w, vectors, shared.projected, top_ranks(matrix.short), visible=visible)
    overlaps = principal.overlaps(shared.masks, long_w, long_v, visible=visible)
    method = "svd" if spectra is not None and spectra.method == "svd" else "gram_mixed" if block else "gram"
    expected = expected_arrays(w, v, view, shared.factor, shared.projected, shared.masks, spectra)
    return replace(build_record(empty, spectra, overlaps, method), **expected), top


def spectra_from_grams(
    matrix: Matrix, w: torch.Tensor, v: torch.Tensor, visible: bool, shared: BaseFactors, config: SpectraConfig
) -> tuple[Spectra | None, int, Factor | None, str]:
    """Spectra from Gram matrices computed on the device.

    Returns, on the CPU:
        The spectra, or None if delta is zero; the number of rows of W^T delta summed in fp32, 0 if W is nearly
        singular; the factor of delta if similarities are wanted; the reason if there are no spectra.
    """
    tall = matrix.m >= matrix.n
    long_w, long_v = (tensor.to(config.device) for tensor in as_long(matrix, w, v))
    parts = ("base", "delta") if shared.gram is None else ("delta",)
    *gram_w, gram_delta = symmetric(gram(long_w, long_v, parts=parts, visible=visible), parts)
    shared.gram = gram_w[0].to(CPU) if gram_w else shared.gram
    assert shared.gram is not None
    changed = bool(gram_delta.diagonal().sum())
    if not changed and base_and_delta(w, v, visible)[1].any():
        return None, 0, None, UNDERFLOW
    if not changed and not config.both_views:
        return None, 0, None, "delta is zero"
    gram_base = gram_w[0] if gram_w else shared.gram.to(config.device)
    shared.factor = shared.factor or factor_of(matrix, w, visible, gram_base, config)
    if not changed:
        return None, 0, None, ""
    singular = float(shared.factor.sigma[-1]) <= NEAR_SINGULAR * float(shared.factor.sigma[0])
    fp64_input = not visible and torch.float64 in (w.dtype, v.dtype)
    large = matrix.m * matrix.n >= LARGE and max(w.shape) >= LONG * matrix.short
    block = BLOCK if large and not singular and not fp64_input else 0
    (cross,) = gram(long_w, long_v, parts=("cross",), visible=visible, block=block)
    delta = factorise(gram_delta, min(TOP, matrix.short)) if config.similarity and not visible else None
    grams = (gram_base, cross, gram_delta)
    spectra = from_grams(grams, tall=tall, base=shared.factor.to(config.device), delta=delta)
    if spectra is None:
        spectra = spectra_from_svd(matrix, w, v, visible, config)
    return spectra.to(CPU), block, delta.to(CPU) if delta else None, ""


def factor_of(matrix: Matrix, w: torch.Tensor, visible: bool, gram_base: torch.Tensor, config: SpectraConfig) -> Factor:
    """The factor of W from its Gram matrix [short, short], or from W itself if the top fifth of W is nearly
    singular."""
    num_vectors = top_ranks(matrix.short)[-1]

    def compute() -> Factor:
        factor = factorise(gram_base, num_vectors).to(CPU)
        if float(factor.sigma[num_vectors - 1]) > GRAM_LIMIT * float(factor.sigma[0]):
            return factor
        with exclusive_svd(matrix, config):
            return factorise_matrix(reduce_rows(matrix, w, w, visible)[0], num_vectors)

    return compute() if config.factors is None else config.factors.get(w, visible, num_vectors, compute)


def spectra_from_svd(matrix: Matrix, w: torch.Tensor, v: torch.Tensor, visible: bool, config: SpectraConfig) -> Spectra:
    with exclusive_svd(matrix, config):
        return from_matrices(*reduce_rows(matrix, w, v, visible))


def reduce_rows(matrix: Matrix, w: torch.Tensor, v: torch.Tensor, visible: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """W and delta in fp64; if the matrix is long, their R factors for one shared orthonormal Q."""
    m, n = matrix.m, matrix.n
    if max(m, n) < 3 * matrix.short:
        return base_and_delta(w, v, visible)
    long_w, long_v = as_long(matrix, w, v)
    step = max(2 * matrix.short, principal.BLOCK // matrix.short)
    blocks = (base_and_delta(long_w[i : i + step], long_v[i : i + step], visible) for i in range(0, max(m, n), step))
    reduced_w, reduced_delta = compressed(blocks)
    return (reduced_w, reduced_delta) if m >= n else (reduced_w.T, reduced_delta.T)


svd_lock = threading.Lock()


@contextlib.contextmanager
def exclusive_svd(matrix: Matrix, config: SpectraConfig) -> Iterator[None]:
    """Runs one SVD of a nearly singular matrix at a time: its memory is beyond what was reserved for Gram matrices."""
    needed = matrix.svd_memory
    if needed > config.memory:
        raise MemoryError(
            f"{matrix.m} x {matrix.n} is near to singular: its SVD needs {byte_size(needed)}, "
            f"{byte_size(config.memory)} are allowed; pass --memory {needed // 10**6 + 1}MB"
        )
    with svd_lock:
        yield


def topk_spectrum(
    matrix: Matrix, w: torch.Tensor, v: torch.Tensor, view: str, device: torch.device = CPU
) -> tuple[SpectrumRecord, Vectors | None]:
    """The record of one view with only the top of delta's spectrum, by block Krylov, and its top directions."""
    empty = SpectrumRecord(matrix.index, matrix.part, view, matrix.m, matrix.n, reason="delta is zero")
    delta = base_and_delta(w, v, view == "visible")[1]
    with device_lock(device):
        svd = randomized_svd(delta.to(device), min(TOPK, matrix.short), names=[f"{matrix.match.name} {matrix.part}"])
        assert not isinstance(svd, list)
        svd = svd.to(CPU)
    if not (svd.frobenius**2):
        return empty if not svd.frobenius else replace(empty, reason=UNDERFLOW), None
    record = replace(
        empty,
        method="topk",
        reason="",
        energy=svd.frobenius**2,
        remainder=svd.remainder,
        delta=svd.sigma.numpy(),
        bounds=torch.stack([svd.lower, svd.upper]).numpy(),
    )
    deficient = matrix.short < TOP or float(svd.sigma[TOP - 1]) <= DEFICIENT * float(svd.sigma[0])
    return record, None if deficient else (svd.u[:, :TOP].double(), svd.v[:, :TOP].double())


def top_directions(matrix: Matrix, w: torch.Tensor, v: torch.Tensor, config: SpectraConfig) -> Vectors | None:
    """The top directions of an update whose spectrum is already known."""
    if config.kind == "topk":
        return topk_spectrum(matrix, w, v, "stored")[1]
    (gram_delta,) = symmetric(gram(*as_long(matrix, w, v), parts=("delta",)), ("delta",))
    return long_directions(matrix, w, v, factorise(gram_delta, min(TOP, matrix.short)))


def long_directions(matrix: Matrix, w: torch.Tensor, v: torch.Tensor, top: Factor) -> Vectors | None:
    """Left and right top singular vectors of the stored delta from those of its shorter side; None if it has fewer than
    TOP."""
    k = top.vectors.shape[1]
    if matrix.short < TOP or float(top.sigma[k - 1]) <= DEFICIENT * float(top.sigma[0]):
        return None
    long_w, long_v = as_long(matrix, w, v)
    blocks = principal.row_blocks(*long_w.shape)
    products = [base_and_delta(long_w[rows], long_v[rows], False)[1].double() @ top.vectors for rows in blocks]
    long = torch.cat(products) / top.sigma[:k]
    return (long, top.vectors) if matrix.m >= matrix.n else (top.vectors, long)


def as_long(matrix: Matrix, w: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both matrices with the longer side first, as views."""
    return (w, v) if matrix.m >= matrix.n else (w.T, v.T)


def build_record(
    empty: SpectrumRecord, spectra: Spectra | None, overlaps: list[principal.Overlaps], method: str
) -> SpectrumRecord:
    """The record with masks and, unless delta is zero, spectra."""
    content: dict[str, Any] = {
        "masks": torch.stack([torch.from_numpy(overlap.counts) for overlap in overlaps]).numpy(),
        "mask_sizes": torch.tensor([[overlap.size, overlap.taken, overlap.low_taken] for overlap in overlaps]).numpy(),
    }
    if spectra is None:
        return replace(empty, **content)
    content |= {name: getattr(spectra, name).numpy() for name in ("base", "trained", "delta")}
    content["subspace"] = torch.stack([getattr(spectra, name) for name in SUBSPACE]).numpy()
    return replace(empty, method=method, reason="", energy=float(spectra.delta.square().sum()), **content)
