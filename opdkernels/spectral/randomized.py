r"""Batched randomized SVD: the top of a spectrum from few passes over the matrices, with bounds that hold.

Let A be long, [m, n] with m >= n (of a wide matrix: its transpose). From a random block X on the short side an
orthonormal Q grows to span the block Krylov space {X, A^T A X, (A^T A)^2 X, ...}, or subspace iteration replaces it by
A^T A Q again and again. With the remainder E = A - A Q Q^T, known from |E|_F^2 = |A|_F^2 - |A Q|_F^2,

    sum_{j<=i} sigma_j(A Q)^2  <=  sum_{j<=i} sigma_j(A)^2  <=  sum_{j<=i} sigma_j(A Q)^2 + |E|_F^2.

Krylov needs far fewer passes than subspace iteration where the spectrum is flat, as those of sparse updates are.

The search runs in fp32 (in fp64 for fp64 input); what it loses to rounding makes the subspace worse, no figure wrong:
singular values, vectors and bounds come from the best directions found, in fp64.

Source: Halko, Martinsson and Tropp 2011 (subspace iteration); Musco and Musco 2015 (block Krylov); Yamamoto et al. 2015
(CholeskyQR2); Fukaya et al. 2020 (its shifted form: a Householder QR takes its place here, which also completes a block
that is short of rank); Higham 2002, chapters 3 and 19 (rounding).
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

PANEL = 256  # columns summed in one go: a sum of n products is then off by PANEL + n / PANEL roundings, not by n
TILE = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements widened to fp64 at a time: what a cache holds, or fills a GPU
GROUP_BYTES = {"cpu": 1 << 23, "cuda": 1 << 30}  # worked on together; on a CPU only small matrices gain by it
SAFE_EXPONENT = 20  # within 2^+-20 a product of three is far from overflow and underflow in fp32
TINY = 1e-300  # instead of a zero to divide by
METHODS = ("krylov", "subspace")


@dataclass(frozen=True, eq=False)
class RandomizedSVD:
    """The top of the spectrum of one matrix A [m, n], on its device; values in fp64, vectors in fp32 (fp64 for fp64).

    `sigma` [rank]: singular values, descending. `u` [m, rank], `v` [n, rank]: their vectors, orthonormal, of any sign;
    to rounding A v = sigma u, or A^T u = sigma v for a wide A. `lower`, `upper` [rank]: what each true singular value
    lies between, rounding included. `frobenius`: |A|_F. `remainder`: at most this share of |A|_F^2, 0 .. 1, is missing
    from the squares of `sigma`, however many of the top are summed: what lies outside the subspace found, and rounding.
    `passes`: how often A or its transpose was multiplied by a block. `converged`: whether the tolerance was met.
    `method`: "krylov" or "subspace".
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
        """Bounds of the share of |A|_F^2, 0 .. 1, in the top k singular values; NaN for a zero matrix."""
        if not 1 <= k <= len(self.sigma):
            raise ValueError(f"k must lie in 1 .. {len(self.sigma)}, the rank computed, not {k}")
        if not self.frobenius:
            return math.nan, math.nan
        shares = [float((x[:k] / self.frobenius).square().sum()) for x in (self.lower, self.sigma, self.upper)]
        low, found, high = shares
        return low, min(found + self.remainder, high, 1.0)

    def to(self, device: torch.device) -> RandomizedSVD:
        """The same on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def unit(like: torch.Tensor) -> float:
    """Unit roundoff of products of matrices like this one: of TF32 or bf16 where torch may use them for fp32."""
    if like.dtype == torch.float64:
        return 2.0**-53
    backend = torch.backends.cuda if like.is_cuda else torch.backends.mkldnn
    return {"tf32": 2.0**-11, "bf16": 2.0**-8}.get(backend.matmul.fp32_precision, 2.0**-24)


def shifted(x, exponent: int):
    """x * 2^exponent, in two steps: 2^exponent itself may lie outside the range of x."""
    return x * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)


def tiles(a: torch.Tensor) -> list[slice]:
    """Row blocks of a [b, m, n] small enough to be widened, long enough for matrix products."""
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
    """fp64 [n, width], drawn on the CPU so that every device begins alike."""
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormalise(w: torch.Tensor, basis: torch.Tensor, tries: int = 4) -> torch.Tensor:
    """An orthonormal basis of w [b, n, k], orthogonal to `basis` [b, n, l], by CholeskyQR2 with Gram matrices in fp64.

    A block that is short of rank is completed with random directions, by a Householder QR.
    """
    kind = torch.finfo(w.dtype)
    limit = max(100 * kind.eps, 1e-7)  # of the pivots, relative: the Gram matrix squares them
    for _ in range(2):
        w = w - basis @ (basis.mT @ w)
        w = w / w.square().sum(1, keepdim=True).sqrt().clamp(min=kind.tiny)
        factor, info = torch.linalg.cholesky_ex(inner(w, w))
        failed = (info != 0) | ~(factor.diagonal(dim1=1, dim2=2).amin(1) > limit)
        factor[failed] = torch.eye(w.shape[2], dtype=factor.dtype, device=w.device)
        w = torch.linalg.solve_triangular(factor.mT.to(w.dtype), w, upper=True, left=False)
        if tries and failed.any():
            # a seed of its own for each width and try: what was drawn before may lie in the basis already
            noise = kind.eps * gaussian(8 * basis.shape[2] + tries, w.shape[1], w.shape[2]).to(w)
            w[failed] = orthonormalise(torch.linalg.qr(w[failed] + noise).Q, basis[failed], tries - 1)
    return w


@dataclass
class Found:
    """Where the search ended for some of a group: their `index`, `basis` Q [b, n, l], `images` A Q, and Gram matrix."""

    index: torch.Tensor
    basis: torch.Tensor
    images: torch.Tensor
    gram: torch.Tensor
    converged: torch.Tensor
    passes: int


def search(
    a: torch.Tensor, q: torch.Tensor, square: torch.Tensor, rank: int, tolerance: float, method: str, max_passes: int
) -> Iterator[Found]:
    """Grow a basis for each of a [b, m, n] from q [b, n, k], and hand each out once done; `square` [b] is |A|_F^2.

    Done is when the remainder proves every sigma to the tolerance, when the basis fills the space, or when, if changes
    go on to shrink as fast, less than half the tolerance is still to come, of each sigma and of the sum of squares.
    """
    n, index = q.shape[1], torch.arange(len(a), device=a.device)
    noise = 64 * (2.0**-53 + unit(a) ** 2) * square  # of a squared sigma: the rounding of the Gram matrix, and of A Q
    before, change = square.new_zeros(len(a), rank), square.new_ones(len(a))
    basis, images, passes = q, multiply(a, q), 1
    gram = inner(images, images)
    while True:
        values = torch.linalg.eigvalsh(gram).flip(-1)[:, :rank].clamp(min=0)
        remainder = (square - gram.diagonal(dim1=1, dim2=2).sum(1)).clamp(min=0) + 16 * unit(a) * square
        moved = ((values - before).abs() - noise[:, None]).clamp(min=0) / (2 * values).clamp(min=TINY)
        moved = moved.amax(1).maximum((values - before).sum(1).abs() / values.sum(1).clamp(min=TINY))
        factor = (moved / change.clamp(min=TINY)).clamp(max=0.9)
        settled = 2 * moved * factor / (1 - factor) <= tolerance
        before, change = values, moved
        converged = settled | (remainder <= tolerance * values[:, -1]) | (basis.shape[2] == n)
        done = converged | (passes + 4 > max_passes)
        if done.any():
            ended = slice(None) if done.all() else done  # all of it is not copied
            yield Found(index[ended], basis[ended], images[ended], gram[ended], converged[ended], passes)
            if done.all():
                return
            a, q, basis, images, gram, index, square, noise, before, change = (
                x[~done] for x in (a, q, basis, images, gram, index, square, noise, before, change)
            )
        if method == "subspace":
            # Ritz vectors first: a column then is accurate to its own size, however far apart the sizes are
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


def outside(a: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms [b] of E = a - y v^T and of E^T y, where y = a v, in fp64 and one pass."""
    square, residual = torch.zeros_like(v[:, 0, 0]), torch.zeros_like(v)
    for rows in tiles(a):
        rest = a[:, rows].double() - y[:, rows] @ v.mT
        square += rest.square().sum((1, 2))
        residual.baddbmm_(rest.mT, y[:, rows])
    return square.sqrt(), norms(residual)


