r"""All spectral metrics of a pair of matrices from its three Gram matrices, without an SVD.

Let W = U S V^T be long, [m, n] with m >= n (a wide matrix is transposed). With A = W^T W, B = W^T delta and
C = delta^T delta:

    sigma(W)^2 = eig A,   sigma(delta)^2 = eig C,   sigma(W')^2 = eig (A + B + B^T + C) = eig A'
    U_k^T delta     = S_k^-1 V_k^T B            (no long vector is formed)
    U_k^T U'_k      = S_k^-1 V_k^T (A + B) V'_k S'_k^-1

In fp64 the squares resolve singular values down to about 1e-8 sqrt(n) of the largest; the top fifth, which is inverted,
is far above that in a matrix of full rank. If it is not (`GRAM_LIMIT`), the caller uses an SVD instead.

Source: arXiv 2606.13657 (the metrics); Golub and Van Loan, 8.6; Bjorck and Golub 1973 (angles between subspaces).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from opdkernels.spectral.symmetric import eigenvalues, top_eigenvectors

# The paper's fractions: of the coordinates in a mask, and of the singular vectors in a top subspace
RATIOS = (0.01, 0.05, 0.1, 0.2)
# Rows of W^T delta summed in fp32, if the long side is at least LONG times the short one and there are LARGE elements.
BLOCK = 64
LONG = 2
LARGE = 1 << 18  # below, the rounding of few blocks does not average out, and fp64 costs little
NEAR_SINGULAR = 1e-3  # sigma_min / sigma_1 of W below which the drift needs W^T delta in fp64
GRAM_LIMIT = 1e-6  # smallest sigma_k / sigma_1 of the top fifth for which the Gram matrix gives its vectors


@dataclass(frozen=True)
class Spectra:
    """Spectra of a pair of matrices, fp64; r = min(m, n).

    Attributes:
        base, trained, delta: Singular values of W, W' and delta [r], descending.
        ranks: Number of top singular vectors for each of RATIOS.
        projection, projection_left, projection_right: Fraction of the energy of delta in the top left and right, left,
            or right singular vectors of W [ratios].
        rotation_left, rotation_right: Mean sine of the angles between the top subspaces of W and W' [ratios].
        method: "gram" or "svd".
    """

    base: torch.Tensor
    trained: torch.Tensor
    delta: torch.Tensor
    ranks: tuple[int, ...]
    projection: torch.Tensor
    projection_left: torch.Tensor
    projection_right: torch.Tensor
    rotation_left: torch.Tensor
    rotation_right: torch.Tensor
    method: str

    def to(self, device: torch.device) -> Spectra:
        """The spectra on another device."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **tensors)


def top_ranks(short: int, ratios: Sequence[float] = RATIOS) -> tuple[int, ...]:
    """Number of top singular vectors for each ratio, as the paper counts: max(1, int(ratio * min(m, n))).

    >>> top_ranks(896)
    (8, 44, 89, 179)
    """
    return tuple(max(1, int(ratio * short)) for ratio in ratios)


@dataclass(frozen=True)
class Factor:
    """Singular values of a matrix [r], descending, and its top vectors on the shorter side [r, k]."""

    sigma: torch.Tensor
    vectors: torch.Tensor

    def to(self, device: torch.device) -> Factor:
        """The factor on another device."""
        return Factor(self.sigma.to(device), self.vectors.to(device))


def roots(squares: torch.Tensor) -> torch.Tensor:
    """Singular values, descending, from the ascending eigenvalues of a Gram matrix."""
    return squares.flip(-1).clamp(min=0).sqrt()


def resolved(sigma: torch.Tensor) -> torch.Tensor:
    """Singular values below the rounding of their squares set to zero: they would add up in an entropy."""
    floor = math.sqrt(len(sigma) * torch.finfo(sigma.dtype).eps) * sigma[:1]
    return torch.where(sigma > floor, sigma, 0)


def factorise(gram: torch.Tensor, keep: int) -> Factor:
    """All singular values and the `keep` top vectors from one Gram matrix [r, r]."""
    values, vectors = top_eigenvectors(gram, keep)
    return Factor(roots(values), vectors.flip(-1).contiguous())


def factorise_matrix(matrix: torch.Tensor, keep: int) -> Factor:
    """All singular values and the `keep` top vectors from the matrix [m, n] itself, by fp64 SVD."""
    u, sigma, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Factor(sigma, (vh[:keep].T if matrix.shape[0] >= matrix.shape[1] else u[:, :keep]).contiguous())


def singular_values(gram: torch.Tensor) -> torch.Tensor:
    """Singular values [r], descending, from one Gram matrix [r, r]."""
    return roots(eigenvalues(gram))


