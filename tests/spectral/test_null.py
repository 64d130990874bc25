"""Expectations for updates with independent entries equal averages over such updates, drawn one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opdkernels.spectral import principal
from opdkernels.spectral.exact import factorise_matrix, from_matrices, top_ranks
from opdkernels.spectral.null import (
    BINS,
    DRAWS,
    MAX_RELATIVE_NORM,
    Composites,
    Profile,
    low_fractions,
    magnitude_bits,
    mask_histograms,
    perturbation,
)

NUM_UPDATES = 24
RATIO = 2  # index of the ratio 10 %


def weights(long: int, short: int) -> torch.Tensor:
    """A bf16 matrix whose rows and columns differ in size, as those of trained models do."""
    generator = torch.Generator().manual_seed(long)
    rows, columns = (torch.exp(0.6 * torch.randn(shape, generator=generator)) for shape in ((long, 1), (1, short)))
    return (0.03 * torch.randn(long, short, generator=generator) * rows * columns).bfloat16()


def variance_at(size: float) -> np.ndarray:
    """A variance that falls with |W|, as rounding makes it: [BINS]."""
    values = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32).astype(float)
    return np.pad(size**2 / (1 + values / 0.02) ** 2, (0, BINS - len(values)))


@pytest.mark.parametrize("shape", [(96, 64), (72, 72)], ids=str)
@pytest.mark.parametrize("relative", [3e-4, 3e-3])
@pytest.mark.parametrize("uneven", [True, False])
def test_geometry_of_a_random_update_is_that_of_sampled_ones(shape, relative, uneven):
    w = weights(*shape)
    long, short = shape
    ranks = top_ranks(short)
    factor = factorise_matrix(w.double(), ranks[-1])
    size = relative * float(w.double().norm()) / math.sqrt(w.numel())
    table = variance_at(size) if uneven else np.full(BINS, size**2)
    profile = Profile.of(w, factor.vectors, w.double() @ factor.vectors, factor.sigma, ranks, table if uneven else None)
    deviation = torch.from_numpy(table)[magnitude_bits(w).long()].sqrt()
    energy = float(deviation.square().sum())
    both, on_long, on_short = profile.projections(long, short)
    rotation_long, rotation_short, drift = perturbation(factor.sigma, profile, long, energy)
    generator = torch.Generator().manual_seed(7)
    sampled = []
    for _ in range(NUM_UPDATES):
        spectra = from_matrices(w, deviation * torch.randn(shape, generator=generator, dtype=torch.float64))
        metrics = [getattr(spectra, name)[RATIO] for name in ("projection", "projection_left", "projection_right")]
        metrics += [spectra.rotation_left[RATIO], spectra.rotation_right[RATIO]]
        metrics.append((spectra.trained - factor.sigma).norm() / factor.sigma.norm())
        sampled.append([float(value) for value in metrics])
    mean, spread = np.mean(sampled, 0), np.std(sampled, 0, ddof=1)
    expected = [x[RATIO] for x in (both, on_long, on_short, rotation_long, rotation_short)] + [drift]
    for i, (name, (value, sd)) in enumerate(
        zip(("both", "long", "short", "rotation long", "rotation short", "drift"), expected, strict=True)
    ):
        error = 5 * spread[i] / math.sqrt(NUM_UPDATES) + (5 * spread[i] / math.sqrt(DRAWS) if i >= 3 else 0)
        assert value == pytest.approx(mean[i], abs=error + 0.02 * mean[i]), name
        if i < 3:  # rotation and drift have the deviation of DRAWS draws
            assert sd == pytest.approx(spread[i], rel=0.5), name
    if uneven:  # k^2 / (m n), the chance level without regard to |W|, is off by far more than the error
        assert ranks[RATIO] ** 2 / w.numel() > 1.5 * mean[0]


def test_perturbation_of_a_large_update_or_of_a_low_rank_is_unknown():
    w = weights(40, 30)
    ranks = top_ranks(30)
    factor = factorise_matrix(w.double(), ranks[-1])
    profile = Profile.of(w, factor.vectors, w.double() @ factor.vectors, factor.sigma, ranks, None)
    limit = (MAX_RELATIVE_NORM * float(factor.sigma.norm())) ** 2
    assert perturbation(factor.sigma, profile, 40, 0.99 * limit) is not None
    assert perturbation(factor.sigma, profile, 40, 1.01 * limit) is None
    assert perturbation(torch.zeros(30, dtype=torch.float64), profile, 40, 1e-9) is None


@pytest.mark.parametrize("uneven", [True, False])
def test_top_of_the_spectrum_follows_the_profile(uneven):
    from opdkernels.metrics.random_matrix import random_spectrum

    w = weights(300, 200)
    factor = factorise_matrix(w.double(), 40)
    table = variance_at(1e-4)
    projected = w.double() @ factor.vectors
    profile = Profile.of(w, factor.vectors, projected, factor.sigma, top_ranks(200), table if uneven else None)
    deviation = torch.from_numpy(table)[magnitude_bits(w).long()].sqrt() if uneven else torch.ones(w.shape).double()
    generator = torch.Generator().manual_seed(3)
    sampled = []
    for _ in range(8):
        squares = torch.linalg.svdvals(deviation * torch.randn(300, 200, generator=generator)).square()
        sampled.append([float(squares.sum() / squares[0]), float(squares[:16].sum() / squares.sum())])
    stable_rank, energy = np.mean(sampled, 0)
    of_one_variance = random_spectrum(300, 200)
    factors = profile.spectrum_factors()
    assert of_one_variance[0] * factors[0] == pytest.approx(stable_rank, rel=0.1)
    assert of_one_variance[1][16] * factors[1] == pytest.approx(energy, rel=0.03)
    if not uneven:
        assert factors == pytest.approx((1, 1))


def mask_flags(mask: principal.Masks, numel: int) -> tuple[np.ndarray, np.ndarray]:
    """The principal and the near-zero mask as booleans; ties are taken in order."""
    flags = []
    for bits, above, tied, taken in (
        (mask.sure, mask.above, mask.tied, mask.taken),
        (mask.low, np.zeros(0, int), None, mask.low_taken),
    ):
        flag = np.unpackbits(bits, count=numel, bitorder="little").astype(bool)
        flag[above] = True
        ties = np.flatnonzero(np.unpackbits(mask.low_tied, count=numel, bitorder="little")) if tied is None else tied
        flag[ties[:taken]] = True
        flags.append(flag)
    return flags[0], flags[1]


def test_coverage_of_independent_changes_is_that_of_sampled_ones():
    w = weights(90, 60)
    ranks = top_ranks(60)
    factor = factorise_matrix(w.double(), ranks[-1])
    masks = principal.masks(w, factor.vectors, w.double() @ factor.vectors, ranks, visible=False)
    bits = magnitude_bits(w).numpy().ravel()
    hist_base = np.bincount(bits, minlength=BINS)
    visible = np.clip(0.004 / np.maximum(np.abs(np.arange(BINS) - 0x3C00) * 1e-3, 1e-3), 0, 0.9)
    rng = np.random.default_rng(1)
    changed = rng.random(bits.size) < visible[bits]
    hist_changed = np.bincount(bits[changed], minlength=BINS)
    for mask, histogram in zip(masks, mask_histograms(masks, w), strict=True):
        is_principal, is_low = mask_flags(mask, bits.size)
        assert histogram.sum() == pytest.approx(is_principal.sum())
        if not len(mask.tied) or mask.taken == len(mask.tied):
            assert (histogram == np.bincount(bits[is_principal], minlength=BINS)).all()
        sets = np.stack([is_principal, is_principal & ~is_low, ~is_principal | is_low])
        composites = Composites.of(histogram, hist_base, mask.size)
        independent, conditioned = [], []
        for _ in range(200):
            drawn = rng.random(bits.size) < visible[bits]
            independent.append(sets[:, drawn].sum(1) / drawn.sum())
            order = np.lexsort((rng.random(bits.size), bits))  # a random order within each |W|
            rank = np.arange(bits.size) - np.repeat(np.cumsum(hist_base) - hist_base, hist_base)
            drawn = order[rank < np.repeat(hist_changed, hist_base)]
            conditioned.append(sets[:, drawn].sum(1) / len(drawn))
        for draws, expected in (
            (independent, composites.independent(hist_base, visible)),
            (conditioned, composites.magnitude_conditioned(hist_base, hist_changed)),
        ):
            mean, spread = np.mean(draws, 0), np.std(draws, 0, ddof=1)
            # Ties of |W| at the near-zero threshold are taken in order here and in expectation there.
            assert np.abs(expected[:, 0] - mean).max() < 5 * spread.max() / 14 + 0.01 * mask.size / bits.size
            assert expected[:, 1] == pytest.approx(spread, rel=0.25)


def test_no_expected_change_has_no_coverage():
    histogram = np.zeros(BINS)
    histogram[5] = 3
    composites = Composites.of(histogram, histogram.astype(int) * 2, 2)
    assert np.isnan(composites.independent(histogram * 2, np.zeros(BINS))).all()
    assert np.isnan(composites.magnitude_conditioned(histogram * 2, np.zeros(BINS))).all()


def test_ties_of_the_principal_mask_count_in_expectation():
    zeros = torch.zeros(40, 8, dtype=torch.bfloat16)
    basis = torch.eye(8, dtype=torch.float64)[:, :1]
    masks = principal.masks(zeros, basis, zeros.double() @ basis, top_ranks(8), visible=False)
    for mask, histogram in zip(masks, mask_histograms(masks, zeros), strict=True):
        assert histogram[0] == pytest.approx(mask.size)
    assert low_fractions(np.array([4, 0, 4, 2]), 6).tolist() == [1, 1, 0.5, 0]