def excess(found: Found, values: torch.Tensor, sums: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """How far, at most, sums of the top squares of A exceed `sums` [b, rank], by the whole basis Q of the search: [b].

    A Q is off by |A|_F |Q|_F (PANEL + n / PANEL) roundings, in any order of summation, and |Q^T Q - 1| is measured.
    """
    n, width = found.basis.shape[1:]
    skew = norms(inner(found.basis, found.basis) - torch.eye(width, dtype=torch.float64, device=sums.device))
    off = 1.01 * unit(found.basis) * (PANEL + n / PANEL + 2) * (square * width * (1 + skew)).sqrt()
    within = (values.sum(1).sqrt() - off).clamp(min=0).square() / (1 + skew)
    top = (values[:, : sums.shape[1]].cumsum(1).sqrt() + off[:, None]).square() / (1 - skew).clamp(min=TINY)[:, None]
    return square - within + (top - sums).amax(1).clamp(min=0)


def certify(a: torch.Tensor, norm: torch.Tensor, found: Found, rank: int) -> tuple[torch.Tensor, ...]:
    """sigma, u, v, lower, upper, the remainder and the passes of a [b, m, n], in fp64, from what the search found.

    With V the best directions, orthonormal to fp64, E = A - A V V^T, c = |E|_F^2, r = |E^T A V|_F, s_i = sigma_i(A V),
    each sigma_i^2 is at most

        s_i^2 + c                                                        as A A^T = A V V^T A^T + E E^T (Weyl)
        the larger eigenvalue of [[s_i^2, r], [r, c]]                    which is far less where r is small
        S / i  and  S - sum_{j<i} lower_j^2                              with S >= sum_{j<=i} sigma_j^2

    The second: in the basis of V and its complement A^T A = [[T, R^T], [R, C]] with |R| <= r and C <= c. For any x > c
    it is at most diag(T + r^2 / (x - c), x), by its Schur complement, and the eigenvalue is x = s_i^2 + r^2 / (x - c).
    S comes from V or from the whole basis of the search: its remainder is smaller, but known less precisely.
    """
    square = norm.square()
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh(found.gram))
    faint = (values[:, rank - 1] < 1e-10 * values[:, 0]) & (a.dtype == torch.float64)
    if faint.any():  # squares lose what fp64 has to say of these
        vectors[faint] = torch.linalg.svd(torch.linalg.qr(found.images[faint]).R).Vh.mT
    v = found.basis.double() @ vectors[:, :, :rank]
    v = orthonormalise(v, v[:, :, :0])
    left, small = torch.linalg.qr(torch.cat([a[:, rows].double() @ v for rows in tiles(a)], 1))
    u, sigma, vh = torch.linalg.svd(small)
    u, v = left @ u, v @ vh.mT
    sums = sigma.square().cumsum(1)
    rest = (square - sums[:, -1]).clamp(min=0).sqrt()
    residual = rest * norm
    close = rest < sigma[:, 0]  # there the residual tells more, and the difference of squares may be all rounding
    if close.any():
        rest[close], residual[close] = outside(a[close], u[close] * sigma[close, None], v[close])
    slack = 4 * (a.shape[1] + a.shape[2]) * rank * 2.0**-53 * norm  # rounding of products, QR and SVD in fp64
    lower = (sigma - slack[:, None]).clamp(min=0)
    most = (sigma + slack[:, None]).square()
    c, r = (rest + slack).square()[:, None], (residual + 3 * slack * norm)[:, None]
    whole = excess(found, values.clamp(min=0), sums, square) + slack * norm
    beyond = whole.minimum(c[:, 0] + slack * (2 * norm + slack))
    top = sums + beyond[:, None]
    bounds = (
        most + c,
        (most + c + torch.hypot(most - c, 2 * r)) / 2,
        top / torch.arange(1, rank + 1, device=a.device),
        top - (lower.square().cumsum(1) - lower.square()),
    )
    upper = torch.stack(bounds).amin(0).sqrt().maximum(sigma)
    return sigma, u, v, lower, upper, (beyond / square.clamp(min=TINY)).clamp(max=1), found.passes + 1 + close.int()