def leading(values: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """Sums of the first k values, for each k."""
    return values.cumsum(0)[torch.tensor(ranks) - 1]


def mean_sines(cosines: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """Mean sine of the principal angles of the first k of two bases, from their inner products [K, K].

    sin^2 are the eigenvalues of 1 - M M^T, accurate to 1e-15; sines below 3e-8 are noise.
    """
    means = []
    for k in ranks:
        inner = cosines[:k, :k]
        sin_sq = torch.eye(k, dtype=inner.dtype, device=inner.device) - inner @ inner.T
        means.append(eigenvalues(sin_sq).clamp(0, 1).sqrt().mean())
    return torch.stack(means)


def from_grams(
    grams: Sequence[torch.Tensor],
    *,
    tall: bool,
    base: Factor | None = None,
    delta: Factor | None = None,
    ratios: Sequence[float] = RATIOS,
) -> Spectra | None:
    """Computes the spectra of a pair from Gram matrices.

    Args:
        grams: W^T W, W^T delta and delta^T delta over the shorter side, complete and symmetric, fp64 [r, r] each.
        tall: Whether the shorter side is the right one.
        base: Factor of W, if known.
        delta: Factor of delta, if known.
        ratios: Which fractions of the singular vectors are the top.

    Returns:
        The spectra, or None if the top fifth of W or W' is too close to singular for Gram matrices: use
        `from_matrices`.
    """
    a, b, c = grams
    short = len(a)
    ranks = top_ranks(short, ratios)
    base = base or factorise(a, ranks[-1])
    trained = factorise(a + b + b.T + c, ranks[-1])
    if min(float(f.sigma[ranks[-1] - 1]) for f in (base, trained)) <= GRAM_LIMIT * float(base.sigma[0]):
        return None
    v, v_trained = base.vectors, trained.vectors
    inverse, inverse_trained = 1 / base.sigma[: ranks[-1], None], 1 / trained.sigma[: ranks[-1]]
    long_energy = inverse * (v.T @ b)  # U_k^T delta
    both = long_energy @ v
    energy = c.diagonal().sum()
    on_long = leading(long_energy.square().sum(1), ranks) / energy
    on_short = leading((v * (c @ v)).sum(0), ranks) / energy
    both_energy = both.square().cumsum(0).cumsum(1)
    projection = torch.stack([both_energy[k - 1, k - 1] for k in ranks]) / energy
    rotation_short = mean_sines(v.T @ v_trained, ranks)
    rotation_long = mean_sines(inverse * (v.T @ ((a + b) @ v_trained)) * inverse_trained, ranks)
    left, right = (on_long, on_short) if tall else (on_short, on_long)
    rotations = (rotation_long, rotation_short) if tall else (rotation_short, rotation_long)
    return Spectra(
        base.sigma,
        trained.sigma,
        resolved(delta.sigma if delta else singular_values(c)),
        ranks,
        projection,
        left,
        right,
        *rotations,
        "gram",
    )


def compressed(blocks: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """R_w, R_d [<= 2 n, n] fp64 of long matrices W, D [m, n] given in row blocks: W = Q R_w, D = Q R_d with one
    orthonormal Q, so that they have all spectral metrics of W and D. QR block by block: memory does not grow with m."""
    r = None
    for w, d in blocks:
        both = torch.cat([w, d], 1).double()
        r = torch.linalg.qr(both if r is None else torch.cat([r, both]), mode="r").R
    assert r is not None
    half = r.shape[1] // 2
    return r[:, :half], r[:, half:]


def from_matrices(w: torch.Tensor, d: torch.Tensor, *, ratios: Sequence[float] = RATIOS) -> Spectra:
    """The spectra from W and delta [m, n] by fp64 SVD: the definition, and for nearly singular matrices."""
    w, d = w.double(), d.double()
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    u_trained, sigma_trained, vh_trained = torch.linalg.svd(w + d, full_matrices=False)
    ranks = top_ranks(min(w.shape), ratios)
    k = ranks[-1]
    u, v, u_trained, v_trained = u[:, :k], vh[:k].T, u_trained[:, :k], vh_trained[:k].T
    energy = d.square().sum()
    both = (u.T @ d @ v).square().cumsum(0).cumsum(1)
    return Spectra(
        sigma,
        sigma_trained,
        torch.linalg.svdvals(d),
        ranks,
        torch.stack([both[j - 1, j - 1] for j in ranks]) / energy,
        leading((u.T @ d).square().sum(1), ranks) / energy,
        leading((d @ v).square().sum(0), ranks) / energy,
        mean_sines(u.T @ u_trained, ranks),
        mean_sines(v.T @ v_trained, ranks),
        "svd",
    )
