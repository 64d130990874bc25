r"""Principal and near-zero coordinates of a matrix, and how an update shares them.

The principal mask at r: the ceil(r m n) largest entries of |U_k S_k V_k^T|, k = max(1, int(r min(m, n))): where the top
singular vectors of W put its weight. On the longer side U_k S_k V_k^T = W V_k V_k^T, so it is made in row blocks from W and
the vectors on its shorter side. The near-zero mask at r: the ceil(r m n) smallest |W|. Both cuts are exact; entries that tie
at a cut are counted apart, so that every count has bounds and an expectation under random tie-breaking.

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

CUTS = (0.0, 1e-5)  # a coordinate changed where |delta| exceeds the cut, compared in the dtype of delta
SUBSETS = ("all", *(f"changed_{cut:g}" for cut in CUTS))
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
BLOCK = 1 << 20  # coordinates at a time
CANDIDATES = 1 << 14  # scores made again at a time
ROUNDINGS = 8  # standard deviations of accumulated rounding that an fp32 score may be off
TINY, MARGIN = 1e-37, 1e-6  # a cut of zero has an open bracket too; more than sums in fp32 round
SAMPLE_ROWS = 256  # whose scores tell where the cut lies
DEVIATIONS = 5  # of the sample, either side of the cut


@dataclass(frozen=True)
class Masks:
    """The masks of one ratio, of `size` coordinates each. Principal: bits of those `sure` to be in it, places of the others
    `above` the cut and of those `tied` at it, of which `taken` belong to it. Near zero: bits of those `low` and
    `low_tied`, of which `low_taken` belong to it."""

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
    """Counts of one ratio: int64 [subsets, COUNTS] of the entries beyond each cut and at it, and how many of the tied
    each mask takes. `size` is that of either mask."""

    counts: np.ndarray
    size: int
    taken: int
    low_taken: int


def packed(numel: int, flags: Iterator[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Bits of several flags, from their blocks, each but the last a multiple of eight long."""
    found: list[np.ndarray] = []
    first = 0
    for blocks in flags:
        found = found or [np.zeros((numel + 7) // 8, np.uint8) for _ in blocks]
        for bits, block in zip(found, blocks, strict=True):
            part = np.packbits(block, bitorder="little")
            bits[first : first + len(part)] = part
        first += len(part)
    return found


def places(flags: np.ndarray) -> np.ndarray:
    """np.flatnonzero of few flags, eight at a time."""
    if len(flags) % 8:
        return np.flatnonzero(flags)
    words = np.flatnonzero(flags.view(np.uint64))
    word, bit = np.nonzero(flags.reshape(-1, 8)[words])
    return words[word] * 8 + bit


def at(bits: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The bits at some places, as 0 or 1."""
    return bits[index >> 3] >> (index & 7).astype(np.uint8) & 1


def row_blocks(long: int, short: int) -> list[slice]:
    """Rows of about BLOCK coordinates, multiples of eight."""
    rows = max(8, BLOCK // max(short, 1) // 8 * 8)
    return [slice(first, min(first + rows, long)) for first in range(0, long, rows)]


def masks(
    source: torch.Tensor, basis: torch.Tensor, ranks: Sequence[int], *, visible: bool, ratios: Sequence[float] = RATIOS
) -> list[Masks]:
    """Principal and near-zero masks of W at each ratio.

    source: [long, short] view of the stored matrix, long >= short. basis: fp64 [short, K], the top singular vectors of W
    on its shorter side; the first ranks[i] of them serve ratios[i].
    """
    long, short = source.shape
    weights = source.bfloat16() if visible else source
    where = row_blocks(long, short)
    sizes = [max(1, math.ceil(r * source.numel())) for r in ratios]
    cuts = quantiles(weights.T if weights.T.is_contiguous() else weights, sizes, largest=False)
    projected = torch.empty(long, basis.shape[1], dtype=torch.float64)
    for block in where:
        torch.mm(weights[block].double(), basis, out=projected[block])
    magnitudes = (wide(weights[block]).abs_().numpy().ravel() for block in where)  # NumPy compares six times as fast
    low = packed(
        source.numel(), ([flags for c in cuts for flags in (w < c.threshold, w == c.threshold)] for w in magnitudes)
    )
    return [
        Masks(
            size,
            *select(projected[:, :rank], basis[:, :rank], where, size),
            low[2 * i],
            low[2 * i + 1],
            cuts[i].ties_taken,
        )
        for i, (size, rank) in enumerate(zip(sizes, ranks, strict=True))
    ]


def wide(values: torch.Tensor) -> torch.Tensor:
    """A copy in fp32, or fp64 where they are."""
    return values.to(torch.float64 if values.dtype == torch.float64 else torch.float32, copy=True)


def select(
    projected: torch.Tensor, basis: torch.Tensor, where: Sequence[slice], size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The `size` largest |P V^T| of P [long, k], V [short, k], right to fp64: sure, above, tied and taken of `Masks`.

    Scores are made block by block in fp32. Those beyond a bracket of the cut, known from a sample of rows, are only
    flagged; those within are kept; and those near the cut are made again in fp64.
    """
    narrow = basis.float()
    numel, short = len(projected) * len(basis), len(basis)
    # Rounding of k products and their sum: k at worst, but sqrt(k) times a few (Higham and Mary 2019).
    roundings = unit(narrow) * (2 + ROUNDINGS * math.sqrt(basis.shape[1])) * float(basis.square().sum(1).max()) ** 0.5
    error = (roundings * projected.square().sum(1).sqrt()).float().numpy()[:, None]  # of a row

    def scores(rows: slice) -> np.ndarray:
        return (projected[rows].float() @ narrow.T).abs_().numpy()

    sample = slice(None, None, max(1, len(projected) // SAMPLE_ROWS))
    for ends in (lambda: bracket(scores(sample), size / numel), lambda: around(scores, error, where, short, size)):
        least, most = ends()
        beyond, kept, index_of = [], [], []
        for rows in where:
            score = scores(rows)
            high = (score > most + error[rows]).ravel()
            beyond.append(np.packbits(high, bitorder="little"))
            inside = places((score >= least - error[rows]).ravel() ^ high)
            kept.append(score.ravel()[inside])
            index_of.append(inside + rows.start * short)
        sure, score, index = np.concatenate(beyond), np.concatenate(kept), np.concatenate(index_of)
        rest = size - popcount(sure)
        if not 0 < rest <= len(index):
            continue  # the cut is not in the bracket
        off = error[index // short, 0]
        low, high = (
            float(np.partition(ends, len(ends) - rest)[len(ends) - rest]) for ends in (score - off, score + off)
        )
        if least <= low and high <= most:
            break
    # The cut in exact scores lies in low .. high: what is surely beyond or below is so whatever was rounded.
    certain = index[score - off > high]
    np.bitwise_or.at(sure, certain >> 3, (1 << (certain & 7)).astype(np.uint8))
    index = index[(score - off <= high) & (score + off >= low)]
    exact = np.empty(len(index))
    for first in range(0, len(index), CANDIDATES):
        row, column = (torch.from_numpy(i) for i in np.divmod(index[first : first + CANDIDATES], short))
        exact[first : first + CANDIDATES] = (projected[row] * basis[column]).sum(1).abs().numpy()
    rest = size - popcount(sure)
    edge = np.partition(exact, len(exact) - rest)[len(exact) - rest]
    above = index[exact > edge]
    return sure, above, index[exact == edge], rest - len(above)


def bracket(sample: np.ndarray, share: float) -> tuple[float, float]:
    """Between which scores the cut of the `share` largest lies, most likely, from whole rows of them."""
    numel, values = sample.size, torch.from_numpy(sample)
    middle = quantile(values, min(numel, int(share * numel) + 1)).threshold
    each = (sample > middle).mean(1)
    spread = DEVIATIONS * float(each.std(ddof=1)) / math.sqrt(len(each)) if len(each) > 1 else 1.0
    most, least = int((share - spread) * numel) - 1, int((share + spread) * numel) + 2
    return quantile(values, least).threshold if least < numel else -1.0, quantile(
        values, most
    ).threshold if most > 0 else math.inf


def around(
    scores: Callable[[slice], np.ndarray], error: np.ndarray, where: Sequence[slice], short: int, size: int
) -> tuple[float, float]:
    """The same for certain, from all scores, 4 bytes each, for rows too unlike for a sample."""
    every, ends = np.empty((where[-1].stop, short), np.float32), []
    for sign in (-1, 1):
        for rows in where:
            every[rows] = np.maximum(scores(rows) + sign * error[rows], 0)
        ends.append(quantile(torch.from_numpy(every), size).threshold)
    return ends[0] * (1 - MARGIN) - TINY, ends[1] * (1 + MARGIN) + TINY


def overlaps(masks: Sequence[Masks], source: torch.Tensor, trained: torch.Tensor, *, visible: bool) -> list[Overlaps]:
    """What the masks of W share with all and with the changed coordinates. source, trained: [long, short] views."""
    deltas = (
        base_and_delta(source[block], trained[block], visible)[1].abs_().numpy().ravel()
        for block in row_blocks(*source.shape)
    )
    changed = packed(source.numel(), ([d > cut for cut in CUTS] for d in deltas))
    return [Overlaps(count(one, changed, source.numel()), one.size, one.taken, one.low_taken) for one in masks]


def count(mask: Masks, changed: Sequence[np.ndarray], numel: int) -> np.ndarray:
    """int64 [subsets, COUNTS]. Places near the cut are few, and are looked at one by one."""
    rows = []
    for subset in (None, *changed):

        def among(bits: np.ndarray, other: np.ndarray | None = None, subset: np.ndarray | None = subset) -> int:
            for one in (other, subset):
                bits = bits if one is None else bits & one
            return popcount(bits)

        def inside(index: np.ndarray, other: np.ndarray | None = None, subset: np.ndarray | None = subset) -> int:
            held = np.ones(len(index), np.uint8)
            for one in (other, subset):
                held = held if one is None else held & at(one, index)
            return int(held.sum())

        of_low = (None, mask.low, mask.low_tied)
        principal, both, both_tied = (among(mask.sure, bits) + inside(mask.above, bits) for bits in of_low)
        principal_tied, tied_low, tied_tied = (inside(mask.tied, bits) for bits in of_low)
        total = numel if subset is None else popcount(subset)
        rows.append(
            [
                total,
                principal,
                principal_tied,
                among(mask.low),
                among(mask.low_tied),
                both,
                both_tied,
                tied_low,
                tied_tied,
            ]
        )
    return np.array(rows, np.int64)
