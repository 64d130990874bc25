"""Spectra from Gram matrices against fp64 SVD, on the kinds of matrices that weights and updates are."""

from __future__ import annotations

import pytest
import torch

from opdkernels.ops.gram import gram, symmetric
from opdkernels.spectral.exact import (
    BLOCK,
    RATIOS,
    compressed,
    factorise,
    factorise_matrix,
    from_grams,
    from_matrices,
    singular_values,
    top_ranks,
)

SHAPE = (320, 120)


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(sigma: torch.Tensor, shape=SHAPE, seed=0) -> torch.Tensor:
    u, v = (torch.linalg.qr(random((n, len(sigma)), seed + k))[0] for k, n in enumerate(shape))
    return (u * sigma) @ v.T


def sparse(shape=SHAPE, seed=5):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.05
    return random(shape, seed) * keep


SOURCES = {
    "random": lambda: random(SHAPE) * 0.02,
    "decaying": lambda: with_spectrum(5.0 / torch.arange(1, 121, dtype=torch.float64)),
    "low rank and noise": lambda: with_spectrum(torch.linspace(9, 3, 8, dtype=torch.float64)) + 0.01 * random(SHAPE, 9),
    "square": lambda: random((150, 150)) * 0.02,
    "square, near to singular": lambda: with_spectrum(torch.logspace(0, -7, 150, dtype=torch.float64), (150, 150)),
}
UPDATES = {"dense": random, "sparse": sparse}


def relative(found, exact):
    return float(((found - exact).abs() / exact.abs()).max())


def subspace_oracle(w, d):
    """[5, ratios] projections and mean sines from SVDs; sines from the component outside, for accuracy."""
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    u2, _, vh2 = torch.linalg.svd(w + d, full_matrices=False)
    rows = []
    for ratio in RATIOS:
        k = max(1, int(ratio * min(w.shape)))
        a, b = u[:, :k], vh[:k].T
        sines = [torch.linalg.svdvals(y - x @ (x.T @ y)) for x, y in ((a, u2[:, :k]), (b, vh2[:k].T))]
        rows.append([*((x.norm() / d.norm()) ** 2 for x in (a.T @ d @ b, a.T @ d, d @ b)), *(s.mean() for s in sines)])
    return torch.tensor(rows, dtype=torch.float64).T


@pytest.mark.parametrize(
    ("source", "block"), [(name, 0) for name in SOURCES] + [(name, BLOCK) for name in SOURCES if "square" not in name]
)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("wide", [False, True])
def test_metrics_match_fp64_svd(source, block, update, wide):
    w = SOURCES[source]().float()
    trained = w + 1e-3 * w.std() * UPDATES[update](w.shape).float()
    d = (trained - w).double()
    result = from_grams(symmetric(gram(w, trained, block=block)), tall=not wide)
    w = w.double()
    if wide:
        w, d = w.T.contiguous(), d.T.contiguous()
    sigma = torch.linalg.svdvals(d)
    assert result.method == "gram"
    assert relative(result.delta[:30], sigma[:30]) < 1e-8
    assert relative(result.delta.square().sum(), sigma.square().sum()) < 1e-8
    for tolerance in (1e-4, 1e-5):
        assert (result.delta > tolerance * result.delta[0]).sum() == (sigma > tolerance * sigma[0]).sum()
    projection, left, right, rotation_left, rotation_right = subspace_oracle(w, d)
    for ours, exact in (
        (result.projection, projection),
        (result.projection_left, left),
        (result.projection_right, right),
    ):
        assert relative(ours, exact) < 1e-6
    for ours, exact in ((result.rotation_left, rotation_left), (result.rotation_right, rotation_right)):
        assert float((ours - exact).abs().max()) < 1e-6
    drift = (torch.linalg.svdvals(w + d) - torch.linalg.svdvals(w)).norm()
    assert relative((result.trained - result.base).norm(), drift) < 1e-5


def test_definition_matches_oracle():
    w, d = random(SHAPE), 1e-3 * random(SHAPE, 1)
    for a, b in ((w, d), (w.T, d.T)):
        result = from_matrices(a, b)
        ours = torch.stack(
            [
                result.projection,
                result.projection_left,
                result.projection_right,
                result.rotation_left,
                result.rotation_right,
            ]
        )
        torch.testing.assert_close(ours, subspace_oracle(a, b), rtol=1e-6, atol=1e-9)
        factor = factorise_matrix(a, result.ranks[-1])
        torch.testing.assert_close(factor.sigma, result.base)
        assert factor.vectors.shape == (min(a.shape), result.ranks[-1])


def test_reduced_pair_has_the_same_metrics():
    w, d = random((700, 40)), 1e-3 * random((700, 40), 1)
    long, short = (from_matrices(*pair) for pair in ((w, d), compressed(zip(w.split(90), d.split(90), strict=True))))
    for name in (
        "base",
        "trained",
        "delta",
        "projection",
        "projection_left",
        "projection_right",
        "rotation_left",
        "rotation_right",
    ):
        torch.testing.assert_close(getattr(short, name), getattr(long, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 4, 20])
def test_missing_directions_add_no_entropy(rows):
    """Of an embedding only the rows of the tokens in use change."""
    w = random((2000, 100)).bfloat16()
    trained = w.clone()
    trained[::97][:rows] += 0.1 * random((rows, 100), 1).bfloat16()
    result = from_grams(symmetric(gram(w, trained)), tall=True).delta
    exact = torch.linalg.svdvals(trained.double() - w.double())
    share, exact_share = result[result > 0] / result.sum(), exact[:rows] / exact[:rows].sum()
    assert len(share) == rows
    assert relative(share.log().mul(share).sum().exp(), exact_share.log().mul(exact_share).sum().exp()) < 1e-8


def test_known_factor_is_reused():
    w = random(SHAPE)
    grams = symmetric(gram(w, w + 1e-3 * random(SHAPE, 1)))
    factor = factorise(grams[0], top_ranks(120)[-1])
    fresh, given = from_grams(grams, tall=True), from_grams(grams, tall=True, base=factor)
    assert torch.equal(fresh.projection, given.projection)
    assert given.base is factor.sigma


def test_nearly_singular_pair_returns_none():
    """The rank is 5 and 24 top vectors are needed: the Gram matrix does not determine 19 of them."""
    w = with_spectrum(torch.ones(5, dtype=torch.float64))
    assert from_grams(symmetric(gram(w, w + 1e-9 * random(SHAPE, 1))), tall=True) is None


def test_ranks_follow_the_paper():
    assert top_ranks(896) == (8, 44, 89, 179)
    assert top_ranks(1) == (1, 1, 1, 1)


def test_one_column_and_one_coordinate():
    for shape in ((7, 1), (1, 1)):
        w, d = random(shape), 1e-3 * random(shape, 1)
        result = from_grams(symmetric(gram(w, w + d)), tall=True)
        assert result.projection_right[0] == pytest.approx(1)
        assert result.delta[0] == pytest.approx(float(d.norm()), rel=1e-10)
        assert float(result.rotation_right[0]) == 0


def test_singular_values_of_zero_are_zero():
    assert torch.equal(singular_values(torch.zeros(4, 4, dtype=torch.float64)), torch.zeros(4, dtype=torch.float64))
