r"""Principal and near-zero coordinates of a matrix, and their overlap with an update.

The principal mask at r contains the ceil(r m n) largest entries of |U_k S_k V_k^T|, k = max(1, int(r min(m, n))). On
the longer side U_k S_k V_k^T = W V_k V_k^T, so it is computed in row blocks from W and the vectors on its shorter
side. The near-zero mask at r contains the ceil(r m n) smallest |W|. Both thresholds are exact; entries that tie at a
threshold are counted separately, so that every count has bounds and an expectation under random tie-breaking.

Source: arXiv 2606.13657.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opdkernels.bits import popcount
from opdkernels.ops.delta import base_and_delta
from opdkernels.ops.quantile import quantile, quantiles
from opdkernels.spectral.exact import RATIOS
from opdkernels.spectral.randomized import unit

THRESHOLDS = (0.0, 1e-5)  # a coordinate is changed if |delta| exceeds the threshold, compared in the dtype of delta
COUNTS = (
    "total",
    "principal",
    "principal_tied",
    "low",
    "low_tied",
    "both",
    "principal_and_low_tied",
    "principal_tied_and_low",
    "both_tied",
)
BLOCK = 1 << 20  # coordinates per row block
CANDIDATES = 1 << 14  # scores recomputed in fp64 per step
ROUNDINGS = 8  # error bound of an fp32 score, in standard deviations of accumulated rounding
TINY, MARGIN = 1e-37, 1e-6  # TINY opens the bracket of a threshold of zero; MARGIN exceeds the rounding of fp32 sums
SAMPLE_ROWS = 256  # rows whose scores estimate the threshold
DEVIATIONS = 5  # half width of the bracket in standard deviations of the sample


@dataclass(frozen=True)
class Masks:
    """The principal and the near-zero mask of one ratio.

    Attributes:
        size: Number of coordinates of either mask.
        sure: Packed bits of coordinates that are certainly principal.
        above: Indices of further principal coordinates, above the threshold.
        tied: Indices of coordinates at the principal threshold.
        taken: How many of `tied` belong to the principal mask.
        low: Packed bits of coordinates with |W| below the near-zero threshold.
        low_tied: Packed bits of coordinates at the near-zero threshold.
        low_taken: How many of `low_tied` belong to the near-zero mask.
    """

    size: int
    sure: np.ndarray
    above: np.ndarray
    tied: np.ndarray
    taken: int
    low: np.ndarray
    low_tied: np.ndarray
    low_taken: int


@dataclass(frozen=True)
class Overlaps:
    """The overlap of one ratio's masks with subsets of the coordinates.

    Attributes:
        counts: int64 [subsets, COUNTS], entries beyond each threshold and at it.
        size: Number of coordinates of either mask.
        taken: How many coordinates at the principal threshold belong to the mask.
        low_taken: How many coordinates at the near-zero threshold belong to the mask.
    """

    counts: np.ndarray
    size: int
    taken: int
    low_taken: int


def packed(numel: int, flags: Iterator[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Packs several flags to bits, block by block; every block but the last has a multiple of eight flags."""
    packed_flags: list[np.ndarray] = []
    first = 0
    for blocks in flags:
        packed_flags = packed_flags or [np.zeros((numel + 7) // 8, np.uint8) for _ in blocks]
        for bits, block in zip(packed_flags, blocks, strict=True):
            block_bits = np.packbits(block, bitorder="little")
            bits[first : first + len(block_bits)] = block_bits
        first += len(block_bits)
    return packed_flags


def sparse_flatnonzero(flags: np.ndarray) -> np.ndarray:
    """np.flatnonzero for few set flags, eight flags at a time."""
    if len(flags) % 8:
        return np.flatnonzero(flags)
    words = np.flatnonzero(flags.view(np.uint64))
    word, bit = np.nonzero(flags.reshape(-1, 8)[words])
    return words[word] * 8 + bit


def bits_at(bits: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The bits at some indices, as 0 or 1."""
    return bits[index >> 3] >> (index & 7).astype(np.uint8) & 1


def row_blocks(long: int, short: int) -> list[slice]:
    """Rows of about BLOCK coordinates, multiples of eight."""
    rows = max(8, BLOCK // max(short, 1) // 8 * 8)
    return [slice(first, min(first + rows, long)) for first in range(0, long, rows)]


def project(base: torch.Tensor, basis: torch.Tensor, *, visible: bool) -> torch.Tensor:
    """W times its top singular vectors, fp64 [long, K].

    Args:
        base: View [long, short] of the stored matrix, long >= short.
        basis: Top singular vectors of W on its shorter side, fp64 [short, K].
        visible: Whether W is rounded to bf16.
    """
    long, short = base.shape
    projected = torch.empty(long, basis.shape[1], dtype=torch.float64)
    for rows in row_blocks(long, short):
        weights = base[rows].bfloat16() if visible else base[rows]
        torch.mm(weights.double(), basis, out=projected[rows])
    return projected


def masks(
    base: torch.Tensor,
    basis: torch.Tensor,
    projected: torch.Tensor,
    ranks: Sequence[int],
    *,
    visible: bool,
    ratios: Sequence[float] = RATIOS,
) -> list[Masks]:
    """Principal and near-zero masks of W at each ratio.

    Args:
        base: View [long, short] of the stored matrix, long >= short.
        basis: Top singular vectors of W on its shorter side, fp64 [short, K].
        projected: `project` of W.
        ranks: How many of the vectors each ratio uses.
        visible: Whether W is rounded to bf16.
        ratios: Fractions of the coordinates in each mask.
    """
    long, short = base.shape
    weights = base.bfloat16() if visible else base
    blocks = row_blocks(long, short)
    sizes = [max(1, math.ceil(r * base.numel())) for r in ratios]
    low_thresholds = quantiles(weights.T if weights.T.is_contiguous() else weights, sizes, largest=False)
    # NumPy compares six times as fast as torch.
    magnitudes = (widened_copy(weights[rows]).abs_().numpy().ravel() for rows in blocks)
    low = packed(
        base.numel(),
        ([flags for q in low_thresholds for flags in (w < q.threshold, w == q.threshold)] for w in magnitudes),
    )
    return [
        Masks(
            size,
            *select(projected[:, :rank], basis[:, :rank], blocks, size),
            low[2 * i],
            low[2 * i + 1],
            low_thresholds[i].ties_taken,
        )
        for i, (size, rank) in enumerate(zip(sizes, ranks, strict=True))
    ]


def widened_copy(values: torch.Tensor) -> torch.Tensor:
    """A copy in fp64 if the values are fp64, else in fp32."""
    return values.to(torch.float64 if values.dtype == torch.float64 else torch.float32, copy=True)


def select(
    projected: torch.Tensor, basis: torch.Tensor, blocks: Sequence[slice], size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The `size` largest entries of |P V^T| for P [long, k], V [short, k], accurate to fp64.

    Scores are computed block by block in fp32. A sample of rows gives a bracket of the threshold: scores above it are
    only flagged, scores inside it are kept, and those near the threshold are computed again in fp64.

    Returns:
        `sure`, `above`, `tied` and `taken` of `Masks`.
    """
    narrow = basis.float()
    numel, short = len(projected) * len(basis), len(basis)
    # Rounding of k products and their sum: at worst k, in practice a few times sqrt(k) (Higham and Mary 2019).
    roundings = unit(narrow) * (2 + ROUNDINGS * math.sqrt(basis.shape[1])) * float(basis.square().sum(1).max()) ** 0.5
    error = (roundings * projected.square().sum(1).sqrt()).float().numpy()[:, None]  # [long, 1]

    def scores(rows: slice) -> np.ndarray:
        return (projected[rows].float() @ narrow.T).abs_().numpy()

    sample = slice(None, None, max(1, len(projected) // SAMPLE_ROWS))
    for estimate in (
        lambda: sampled_bracket(scores(sample), size / numel),
        lambda: certain_bracket(scores, error, blocks, short, size),
    ):
        least, most = estimate()
        beyond, kept, index_of = [], [], []
        for rows in blocks:
            score = scores(rows)
            high = (score > most + error[rows]).ravel()
            beyond.append(np.packbits(high, bitorder="little"))
            inside = sparse_flatnonzero((score >= least - error[rows]).ravel() ^ high)
            kept.append(score.ravel()[inside])
            index_of.append(inside + rows.start * short)
        sure, score, index = np.concatenate(beyond), np.concatenate(kept), np.concatenate(index_of)
        remaining = size - popcount(sure)
        if not 0 < remaining <= len(index):
            continue  # the threshold is not in the bracket
        tolerance = error[index // short, 0]
        low, high = (
            float(np.partition(ends, len(ends) - remaining)[len(ends) - remaining])
            for ends in (score - tolerance, score + tolerance)
        )
        if least <= low and high <= most:
            break
    # The threshold of the exact scores is in [low, high]: scores certainly beyond or below it need no exact value.
    certain = index[score - tolerance > high]
    np.bitwise_or.at(sure, certain >> 3, (1 << (certain & 7)).astype(np.uint8))
    index = index[(score - tolerance <= high) & (score + tolerance >= low)]
    exact = np.empty(len(index))
    for first in range(0, len(index), CANDIDATES):
        row, column = (torch.from_numpy(i) for i in np.divmod(index[first : first + CANDIDATES], short))
        exact[first : first + CANDIDATES] = (projected[row] * basis[column]).sum(1).abs().numpy()
    remaining = size - popcount(sure)
    threshold = np.partition(exact, len(exact) - remaining)[len(exact) - remaining]
    above = index[exact > threshold]
    return sure, above, index[exact == threshold], remaining - len(above)


def sampled_bracket(sample: np.ndarray, fraction: float) -> tuple[float, float]:
    """Bounds that probably contain the threshold of the largest `fraction` of scores, from a sample of complete
    rows."""
    numel, values = sample.size, torch.from_numpy(sample)
    middle = quantile(values, min(numel, int(fraction * numel) + 1)).threshold
    row_fractions = (sample > middle).mean(1)
    num_rows = len(row_fractions)
    spread = DEVIATIONS * float(row_fractions.std(ddof=1)) / math.sqrt(num_rows) if num_rows > 1 else 1.0
    most, least = int((fraction - spread) * numel) - 1, int((fraction + spread) * numel) + 2
    lower = quantile(values, least).threshold if least < numel else -1.0
    upper = quantile(values, most).threshold if most > 0 else math.inf
    return lower, upper


def certain_bracket(
    scores: Callable[[slice], np.ndarray], error: np.ndarray, blocks: Sequence[slice], short: int, size: int
) -> tuple[float, float]:
    """Bounds that certainly contain the threshold, from all scores (4 bytes each): for rows too unlike for a sample."""
    all_scores, ends = np.empty((blocks[-1].stop, short), np.float32), []
    for sign in (-1, 1):
        for rows in blocks:
            all_scores[rows] = np.maximum(scores(rows) + sign * error[rows], 0)
        ends.append(quantile(torch.from_numpy(all_scores), size).threshold)
    return ends[0] * (1 - MARGIN) - TINY, ends[1] * (1 + MARGIN) + TINY


def overlaps(masks: Sequence[Masks], base: torch.Tensor, trained: torch.Tensor, *, visible: bool) -> list[Overlaps]:
    """Overlaps of the masks of W with all coordinates and with the changed ones. base, trained: [long, short]
    views."""
    deltas = (
        base_and_delta(base[rows], trained[rows], visible)[1].abs_().numpy().ravel() for rows in row_blocks(*base.shape)
    )
    changed = packed(base.numel(), ([delta > threshold for threshold in THRESHOLDS] for delta in deltas))
    return [Overlaps(count(mask, changed, base.numel()), mask.size, mask.taken, mask.low_taken) for mask in masks]


def count(mask: Masks, changed: Sequence[np.ndarray], numel: int) -> np.ndarray:
    """int64 [subsets, COUNTS]. Indices near the threshold are few and are tested one by one."""
    rows = []
    for subset in (None, *changed):

        def count_bits(bits: np.ndarray, other: np.ndarray | None = None, subset: np.ndarray | None = subset) -> int:
            for condition in (other, subset):
                bits = bits if condition is None else bits & condition
            return popcount(bits)

        def count_indices(
            index: np.ndarray, other: np.ndarray | None = None, subset: np.ndarray | None = subset
        ) -> int:
            flags = np.ones(len(index), np.uint8)
            for condition in (other, subset):
                flags = flags if condition is None else flags & bits_at(condition, index)
            return int(flags.sum())

        low_conditions = (None, mask.low, mask.low_tied)
        principal, both, both_tied = (
            count_bits(mask.sure, bits) + count_indices(mask.above, bits) for bits in low_conditions
        )
        principal_tied, tied_low, tied_tied = (count_indices(mask.tied, bits) for bits in low_conditions)
        total = numel if subset is None else popcount(subset)
        low, low_tied = count_bits(mask.low), count_bits(mask.low_tied)
        rows.append([total, principal, principal_tied, low, low_tied, both, both_tied, tied_low, tied_tied])
    return np.array(rows, np.int64)
