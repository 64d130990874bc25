"""Eigenproblems of symmetric fp64 matrices: by torch, or on the CPU by the library of `opdkernels.backends.lapack`.

With that library all eigenvalues come from the QR iteration (dsterf), and eigenvectors of the largest from inverse
iteration (dstein), which keeps them orthogonal to rounding. Where the tridiagonal form falls into blocks, bisection
(dstebz) finds the block of each eigenvalue.

Source: LAPACK Users' Guide, 3rd edition, 2.3.4 and 2.4.4; Anderson et al. 1999.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from opdkernels.backends import lapack

SAFE_EXPONENT = 300  # magnitudes of 2^-300 to 2^300 are factorised as they are
SMALL = 64  # rows below which calls cost more than they save
BLOCK = 64  # columns that a reduction handles at a time: the size of workspaces


def eigenvalues(matrix: torch.Tensor) -> torch.Tensor:
    """All eigenvalues of a symmetric matrix.

    Args:
        matrix: fp64 [n, n], complete; on any device.

    Returns:
        fp64 [n], ascending.

    Raises:
        RuntimeError: The matrix has NaN or Inf, or an iteration does not converge.
        UsageError: OPDKERNELS_LAPACK is not valid, or names a library that is not there.

    Example:
        >>> eigenvalues(torch.tensor([[2.0, 1], [1, 2]], dtype=torch.float64)).tolist()
        [1.0, 3.0]
    """
    if not uses_openblas(matrix):
        return torch.linalg.eigvalsh(matrix)
    return torch.from_numpy(Tridiagonal.of(matrix).values())


def top_eigenvectors(matrix: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All eigenvalues of a symmetric matrix, and the eigenvectors of the `keep` largest.

    Args:
        matrix: fp64 [n, n], complete; on any device.
        keep: 1 to n.

    Returns:
        fp64 [n], ascending, and fp64 [n, keep], in the order of the eigenvalues.

    Raises:
        RuntimeError, UsageError: As `eigenvalues`.
    """
    if uses_openblas(matrix):
        form = Tridiagonal.of(matrix)
        values = form.values()
        vectors = form.top_vectors(values, keep)
        if vectors is not None:
            return torch.from_numpy(values), torch.from_numpy(vectors).T
    values_and_vectors = torch.linalg.eigh(matrix)
    return values_and_vectors.eigenvalues, values_and_vectors.eigenvectors[:, -keep:]


def uses_openblas(matrix: torch.Tensor) -> bool:
    """Whether NumPy's OpenBLAS factorises a matrix."""
    return matrix.device.type == "cpu" and len(matrix) >= SMALL and lapack.openblas() is not None


@dataclass(frozen=True)
class Tridiagonal:
    """The tridiagonal form of a symmetric matrix divided by 2^exponent.

    Attributes:
        diagonal, off_diagonal: [n], [n - 1].
        reflectors, factors: What turns its eigenvectors into those of the matrix [n, n], [n - 1].
        exponent: Such that no product leaves the range of fp64.
    """

    diagonal: np.ndarray
    off_diagonal: np.ndarray
    reflectors: np.ndarray
    factors: np.ndarray
    exponent: int

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Tridiagonal:
        """From a complete matrix. Raises RuntimeError if it has NaN or Inf."""
        reflectors = np.array(matrix.detach().numpy(), order="C")  # its rows are the columns of Fortran
        largest = float(np.abs(reflectors).max())
        if not math.isfinite(largest):
            raise RuntimeError("the matrix contains NaN or Inf, so that it has no eigenvalues")
        exponent = math.frexp(largest)[1]
        exponent = exponent if abs(exponent) > SAFE_EXPONENT else 0
        if exponent:
            reflectors = np.ldexp(reflectors, -exponent)
        n = len(reflectors)
        diagonal, off_diagonal, factors, work = (np.empty(size) for size in (n, n - 1, n - 1, BLOCK * n))
        lapack.call("dsytrd", "L", n, reflectors, n, diagonal, off_diagonal, factors, work, work.size)
        return cls(diagonal, off_diagonal, reflectors, factors, exponent)

    def values(self) -> np.ndarray:
        """All eigenvalues of the matrix [n], ascending."""
        values, off_diagonal = self.diagonal.copy(), self.off_diagonal.copy()
        if lapack.call("dsterf", len(values), values, off_diagonal):
            raise RuntimeError("the iteration for the eigenvalues does not converge")
        return np.ldexp(values, self.exponent)

    def splits(self) -> bool:
        """Whether an off-diagonal element is so small that the form consists of several blocks."""
        products = np.abs(self.diagonal[1:] * self.diagonal[:-1])
        limits = np.finfo(np.float64)
        return bool((self.off_diagonal**2 <= products * limits.eps**2 + limits.tiny).any())

    def top_vectors(self, values: np.ndarray, keep: int) -> np.ndarray | None:
        """Eigenvectors of the matrix [keep, n] for the largest of its eigenvalues, ascending; None if one does not
        converge."""
        n = len(self.diagonal)
        tops = np.ldexp(values[-keep:], -self.exponent)
        vectors = np.empty((keep, n))
        blocks, ends = np.ones(n, np.int64), np.full(n, n, np.int64)  # one block, which ends at row n
        failed, integers, work = np.zeros(keep, np.int64), np.zeros(3 * n, np.int64), np.empty(max(5 * n, BLOCK * keep))
        if self.splits() and not self.find_blocks(tops, blocks, ends, work, integers):
            return None
        band = n, self.diagonal, self.off_diagonal
        if lapack.call("dstein", *band, keep, tops, blocks, ends, vectors, n, work, integers, failed):
            return None
        ascending = np.ascontiguousarray(vectors[np.argsort(tops, kind="stable")])
        lapack.call("dormtr", "L", "L", "N", n, keep, self.reflectors, n, self.factors, ascending, n, work, work.size)
        return ascending

    def find_blocks(
        self, tops: np.ndarray, blocks: np.ndarray, ends: np.ndarray, work: np.ndarray, integers: np.ndarray
    ) -> bool:
        """Replaces the largest eigenvalues by those of bisection, in the order of their blocks, and sets the block of
        each and where blocks end. Returns whether it succeeded."""
        n, keep = len(self.diagonal), len(tops)
        values, found, num_blocks = np.empty(n), np.zeros(1, np.int64), np.zeros(1, np.int64)
        smallest = 2 * float(np.finfo(np.float64).tiny)  # of an interval: bisection down to rounding
        failed = lapack.call(
            "dstebz", "I", "B", n, 0.0, 0.0, n - keep + 1, n, smallest, self.diagonal, self.off_diagonal, found,
            num_blocks, values, blocks, ends, work, integers,
        )  # fmt: skip
        tops[:] = values[:keep]
        return not failed and found[0] == keep
