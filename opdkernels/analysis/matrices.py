"""Which tensors are matrices, and the cost of their spectra, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from opdkernels.checkpoint.match import Match, Pair

TOPK = 64  # number of singular values of "topk": the largest k of the metrics


@dataclass(frozen=True)
class Matrix:
    """One matrix [m, n] of a match, at element `start`; `part` is its position in a stack of experts, else -1."""

    index: int
    match: Match
    part: int
    m: int
    n: int

    @property
    def start(self) -> int:
        return max(self.part, 0) * self.m * self.n

    @property
    def short(self) -> int:
        return min(self.m, self.n)

    @property
    def cost(self) -> float:
        return cost(self.m, self.n)

    @property
    def memory(self) -> int:
        return memory(self.m, self.n)

    @property
    def svd_memory(self) -> int:
        """Bytes of the fp64 QR and SVD of a nearly singular matrix."""
        return 200 * self.short**2 + (1 << 24)

    @property
    def topk_memory(self) -> int:
        """Bytes of two copies of delta in fp32 and the blocks of the search."""
        return 8 * self.m * self.n + 64 * TOPK * (self.m + self.n) + (1 << 24)


def cost(m: int, n: int) -> float:
    """Floating-point operations of the exact spectra of one matrix and of what rounding alone would give.

    Two Gram matrices by halves and one complete, three eigenproblems, the principal masks, the projection of W on its
    top vectors, and the perturbation of its singular values; the passes over coordinates and over the bins of |W| in
    equivalent operations.
    """
    short = min(m, n)
    return m * n * (5.3 * short + 2000) + 33 * short**3 + 2e9


def memory(m: int, n: int) -> int:
    """Bytes of the exact spectra of one matrix: Gram matrices, eigenvectors, scores and masks."""
    return 88 * min(m, n) ** 2 + 5 * m * n + (1 << 24)


def matrices(pair: Pair) -> Iterator[Matrix]:
    """Every matrix of a pair: 2-D tensors, each expert of a stack, other tensors flattened to (out, rest)."""
    for index, match in enumerate(pair.matches):
        shape = match.shape
        if len(shape) < 2 or not match.numel:
            continue
        if len(shape) == 3 and "expert" in match.name:
            for part in range(shape[0]):
                yield Matrix(index, match, part, *shape[1:])
        else:
            yield Matrix(index, match, -1, shape[0], match.numel // shape[0])


def views_of(match: Match, both: bool) -> tuple[str, ...]:
    """The views whose spectra are computed. In a bf16 pair, W and W' are the same in both views, and delta differs
    only by its rounding."""
    bf16 = match.base.dtype == match.trained.dtype == "bf16"
    return ("stored", "visible") if both or not bf16 else ("stored",)
