r"""Principal and near-zero coordinates of a matrix, and how an update shares them.

The principal mask at r: the ceil(r m n) largest entries of |U_k S_k V_k^T|, k = max(1, int(r min(m, n))): where the top
singular vectors of W put its weight. On the longer side U_k S_k V_k^T = W V_k V_k^T, so it is made in row blocks from W and
the vectors on its shorter side. The near-zero mask at r: the ceil(r m n) smallest |W|. Both cuts are exact; entries that tie
at a cut are counted apart, so that every count has bounds and an expectation under random tie-breaking.

Source: arXiv 2606.13657.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opdkernels.ops.gram import change
from opdkernels.ops.quantile import quantile, quantiles
from opdkernels.spectral.exact import RATIOS
from opdkernels.spectral.randomized import unit

CUTS = (0.0, 1e-5)  # a coordinate changed where |delta| exceeds the cut, compared in the dtype of delta
SUBSETS = ("all", *(f"changed_{cut:g}" for cut in CUTS))
COUNTS = ("total", "principal", "principal_tied", "low", "low_tied", "both", "principal_and_low_tied", "principal_tied_and_low", "both_tied")
BLOCK = 1 << 20  # coordinates at a time
CANDIDATES = 1 << 14  # scores made again at a time
ROUNDINGS = 8  # standard deviations of accumulated rounding that an fp32 score may be off


@dataclass(frozen=True)
class Overlaps:
    """Counts of one ratio: int64 [subsets, COUNTS] of the entries beyond each cut and at it, and how many of the tied
    each mask takes. `size` is that of either mask."""

    counts: np.ndarray
    size: int
    taken: int
    low_taken: int


def popcount(bits: np.ndarray) -> int:
    if hasattr(np, "bitwise_count"):
        return int(np.bitwise_count(bits).sum(dtype=np.int64))
    return int(BYTE_COUNTS[bits].sum(dtype=np.int64))  # NumPy 1


BYTE_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def packed(numel: int, flags: Iterator[Sequence[torch.Tensor]]) -> list[np.ndarray]:
    """Bits of several flags, from their blocks, each but the last a multiple of eight long."""
    found: list[np.ndarray] = []
    first = 0
    for blocks in flags:
        found = found or [np.zeros((numel + 7) // 8, np.uint8) for _ in blocks]
        for bits, block in zip(found, blocks, strict=True):
            part = np.packbits(block.flatten().numpy(), bitorder="little")
            bits[first : first + len(part)] = part
        first += len(part)
    return found


def at(bits: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The bits at some places, as 0 or 1."""
    return bits[index >> 3] >> (index & 7).astype(np.uint8) & 1


def overlaps(
    source: torch.Tensor, trained: torch.Tensor, basis: torch.Tensor, ranks: Sequence[int], *, visible: bool, ratios: Sequence[float] = RATIOS
) -> list[Overlaps]:
    """Principal and near-zero masks of W at each ratio, and their counts among all and among the changed coordinates.

    source, trained: [long, short] views of the stored matrices, long >= short. basis: fp64 [short, K], the top singular
    vectors of W on its shorter side; the first ranks[i] of them serve ratios[i]. Takes 7 bytes a coordinate beside them.
    """
    long, short = source.shape
    numel, rows = long * short, max(8, BLOCK // max(short, 1) // 8 * 8)

    weights = source.bfloat16() if visible else source
    where = [slice(first, min(first + rows, long)) for first in range(0, long, rows)]
    deltas = (change(source[block], trained[block], visible)[1].abs() for block in where)
    changed = packed(numel, ([d > cut for cut in CUTS] for d in deltas))
    sizes = [max(1, math.ceil(r * numel)) for r in ratios]
    low = quantiles(weights.T if weights.T.is_contiguous() else weights, sizes, largest=False)
    projected = torch.empty(long, basis.shape[1], dtype=torch.float64)
    for block in where:
        torch.mm(weights[block].double(), basis, out=projected[block])
    score, found = torch.empty(long, short), []
    for size, rank, cut in zip(sizes, ranks, low, strict=True):
        best = select(projected[:, :rank], basis[:, :rank], score, where, size)
        magnitudes = (weights[block].abs() for block in where)
        below, tied = packed(numel, ([w < cut.cut, w == cut.cut] for w in magnitudes))
        found.append(Overlaps(count(best, below, tied, changed, numel), size, best.taken, cut.taken))
    return found


@dataclass(frozen=True)
class Selected:
    """The largest scores: bits of those that are `sure`, places of the rest that are `above` the cut and of those `tied` at
    it, of which `taken` belong to the mask."""

    sure: np.ndarray
    above: np.ndarray
    tied: np.ndarray
    taken: int


def select(projected: torch.Tensor, basis: torch.Tensor, score: torch.Tensor, where: Sequence[slice], size: int) -> Selected:
    """The `size` largest |P V^T| of P [long, k], V [short, k], right to fp64: made in fp32, and in fp64 again near the cut."""
    narrow = basis.float()
    length = 0.0
    for block in where:
        length = max(length, float(projected[block].square().sum(1).max()))
        torch.mm(projected[block].float(), narrow.T, out=score[block]).abs_()
    # Rounding of k products and their sum: k at worst, but sqrt(k) times a few (Higham and Mary 2019).
    error = unit(narrow) * (2 + ROUNDINGS * math.sqrt(basis.shape[1])) * math.sqrt(length * float(basis.square().sum(1).max()))
    cut = quantile(score, size).cut
    parts = score.view(-1).split(BLOCK)
    sure = packed(score.numel(), ([part > cut + 2 * error] for part in parts))[0]
    close = (np.flatnonzero(((part - cut).abs_() <= 2 * error).numpy()) + BLOCK * i for i, part in enumerate(parts))
    index = np.concatenate(list(close))
    exact = np.empty(len(index))
    for first in range(0, len(index), CANDIDATES):
        row, column = (torch.from_numpy(i) for i in np.divmod(index[first : first + CANDIDATES], score.shape[1]))
        exact[first : first + CANDIDATES] = (projected[row] * basis[column]).sum(1).abs().numpy()
    rest = size - popcount(sure)
    edge = np.partition(exact, len(exact) - rest)[len(exact) - rest]
    above = index[exact > edge]
    return Selected(sure, above, index[exact == edge], rest - len(above))


def count(best: Selected, below: np.ndarray, tied: np.ndarray, changed: Sequence[np.ndarray], numel: int) -> np.ndarray:
    """int64 [subsets, COUNTS]. Places near the cut are few, and are looked at one by one."""
    rows = []
    for subset in (None, *changed):

        def among(bits: np.ndarray, mask: np.ndarray | None = None, subset: np.ndarray | None = subset) -> int:
            for one in (mask, subset):
                bits = bits if one is None else bits & one
            return popcount(bits)

        def places(index: np.ndarray, mask: np.ndarray | None = None, subset: np.ndarray | None = subset) -> int:
            inside = np.ones(len(index), np.uint8)
            for one in (mask, subset):
                inside = inside if one is None else inside & at(one, index)
            return int(inside.sum())

        masks = (None, below, tied)
        principal, both, both_tied = (among(best.sure, mask) + places(best.above, mask) for mask in masks)
        principal_tied, tied_below, tied_tied = (places(best.tied, mask) for mask in masks)
        total = numel if subset is None else popcount(subset)
        rows.append([total, principal, principal_tied, among(below), among(tied), both, both_tied, tied_below, tied_tied])
    return np.array(rows, np.int64)
