"""Principal and near-zero masks: counts are within the bounds of tie-breaking, and exact without ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opdkernels.spectral import principal
from opdkernels.spectral.exact import RATIOS, top_ranks
from opdkernels.spectral.principal import COUNTS, THRESHOLDS


def overlaps(base, trained, basis, ranks, *, visible):
    masks = principal.masks(base, basis, principal.project(base, basis, visible=visible), ranks, visible=visible)
    return principal.overlaps(masks, base, trained, visible=visible)


def matrices(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = (0.03 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    trained = (base.double() + 5e-5 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    return base, trained


def basis_of(base: torch.Tensor, visible: bool) -> torch.Tensor:
    w = base.float().bfloat16().double() if visible else base.double()
    return torch.linalg.svd(w, full_matrices=False)[2][: top_ranks(base.shape[1])[-1]].T.contiguous()


def view_of(base, trained, visible):
    if visible:
        w, v = base.float().bfloat16(), trained.float().bfloat16()
        return w.double().numpy(), (v.float() - w.float()).bfloat16().double().numpy()
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    return base.double().numpy(), (trained.to(wide) - base.to(wide)).double().numpy()


@pytest.mark.parametrize("shape", [(130, 40), (40, 40), (999, 31), (9, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("visible", [False, True])
def test_counts_match_sorting(shape, dtype, visible):
    base, trained = matrices(shape, dtype)
    basis, ranks = basis_of(base, visible), top_ranks(shape[1])
    result = overlaps(base, trained, basis, ranks, visible=visible)
    w, d = (x.ravel() for x in view_of(base, trained, visible))
    for one, ratio, rank in zip(result, RATIOS, ranks, strict=True):
        v = basis[:, :rank].numpy()
        score = np.abs(w.reshape(shape) @ v @ v.T).ravel()
        size = max(1, math.ceil(ratio * w.size))
        threshold, low_threshold = np.sort(score)[-size], np.sort(np.abs(w))[size - 1]
        near = np.isclose(score, threshold, rtol=1e-12, atol=0)  # fp64 rounding decides among these
        low, low_tied = np.abs(w) < low_threshold, np.abs(w) == low_threshold
        assert one.size == size
        for subset, counts in zip(
            (np.ones(w.size, bool), *(np.abs(d) > c for c in THRESHOLDS)), one.counts, strict=True
        ):
            count = dict(zip(COUNTS, counts.tolist(), strict=True))
            assert count["total"] == subset.sum()
            assert (count["low"], count["low_tied"]) == ((low & subset).sum(), (low_tied & subset).sum())
            least, most = (score > threshold) & ~near & subset, (score >= threshold) | near
            assert least.sum() <= count["principal"] <= (most & subset).sum()
            assert count["principal"] + count["principal_tied"] <= (most & subset).sum()
            assert (least & low).sum() <= count["both"] <= (most & low & subset).sum()
            assert (least & low_tied).sum() <= count["principal_and_low_tied"] <= (most & low_tied & subset).sum()
        assert one.counts[0, COUNTS.index("principal")] + one.taken == size
        assert one.counts[0, COUNTS.index("low")] + one.low_taken == size


def test_unequal_rows_are_recomputed_only_near_the_threshold(monkeypatch):
    """Each row has its own error bound: that of the largest row would make half the coordinates candidates."""
    base, _ = matrices((4000, 60), torch.float64)
    base *= torch.exp(3 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    basis, rank = basis_of(base, False), top_ranks(60)[-1]
    recomputed = []
    monkeypatch.setattr(
        principal.np, "divmod", lambda index, short: recomputed.append(len(index)) or (index // short, index % short)
    )
    sure, above, tied, taken = principal.select(base @ basis, basis, principal.row_blocks(4000, 60), 48_000)
    score = (base @ basis @ basis.T).abs().flatten().numpy()
    expected = np.zeros(score.size, bool)
    expected[np.argsort(-score)[:48_000]] = True
    result = np.unpackbits(sure, bitorder="little")[: score.size].astype(bool)
    result[above] = True
    result[tied[:taken]] = True
    assert (result == expected).all()
    assert sum(recomputed) < 2000
    assert rank == 12


def test_transposed_view_counts_like_its_copy():
    base, trained = matrices((30, 200), torch.bfloat16)
    basis = basis_of(base.T, False)
    views, copies = (
        overlaps(a, b, basis, top_ranks(30), visible=False)
        for a, b in ((base.T, trained.T), (base.T.contiguous(), trained.T.contiguous()))
    )
    for one, other in zip(views, copies, strict=True):
        np.testing.assert_array_equal(one.counts, other.counts)


def test_equal_rows_tie_at_the_threshold():
    """All rows are equal: scores come in groups, and the threshold is within one."""
    row = torch.linspace(1, 2, 10)
    base = row.repeat(50, 1)
    result = overlaps(base, base + 1, basis_of(base, False), top_ranks(10), visible=False)[1]
    count = dict(zip(COUNTS, result.counts[0].tolist(), strict=True))
    assert (count["principal"], count["principal_tied"], result.taken, result.size) == (0, 50, 25, 25)


def test_a_matrix_of_zeros_ties_everywhere():
    zeros = torch.zeros(40, 8)
    result = overlaps(zeros, zeros + 1, torch.eye(8, dtype=torch.float64)[:, :1], top_ranks(8), visible=False)[0]
    assert result.counts[0].tolist() == [320, 0, 320, 0, 320, 0, 0, 0, 320]
    assert result.taken == result.low_taken == 4


def test_scores_near_the_threshold_are_accurate_to_fp64(monkeypatch):
    """The counts are the same if all scores are treated as near the threshold and recomputed."""
    base, trained = matrices((300, 50), torch.float32)
    basis = basis_of(base, False)
    before = overlaps(base, trained, basis, top_ranks(50), visible=False)
    monkeypatch.setattr(principal, "ROUNDINGS", 1e9)
    monkeypatch.setattr(principal, "CANDIDATES", 1000)
    for one, other in zip(before, overlaps(base, trained, basis, top_ranks(50), visible=False), strict=True):
        np.testing.assert_array_equal(one.counts, other.counts)
        assert one.taken == other.taken


@pytest.mark.parametrize("bracket", [None, (0.0, 1e-9), (1.0, 2.0), (math.nan, math.nan)], ids=str)
def test_counts_do_not_depend_on_blocks_and_samples(monkeypatch, bracket):
    """Also if the sample gives a wrong bracket of the threshold."""
    base, trained = matrices((700, 50), torch.bfloat16)
    base[100:] *= 20  # the sample's rows differ
    basis = basis_of(base, False)
    before = overlaps(base, trained, basis, top_ranks(50), visible=False)
    monkeypatch.setattr(principal, "BLOCK", 3000)
    monkeypatch.setattr(principal, "SAMPLE_ROWS", 7)
    if bracket:
        monkeypatch.setattr(principal, "sampled_bracket", lambda sample, fraction: bracket)
    for one, other in zip(before, overlaps(base, trained, basis, top_ranks(50), visible=False), strict=True):
        np.testing.assert_array_equal(one.counts, other.counts)
        assert one.taken == other.taken
