r"""Batched randomized SVD: the top of a spectrum from few passes over the matrices, with bounds that hold.

Let A be long, [m, n] with m >= n (a wide matrix is transposed). From a random block X on the short side an
orthonormal Q grows to span the block Krylov space {X, A^T A X, (A^T A)^2 X, ...}, or subspace iteration replaces it by
A^T A Q again and again. With the remainder E = A - A Q Q^T, known from |E|_F^2 = |A|_F^2 - |A Q|_F^2,

    sum_{j<=i} sigma_j(A Q)^2  <=  sum_{j<=i} sigma_j(A)^2  <=  sum_{j<=i} sigma_j(A Q)^2 + |E|_F^2.

Krylov needs far fewer passes than subspace iteration if the spectrum is flat, as for sparse updates.

The search runs in fp32 (fp64 for fp64 input). Its rounding makes the subspace worse but no result wrong: singular
values, vectors and bounds are computed from the best directions in fp64.

Source: Halko, Martinsson and Tropp 2011 (subspace iteration); Musco and Musco 2015 (block Krylov); Yamamoto et al.
2015 (CholeskyQR2); Fukaya et al. 2020 (its shifted form: a Householder QR replaces it here and also completes a
rank-deficient block); Higham 2002, chapters 3 and 19 (rounding).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from operator import index as integer
from typing import Any

import torch

from opdkernels.ops.delta import DTYPES

PANEL = 256  # columns per partial sum: a sum of n products is then off by PANEL + n / PANEL roundings, not n
TILE = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements widened to fp64 at once: fits a cache, or fills a GPU
GROUP_BYTES = {"cpu": 1 << 23, "cuda": 1 << 30}  # matrices processed together; on a CPU only small ones gain from it
SAFE_EXPONENT = 20  # within 2^+-20 a product of three factors is far from fp32 overflow and underflow
TINY = 1e-300  # replaces zero denominators
METHODS = ("krylov", "subspace")


@dataclass(frozen=True, eq=False)
class RandomizedSVD:
    """The top of the spectrum of one matrix A [m, n], on its device; values in fp64, vectors in fp32 (fp64 for fp64
    input).

    Attributes:
        sigma: Singular values [rank], descending.
        u: Left singular vectors [m, rank], orthonormal, of any sign; to rounding, A v = sigma u, or A^T u = sigma v
            for a wide A.
        v: Right singular vectors [n, rank].
        lower: Lower bounds of the true singular values [rank], rounding included.
        upper: Upper bounds of the true singular values [rank].
        frobenius: |A|_F.
        remainder: At most this fraction of |A|_F^2 is missing from the sum of squares of `sigma`, for any number of
            leading values: the energy outside the subspace, and rounding.
        passes: Number of products of A or its transpose with a block.
        converged: Whether the tolerance was met.
        method: "krylov" or "subspace".
    """

    sigma: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    frobenius: float
    remainder: float
    passes: int
    converged: bool
    method: str

    def energy(self, k: int) -> tuple[float, float]:
        """Lower and upper bound of the fraction of |A|_F^2 in the top k singular values; NaN for a zero matrix."""
        if not 1 <= k <= len(self.sigma):
            raise ValueError(f"k must be in 1 .. {len(self.sigma)}, the computed rank, not {k}")
        if not self.frobenius:
            return math.nan, math.nan
        values = (self.lower, self.sigma, self.upper)
        low, computed, high = (float((x[:k] / self.frobenius).square().sum()) for x in values)
        return low, min(computed + self.remainder, high, 1.0)

    def to(self, device: torch.device) -> RandomizedSVD:
        """The result on another device."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **tensors)


def unit(like: torch.Tensor) -> float:
    """Unit roundoff of products of matrices like this one: of TF32 or bf16 if torch may use them for fp32."""
    if like.dtype == torch.float64:
        return 2.0**-53
    backend = torch.backends.cuda if like.is_cuda else torch.backends.mkldnn
    return {"tf32": 2.0**-11, "bf16": 2.0**-8}.get(backend.matmul.fp32_precision, 2.0**-24)


def shifted(x, exponent: int):
    """x * 2^exponent, in two steps: 2^exponent itself may be out of range."""
    return x * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)


