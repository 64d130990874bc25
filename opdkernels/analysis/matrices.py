"""Which tensors are matrices, and what their spectra cost: from headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from opdkernels.checkpoint.match import Match, Pair

TOPK = 64  # singular values of `topk`: the largest k of the figures


@dataclass(frozen=True)
class Matrix:
    """One matrix of a match: of a stack of experts the one at `part`, else -1. [m, n] at element `start`."""

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
        """Bytes: the QR and SVD in fp64 that a matrix near to singular takes."""
        return 200 * self.short**2 + (1 << 24)

    @property
    def topk_memory(self) -> int:
        """Bytes: delta in fp32 twice, and the blocks of the search."""
        return 8 * self.m * self.n + 64 * TOPK * (self.m + self.n) + (1 << 24)


def cost(m: int, n: int) -> float:
    """Floating-point operations of the exact spectra of one matrix: two Gram halves and a whole, three eigenproblems,
    the principal masks; and what the passes over coordinates take, in the same coin."""
    short = min(m, n)
    return m * n * (5.3 * short + 900) + 26 * short**3


def memory(m: int, n: int) -> int:
    """Bytes that they take: Gram matrices and eigenvectors, scores and masks."""
    return 88 * min(m, n) ** 2 + 5 * m * n + (1 << 24)


def matrices(pair: Pair) -> Iterator[Matrix]:
    """Every matrix: 2-D tensors, experts one by one, other tensors of more dimensions as (out, rest)."""
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
    """The views of which spectra are made. In a bf16 pair both have one W and one W', and delta differs by its
    rounding alone."""
    bf16 = match.base.dtype == match.trained.dtype == "bf16"
    return ("stored", "visible") if both or not bf16 else ("stored",)