def exponent_of(tensor: torch.Tensor, label: str) -> int:
    """The power of two to divide by, so that no product leaves the range of fp32: 0 where that needs no care."""
    low, high = (float(x) for x in torch.aminmax(tensor))
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(f"{label} holds NaN or Inf; replace them, or leave it out")
    exponent = math.frexp(max(-low, high))[1]
    return exponent if abs(exponent) > SAFE_EXPONENT else 0


def prepare(tensor: torch.Tensor, exponent: int) -> torch.Tensor:
    """[m, n] with m >= n in fp32 or fp64, scaled; a copy only where it must be."""
    wide = tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()
    wide = wide.mT if wide.shape[0] < wide.shape[1] else wide
    return shifted(wide, -exponent) if exponent else wide


def start(name: str, seed: int, n: int, width: int) -> torch.Tensor:
    """The block [n, width] a search begins with, which depends on nothing else. All of the space needs no chance."""
    if width == n:
        return torch.eye(n, dtype=torch.float64)
    digest = blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    q = gaussian(int.from_bytes(digest, "little") >> 1, n, width)
    return orthonormalise(q[None], q[None, :, :0])[0]


def check(items: Sequence[torch.Tensor], labels: Sequence[str], rank: int) -> None:
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
            raise ValueError(f"rank must lie in 1 .. {min(item.shape)}, the smaller side of {label}, not {rank}")


