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
from opdkernels.ops.quantile import Quantile, quantile, quantiles
from opdkernels.spectral.exact import RATIOS

CUTS = (0.0, 1e-5)  # a coordinate changed where |delta| exceeds the cut, compared in the dtype of delta
SUBSETS = ("all", *(f"changed_{cut:g}" for cut in CUTS))
COUNTS = ("total", "principal", "principal_tied", "low", "low_tied", "both", "principal_and_low_tied", "principal_tied_and_low", "both_tied")
BLOCK = 1 << 20  # coordinates at a time


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


def packed(numel: int, flags: Iterator[torch.Tensor]) -> np.ndarray:
    """Bits of blocks of flags, each but the last a multiple of eight."""
    found, at = np.zeros((numel + 7) // 8, np.uint8), 0
    for block in flags:
        bits = np.packbits(block.flatten().numpy(), bitorder="little")
        found[at : at + len(bits)] = bits
        at += len(bits)
    return found


def at(bits: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The bits at some places, as 0 or 1."""
    return bits[index >> 3] >> (index & 7).astype(np.uint8) & 1


def overlaps(
    source: torch.Tensor, trained: torch.Tensor, basis: torch.Tensor, ranks: Sequence[int], *, visible: bool, ratios: Sequence[float] = RATIOS
) -> list[Overlaps]:
    """Principal and near-zero masks of W at each ratio, and their counts among all and among the changed coordinates.

    source, trained: [long, short] views of the stored matrices, long >= short. basis: fp64 [short, K], the top singular
    vectors of W on its shorter side; the first ranks[i] of them serve ratios[i]. Takes 5 bytes a coordinate beside them.
    """
    long, short = source.shape
    numel, rows = long * short, max(8, BLOCK // max(short, 1) // 8 * 8)

    weights = source.bfloat16() if visible else source
    where = [slice(first, min(first + rows, long)) for first in range(0, long, rows)]
    changed = [packed(numel, (change(source[b], trained[b], visible)[1].abs() > cut for b in where)) for cut in CUTS]
    sizes = [max(1, math.ceil(r * numel)) for r in ratios]
    low = quantiles(weights.T if weights.T.is_contiguous() else weights, sizes, largest=False)
    score = torch.empty(long, short)
    found = []
    for size, rank, cut in zip(sizes, ranks, low, strict=True):
        top = basis[:, :rank]
        for block in where:
            score[block] = (weights[block].double() @ top @ top.T).abs_()
        below = packed(numel, (weights[block].abs() < cut.cut for block in where))
        tied = packed(numel, (weights[block].abs() == cut.cut for block in where))
        found.append(count(score.view(-1), quantile(score, size), below, tied, changed, size, cut))
    return found


def count(
    score: torch.Tensor, best: Quantile, below: np.ndarray, tied: np.ndarray, changed: Sequence[np.ndarray], size: int, cut: Quantile
) -> Overlaps:
    """The counts of one ratio. Scores at the cut are few, and are looked at one by one."""
    parts = score.split(BLOCK)
    above = packed(len(score), (part > best.cut for part in parts))
    index = np.concatenate([np.flatnonzero((part == best.cut).numpy()) + BLOCK * i for i, part in enumerate(parts)])
    rows = []
    for subset in (None, *changed):

        def among(*masks: np.ndarray, subset: np.ndarray | None = subset) -> int:
            every = [*masks] if subset is None else [*masks, subset]
            bits = every[0]
            for mask in every[1:]:
                bits = bits & mask
            return popcount(bits)

        inside = np.ones(len(index), np.uint8) if subset is None else at(subset, index)
        rows.append(
            [
                len(score) if subset is None else popcount(subset), among(above), int(inside.sum()), among(below), among(tied), among(above, below), among(above, tied),
                int((inside & at(below, index)).sum()), int((inside & at(tied, index)).sum()),
            ]
        )  # fmt: skip
    return Overlaps(np.array(rows, np.int64), size, best.taken, cut.taken)
