"""Eigenproblems of symmetric fp64 matrices: by torch, or on the CPU by the library of `opdkernels.backends.lapack`,
which takes less than half of the time on processors of AMD and computes only the eigenvectors that are wanted.

With that library all eigenvalues come from the QR iteration (dsterf), and eigenvectors of the largest from inverse
iteration (dstein), which keeps them orthogonal to rounding. If the tridiagonal matrix splits into independent blocks,
bisection (dstebz) finds the block of each eigenvalue.

Source: LAPACK Users' Guide, 3rd edition, 2.3.4 and 2.4.4; Anderson et al. 1999.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from opdkernels.backends import lapack

SAFE_EXPONENT = 300  # magnitudes of 2^-300 to 2^300 are factorised as they are
MIN_ROWS = 64  # for fewer, calls cost more than they save
BLOCK = 64  # columns that a reduction handles at a time: the size of workspaces
REFLECTOR_BLOCK = 65 * 64  # elements of the workspace of dormtr for the triangular factor of its block reflectors


def eigenvalues(matrix: torch.Tensor) -> torch.Tensor:
    """All eigenvalues of a symmetric matrix.

    Args:
        matrix: fp64 [n, n], symmetric, with both triangles; on any device. Gradients are not computed.

    Returns:
        fp64 [n], ascending.

    Raises:
        ValueError: The matrix is not fp64 or not square.
        RuntimeError: The matrix has NaN or Inf, or an iteration does not converge.
        UsageError: OPDKERNELS_LAPACK is not valid, or names a library that is not there.

    Examples:
        >>> eigenvalues(torch.tensor([[2.0, 1], [1, 2]], dtype=torch.float64)).round(decimals=9).tolist()
        [1.0, 3.0]
    """
    matrix = validated(matrix)
    if not uses_openblas(matrix):
        return torch.linalg.eigvalsh(matrix)
    form = Tridiagonal.of(matrix)
    return torch.from_numpy(form.unscaled(form.values()))


def top_eigenvectors(matrix: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All eigenvalues of a symmetric matrix, and the eigenvectors of the `keep` largest.

    Args:
        matrix: As for `eigenvalues`.
        keep: 1 to n.

    Returns:
        fp64 [n], ascending, and fp64 [n, keep], whose columns belong to the last `keep` of them.

    Raises:
        ValueError, RuntimeError, UsageError: As `eigenvalues`, or `keep` is not 1 to n.

    Examples:
        >>> values, vectors = top_eigenvectors(torch.diag(torch.tensor([2.0, 5, 3], dtype=torch.float64)), 1)
        >>> values.tolist(), vectors.abs().flatten().tolist()
        ([2.0, 3.0, 5.0], [0.0, 1.0, 0.0])
    """
    matrix = validated(matrix)
    if not 1 <= keep <= len(matrix):
        raise ValueError(f"keep must be 1 to {len(matrix)}, not {keep}")
    if uses_openblas(matrix):
        form = Tridiagonal.of(matrix)
        values = form.values()
        vectors = form.top_vectors(values, keep)
        if vectors is not None:
            return torch.from_numpy(form.unscaled(values)), torch.from_numpy(vectors).T
    values_and_vectors = torch.linalg.eigh(matrix)
    return values_and_vectors.eigenvalues, values_and_vectors.eigenvectors[:, -keep:]


def validated(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix without its gradient. Raises ValueError unless it is fp64 and square."""
    if matrix.dtype != torch.float64 or matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"the matrix must be float64 [n, n], not {matrix.dtype} {list(matrix.shape)}")
    return matrix.detach()


def uses_openblas(matrix: torch.Tensor) -> bool:
    """Whether NumPy's OpenBLAS factorises a matrix."""
    return matrix.device.type == "cpu" and len(matrix) >= MIN_ROWS and lapack.openblas() is not None


@dataclass(frozen=True)
class Tridiagonal:
    """The tridiagonal form of a symmetric matrix divided by 2^exponent.

    Attributes:
        diagonal, off_diagonal: [n], [n - 1].
        reflectors, factors: Householder vectors and their factors `tau`, with which dormtr turns its eigenvectors into
            those of the matrix [n, n], [n - 1].
        exponent: Such that no product leaves the range of fp64; 0 for most matrices.
    """

    diagonal: np.ndarray
    off_diagonal: np.ndarray
    reflectors: np.ndarray
    factors: np.ndarray
    exponent: int

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Tridiagonal:
        """From a complete matrix. Raises RuntimeError if it has NaN or Inf."""
        reflectors = np.array(matrix.numpy(), order="C")  # its rows are the columns of Fortran
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
        """All its eigenvalues [n], ascending."""
        values, off_diagonal = self.diagonal.copy(), self.off_diagonal.copy()
        if lapack.call("dsterf", len(values), values, off_diagonal):
            raise RuntimeError("the iteration for the eigenvalues does not converge")
        return values

    def unscaled(self, values: np.ndarray) -> np.ndarray:
        """Eigenvalues of the matrix, from its own; infinite where fp64 cannot hold them."""
        with np.errstate(over="ignore"):
            return np.ldexp(values, self.exponent)

    def splits(self) -> bool:
        """Whether an off-diagonal element is so small that dstebz takes the form as several blocks."""
        products = np.abs(self.diagonal[1:] * self.diagonal[:-1])
        limits = np.finfo(np.float64)
        return bool((self.off_diagonal**2 <= products * limits.eps**2 + limits.tiny).any())

    def top_vectors(self, values: np.ndarray, keep: int) -> np.ndarray | None:
        """Eigenvectors of the matrix [keep, n] for the largest of `values`, ascending; None if one does not
        converge."""
        n = len(self.diagonal)
        tops = values[-keep:].copy()
        vectors = np.empty((keep, n))
        blocks, ends = np.ones(n, np.int64), np.full(n, n, np.int64)  # one block, which ends at row n
        failed, integers = np.zeros(keep, np.int64), np.zeros(3 * n, np.int64)
        work = np.empty(max(5 * n, BLOCK * keep + REFLECTOR_BLOCK))
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
        values, num_values, num_blocks = np.empty(n), np.zeros(1, np.int64), np.zeros(1, np.int64)
        smallest = 2 * float(np.finfo(np.float64).tiny)  # of an interval: the most accurate eigenvalues
        failed = lapack.call(
            "dstebz", "I", "B", n, 0.0, 0.0, n - keep + 1, n, smallest, self.diagonal, self.off_diagonal, num_values,
            num_blocks, values, blocks, ends, work, integers,
        )  # fmt: skip
        tops[:] = values[:keep]
        return not failed and bool(num_values[0] == keep)