def solve(
    tensors: Sequence[torch.Tensor], exponents: Sequence[int], starts: Sequence[torch.Tensor], rank: int, *options
) -> Iterator[tuple[int, RandomizedSVD]]:
    """Results for matrices of one shape or its transpose, with their places. options: tolerance, method, max_passes."""
    long = list(map(prepare, tensors, exponents))
    a = torch.stack(long) if len(long) > 1 else long[0][None]
    norm = norms(a)
    for found in search(a, torch.stack(list(starts)).to(a), norm.square(), rank, *options):
        solved = certify(a if len(found.index) == len(a) else a[found.index], norm[found.index], found, rank)
        for i, converged, *figures in zip(found.index.tolist(), found.converged.tolist(), *solved, strict=True):
            sigma, u, v, lower, upper, remainder, passes = figures
            sigma, lower, upper, whole = (shifted(x, exponents[i]) for x in (sigma, lower, upper, float(norm[i])))
            u, v = (x.to(a.dtype) for x in ((v, u) if tensors[i].shape[0] < tensors[i].shape[1] else (u, v)))
            outcome = float(remainder), int(passes), converged, options[1]
            yield i, RandomizedSVD(sigma, u, v, lower, upper, whole, *outcome)


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
    """The `rank` largest singular values of matrices, their vectors, and bounds: a list, or one for a single matrix.

    matrices: [m, n], [b, m, n], or a list of [m, n] of any shapes; bf16, fp16, fp32 or fp64, any strides, one device.
    Those of one shape are worked on together. names: what, with `seed`, decides the random block each begins with;
    nothing else does, and without names all begin alike. Order, grouping and workers change the last bits at most.
    tolerance: of each sigma, relative; an estimate, unlike the bounds, and met in fp32 only down to 2e-13 |A|_F^2 of a
    square, in fp64 to 7e-15. method: "krylov", or "subspace", whose memory does not grow but which takes more passes.
    block: columns added at a time, at least rank; by default max(rank, 16), 16 more for "subspace", and all of the
    smaller side where that is less than four times as many, which is exact. max_passes: at least 4; besides the matrix
    up to (m + n) * block * max_passes / 2 elements are kept. TF32 (torch.backends.cuda.matmul.allow_tf32) makes the
    search coarser and the bounds wider, not wrong.

    Raises TypeError for other dtypes, ValueError for NaN, Inf, and arguments that do not fit.

    >>> found = randomized_svd(torch.diag(torch.tensor([3.0, 2, 1])), 2)
    >>> [round(x, 9) for x in found.sigma.tolist()], round(found.energy(1)[0], 9)
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
    check(items, labels, rank)
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
            for k, found in solve(tensors, [exponents[i] for i in chosen], starts, rank, tolerance, method, max_passes):
                results[chosen[k]] = found
    return results[0] if single else [results[i] for i in range(len(items))]