def tiles(a: torch.Tensor) -> list[slice]:
    """Row blocks of a [b, m, n]: small enough to be widened, long enough for matrix products."""
    step = max(128, TILE["cuda" if a.is_cuda else "cpu"] // (a.shape[0] * a.shape[2]))
    return [slice(first, first + step) for first in range(0, a.shape[1], step)]


def inner(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x^T y in fp64, of [b, m, k] and [b, m, l]."""
    total = x.new_zeros(x.shape[0], x.shape[2], y.shape[2], dtype=torch.float64)
    for rows in tiles(x):
        total.baddbmm_(x[:, rows].double().mT, y[:, rows].double())
    return total


def multiply(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """a x in the dtype of a, of [b, m, n] and [b, n, k], summed by panels."""
    product = a.new_zeros(a.shape[0], a.shape[1], x.shape[2])
    for first in range(0, a.shape[2], PANEL):
        product.baddbmm_(a[:, :, first : first + PANEL], x[:, first : first + PANEL])
    return product


def norms(a: torch.Tensor) -> torch.Tensor:
    """Frobenius norms [b] of a [b, m, n], in fp64."""
    return torch.stack([a[:, rows].double().square().sum((1, 2)) for rows in tiles(a)]).sum(0).sqrt()


def gaussian(seed: int, n: int, width: int) -> torch.Tensor:
    """Normal samples, fp64 [n, width], drawn on the CPU so that the start is the same on every device."""
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormalise(w: torch.Tensor, basis: torch.Tensor, tries: int = 4) -> torch.Tensor:
    """An orthonormal basis of w [b, n, k], orthogonal to `basis` [b, n, l], by CholeskyQR2 with Gram matrices in fp64.

    A rank-deficient block is completed with random directions by a Householder QR.
    """
    kind = torch.finfo(w.dtype)
    limit = max(100 * kind.eps, 1e-7)  # relative limit of the pivots: the Gram matrix squares them
    for _ in range(2):
        w = w - basis @ (basis.mT @ w)
        w = w / w.square().sum(1, keepdim=True).sqrt().clamp(min=kind.tiny)
        factor, info = torch.linalg.cholesky_ex(inner(w, w))
        failed = (info != 0) | ~(factor.diagonal(dim1=1, dim2=2).amin(1) > limit)
        factor[failed] = torch.eye(w.shape[2], dtype=factor.dtype, device=w.device)
        w = torch.linalg.solve_triangular(factor.mT.to(w.dtype), w, upper=True, left=False)
        if tries and failed.any():
            # One seed per width and try: earlier samples may already be in the basis.
            noise = kind.eps * gaussian(8 * basis.shape[2] + tries, w.shape[1], w.shape[2]).to(w)
            w[failed] = orthonormalise(torch.linalg.qr(w[failed] + noise).Q, basis[failed], tries - 1)
    return w


@dataclass
class SearchResult:
    """Final state of the search for some matrices of a group: `index` [b], `basis` Q [b, n, l], `images` A Q [b, m,
    l], their Gram matrix [b, l, l]."""

    index: torch.Tensor
    basis: torch.Tensor
    images: torch.Tensor
    gram: torch.Tensor
    converged: torch.Tensor
    passes: int


def search(
    a: torch.Tensor, q: torch.Tensor, square: torch.Tensor, rank: int, tolerance: float, method: str, max_passes: int
) -> Iterator[SearchResult]:
    """Grows a basis for each of a [b, m, n] from q [b, n, k] and yields each result when it is done; `square` [b] is
    |A|_F^2.

    A search is done if the remainder proves every sigma to the tolerance, if the basis spans the space, or if, with
    changes that keep shrinking at the same rate, less than half the tolerance remains for each sigma and the sum of
    squares.
    """
    n, index = q.shape[1], torch.arange(len(a), device=a.device)
    noise = 64 * (2.0**-53 + unit(a) ** 2) * square  # of a squared sigma: rounding of the Gram matrix and of A Q
    before, change = square.new_zeros(len(a), rank), square.new_ones(len(a))
    basis, images, passes = q, multiply(a, q), 1
    gram = inner(images, images)
    while True:
        values = torch.linalg.eigvalsh(gram).flip(-1)[:, :rank].clamp(min=0)
        remainder = (square - gram.diagonal(dim1=1, dim2=2).sum(1)).clamp(min=0) + 16 * unit(a) * square
        relative_change = ((values - before).abs() - noise[:, None]).clamp(min=0) / (2 * values).clamp(min=TINY)
        relative_change = relative_change.amax(1).maximum(
            (values - before).sum(1).abs() / values.sum(1).clamp(min=TINY)
        )
        factor = (relative_change / change.clamp(min=TINY)).clamp(max=0.9)
        settled = 2 * relative_change * factor / (1 - factor) <= tolerance
        before, change = values, relative_change
        converged = settled | (remainder <= tolerance * values[:, -1]) | (basis.shape[2] == n)
        done = converged | (passes + 4 > max_passes)
        if done.any():
            ended = slice(None) if done.all() else done  # slice(None) avoids a copy
            yield SearchResult(index[ended], basis[ended], images[ended], gram[ended], converged[ended], passes)
            if done.all():
                return
            a, q, basis, images, gram, index, square, noise, before, change = (
                x[~done] for x in (a, q, basis, images, gram, index, square, noise, before, change)
            )
        if method == "subspace":
            # Ritz vectors first: each column is then accurate relative to its own norm, for any norms.
            vectors = torch.linalg.eigh(gram).eigenvectors.to(a)
            basis = orthonormalise(a.mT @ (images @ vectors), basis[:, :, :0])
            images = multiply(a, basis)
            gram = inner(images, images)
        else:
            q = orthonormalise((a.mT @ images[:, :, -q.shape[2] :])[:, :, : n - basis.shape[2]], basis)
            image = multiply(a, q)
            basis, images = torch.cat([basis, q], 2), torch.cat([images, image], 2)
            column = inner(images, image)
            gram = torch.cat([torch.cat([gram, column[:, : gram.shape[1]]], 2), column.mT], 1)
        passes += 2


def remainder_norms(a: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms [b] of E = a - y v^T and of E^T y for y = a v, in fp64 and one pass."""
    square, residual = torch.zeros_like(v[:, 0, 0]), torch.zeros_like(v)
    for rows in tiles(a):
        error = a[:, rows].double() - y[:, rows] @ v.mT
        square += error.square().sum((1, 2))
        residual.baddbmm_(error.mT, y[:, rows])
    return square.sqrt(), norms(residual)


def excess(result: SearchResult, values: torch.Tensor, sums: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """Upper bound [b] of how much the sums of the top squares of A exceed `sums` [b, rank], from the complete basis Q.

    The error of A Q is at most |A|_F |Q|_F (PANEL + n / PANEL) roundings for any order of summation; |Q^T Q - 1| is
    measured.
    """
    n, width = result.basis.shape[1:]
    skew = norms(inner(result.basis, result.basis) - torch.eye(width, dtype=torch.float64, device=sums.device))
    off = 1.01 * unit(result.basis) * (PANEL + n / PANEL + 2) * (square * width * (1 + skew)).sqrt()
    within = (values.sum(1).sqrt() - off).clamp(min=0).square() / (1 + skew)
    top = (values[:, : sums.shape[1]].cumsum(1).sqrt() + off[:, None]).square() / (1 - skew).clamp(min=TINY)[:, None]
    return square - within + (top - sums).amax(1).clamp(min=0)


def certify(a: torch.Tensor, norm: torch.Tensor, result: SearchResult, rank: int) -> tuple[torch.Tensor, ...]:
    """sigma, u, v, lower, upper, the remainder and the passes of a [b, m, n], in fp64, from the search result.

    With V the best directions, orthonormal to fp64, E = A - A V V^T, c = |E|_F^2, r = |E^T A V|_F, s_i = sigma_i(A V),
    each sigma_i^2 is at most

        s_i^2 + c                                                        as A A^T = A V V^T A^T + E E^T (Weyl)
        the larger eigenvalue of [[s_i^2, r], [r, c]]                    which is far less if r is small
        S / i  and  S - sum_{j<i} lower_j^2                              with S >= sum_{j<=i} sigma_j^2

    The second: in the basis of V and its complement A^T A = [[T, R^T], [R, C]] with |R| <= r and C <= c. For any x > c
    it is at most diag(T + r^2 / (x - c), x), by its Schur complement, and the eigenvalue is x = s_i^2 + r^2 / (x - c).
    S comes from V or from the complete basis of the search: its remainder is smaller but less precise.
    """
    square = norm.square()
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh(result.gram))
    faint = (values[:, rank - 1] < 1e-10 * values[:, 0]) & (a.dtype == torch.float64)
    if faint.any():  # their squares are below the precision of fp64
        vectors[faint] = torch.linalg.svd(torch.linalg.qr(result.images[faint]).R).Vh.mT
    v = result.basis.double() @ vectors[:, :, :rank]
    v = orthonormalise(v, v[:, :, :0])
    left, small = torch.linalg.qr(torch.cat([a[:, rows].double() @ v for rows in tiles(a)], 1))
    u, sigma, vh = torch.linalg.svd(small)
    u, v = left @ u, v @ vh.mT
    sums = sigma.square().cumsum(1)
    remainder = (square - sums[:, -1]).clamp(min=0).sqrt()
    residual = remainder * norm
    close = remainder < sigma[:, 0]  # here the residual is tighter, and the difference of squares may be pure rounding
    if close.any():
        remainder[close], residual[close] = remainder_norms(a[close], u[close] * sigma[close, None], v[close])
    slack = 4 * (a.shape[1] + a.shape[2]) * rank * 2.0**-53 * norm  # rounding of products, QR and SVD in fp64
    lower = (sigma - slack[:, None]).clamp(min=0)
    most = (sigma + slack[:, None]).square()
    c, r = (remainder + slack).square()[:, None], (residual + 3 * slack * norm)[:, None]
    basis_excess = excess(result, values.clamp(min=0), sums, square) + slack * norm
    beyond = basis_excess.minimum(c[:, 0] + slack * (2 * norm + slack))
    top = sums + beyond[:, None]
    bounds = (
        most + c,
        (most + c + torch.hypot(most - c, 2 * r)) / 2,
        top / torch.arange(1, rank + 1, device=a.device),
        top - (lower.square().cumsum(1) - lower.square()),
    )
    upper = torch.stack(bounds).amin(0).sqrt().maximum(sigma)
    return sigma, u, v, lower, upper, (beyond / square.clamp(min=TINY)).clamp(max=1), result.passes + 1 + close.int()


def exponent_of(tensor: torch.Tensor, label: str) -> int:
    """The power of two to divide by so that no product leaves the range of fp32; 0 if none can."""
    low, high = (float(x) for x in torch.aminmax(tensor))
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(f"{label} contains NaN or Inf; replace them, or omit the matrix")
    exponent = math.frexp(max(-low, high))[1]
    return exponent if abs(exponent) > SAFE_EXPONENT else 0


def prepare(tensor: torch.Tensor, exponent: int) -> torch.Tensor:
    """The matrix as [m, n] with m >= n in fp32 or fp64, scaled; copied only if necessary."""
    wide = tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()
    wide = wide.mT if wide.shape[0] < wide.shape[1] else wide
    return shifted(wide, -exponent) if exponent else wide


def start(name: str, seed: int, n: int, width: int) -> torch.Tensor:
    """The start block [n, width] of a search, determined by the arguments alone; the identity if it spans the space."""
    if width == n:
        return torch.eye(n, dtype=torch.float64)
    digest = blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    q = gaussian(int.from_bytes(digest, "little") >> 1, n, width)
    return orthonormalise(q[None], q[None, :, :0])[0]


def validate_matrices(items: Sequence[torch.Tensor], labels: Sequence[str], rank: int) -> None:
    """Raises TypeError or ValueError if the matrices cannot be processed in one call."""
    if len(labels) != len(items):
        raise ValueError(f"{len(labels)} names for {len(items)} matrices; give one for each")
    for label, item in zip(labels, items, strict=True):
        if not isinstance(item, torch.Tensor) or item.dtype not in DTYPES:
            kind = item.dtype if isinstance(item, torch.Tensor) else type(item).__name__
            raise TypeError(f"{label} is {kind}; randomized_svd takes bfloat16, float16, float32 and float64 tensors")
        if item.dtype != items[0].dtype:
            raise TypeError(f"{label} is {item.dtype}, {labels[0]} {items[0].dtype}; convert one, or call twice")
        if item.device != items[0].device:
            raise ValueError(f"{label} is on {item.device}, {labels[0]} on {items[0].device}; move one of them")
        if item.ndim != 2 or not item.numel():
            raise ValueError(f"{label} has shape {list(item.shape)}; randomized_svd takes matrices of at least 1 x 1")
        if not 1 <= rank <= min(item.shape):
            raise ValueError(f"rank must be in 1 .. {min(item.shape)}, the smaller side of {label}, not {rank}")


def solve(
    tensors: Sequence[torch.Tensor], exponents: Sequence[int], starts: Sequence[torch.Tensor], rank: int, *options
) -> Iterator[tuple[int, RandomizedSVD]]:
    """Yields the index and result of each matrix of one shape or its transpose. options: tolerance, method,
    max_passes."""
    long = list(map(prepare, tensors, exponents))
    a = torch.stack(long) if len(long) > 1 else long[0][None]
    norm = norms(a)
    for result in search(a, torch.stack(list(starts)).to(a), norm.square(), rank, *options):
        solved = certify(a if len(result.index) == len(a) else a[result.index], norm[result.index], result, rank)
        for i, converged, *values in zip(result.index.tolist(), result.converged.tolist(), *solved, strict=True):
            sigma, u, v, lower, upper, remainder, passes = values
            sigma, lower, upper, frobenius = (shifted(x, exponents[i]) for x in (sigma, lower, upper, float(norm[i])))
            u, v = (x.to(a.dtype) for x in ((v, u) if tensors[i].shape[0] < tensors[i].shape[1] else (u, v)))
            outcome = float(remainder), int(passes), converged, options[1]
            yield i, RandomizedSVD(sigma, u, v, lower, upper, frobenius, *outcome)


@torch.no_grad()
def randomized_svd(
    matrices: torch.Tensor | Sequence[torch.Tensor],
    rank: int,
    *,
    names: Sequence[str] | None = None,
    seed: int = 0,
    tolerance: float = 1e-4,
    method: str = "krylov",
    block: int | None = None,
    max_passes: int = 100,
) -> RandomizedSVD | list[RandomizedSVD]:
    """Computes the `rank` largest singular values of matrices, their vectors, and bounds.

    TF32 (torch.backends.cuda.matmul.allow_tf32) makes the search coarser and the bounds wider, not wrong.

    Args:
        matrices: [m, n], [b, m, n], or a list of [m, n] of any shapes; bf16, fp16, fp32 or fp64, any strides, one
            device. Matrices of one shape are processed together.
        rank: Number of singular values, 1 to the smaller side.
        names: One name per matrix; with `seed` it determines the random start block. Without names all start alike.
            Order, grouping and workers change at most the last bits.
        seed: Seed of the start blocks.
        tolerance: Relative tolerance of each sigma; an estimate, unlike the bounds. It is reachable in fp32 only down
            to 2e-13 |A|_F^2 of a square, in fp64 to 7e-15.
        method: "krylov", or "subspace", whose memory does not grow but which needs more passes.
        block: Columns added at once, at least rank; by default max(rank, 16), 16 more for "subspace", and the complete
            smaller side if it has fewer than four times as many, which is exact.
        max_passes: At least 4; up to (m + n) * block * max_passes / 2 elements are stored besides the matrix.

    Returns:
        One result for a single matrix, else a list.

    Raises:
        TypeError: The dtype is not supported, or dtypes differ.
        ValueError: A matrix contains NaN or Inf, or an argument is out of range.

    Examples:
        >>> result = randomized_svd(torch.diag(torch.tensor([3.0, 2, 1])), 2)
        >>> [round(x, 9) for x in result.sigma.tolist()], round(result.energy(1)[0], 9)
        ([3.0, 2.0], 0.642857143)
    """
    rank, single = integer(rank), isinstance(matrices, torch.Tensor) and matrices.ndim == 2
    if isinstance(matrices, torch.Tensor) and matrices.ndim not in (2, 3):
        raise ValueError(f"matrices has shape {list(matrices.shape)}; pass [m, n], [b, m, n] or a list of [m, n]")
    for name, value, fits, range_ in (
        ("method", method, method in METHODS, f"one of {', '.join(METHODS)}"),
        ("tolerance", tolerance, 0 < tolerance < 1, "between 0 and 1"),
        ("block", block, block is None or block >= rank, f"at least the rank, {rank}"),
        ("max_passes", max_passes, max_passes >= 4, "at least 4"),
    ):
        if not fits:
            raise ValueError(f"{name} must be {range_}, not {value}")
    items: list[torch.Tensor] = [matrices] if single else list(matrices)  # type: ignore[list-item]
    seeds = [""] * len(items) if names is None else [names] if isinstance(names, str) else list(names)
    labels = [f"matrix {i}" for i in range(len(items))] if names is None else seeds
    validate_matrices(items, labels, rank)
    exponents = list(map(exponent_of, items, labels))
    groups: dict[tuple[int, int], list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault((max(item.shape), min(item.shape)), []).append(i)
    results: dict[int, RandomizedSVD] = {}
    for (m, n), members in groups.items():
        width = block or max(rank, 16) + (16 if method == "subspace" else 0)
        width = n if block is None and 4 * width > n else min(width, n)
        size = max(1, GROUP_BYTES["cuda" if items[0].is_cuda else "cpu"] // (4 * m * n))
        for first in range(0, len(members), size):
            chosen = members[first : first + size]
            tensors, starts = [items[i] for i in chosen], [start(seeds[i], seed, n, width) for i in chosen]
            for k, result in solve(
                tensors, [exponents[i] for i in chosen], starts, rank, tolerance, method, max_passes
            ):
                results[chosen[k]] = result
    return results[0] if single else [results[i] for i in range(len(items))]
