"""Expected values and their deviations under the null equal those of sampled updates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opdkernels.metrics.coordinates import TOP_FRACTIONS, TOP_LABELS, compute_metrics
from opdkernels.metrics.null_metrics import fit_tallies, null_metrics
from opdkernels.ops.delta import delta, magnitudes
from opdkernels.ops.delta.many import SparseTally
from opdkernels.ops.null import Null, expected_square, fit, fit_many
from opdkernels.ops.null.layout import KINDS

SIZE = 40_000
NUM_UPDATES = 60


def weights(dtype=torch.bfloat16) -> torch.Tensor:
    return (0.03 * torch.randn(SIZE, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize(("kind", "size"), [("normal", 6e-5), ("normal", 4e-4), ("sign", 8e-5)])
def test_expected_metrics_and_deviations_are_those_of_sampled_updates(kind, size):
    w, generator = weights(), torch.Generator().manual_seed(1)
    tallies = []
    for _ in range(NUM_UPDATES):
        z = torch.randn(SIZE, generator=generator)
        tallies.append(SparseTally.of(delta(w, (w.float() + size * (z.sign() if kind == "sign" else z)).bfloat16())))
    columns = compute_metrics(tallies, "visible")
    expected = null_metrics(columns, fit_tallies(tallies, ["grid"] * NUM_UPDATES))
    for name in ("changed", "near_zero_coverage_10pct", *(f"top_energy_{label}" for label in TOP_LABELS)):
        mean, spread = columns[name].mean(), columns[name].std(ddof=1)
        assert np.median(expected[f"{name}_null"]) == pytest.approx(mean, rel=0.01, abs=2 * spread), name
        if kind == "normal":  # all updates of one size: the number of changes varies, their energy hardly
            assert np.median(expected[f"{name}_null_sd"]) == pytest.approx(spread, rel=0.5), name
        if not name.startswith("changed"):
            assert np.median(np.abs(expected[f"{name}_over_null"] - 1)) < 0.03, name


@pytest.mark.parametrize("remainder", ["grid", "uniform"])
@pytest.mark.parametrize("size", [2e-5, 1e-4, 1e-3])
def test_expected_square_at_each_magnitude_is_that_of_sampled_updates(remainder, size):
    w = weights(torch.bfloat16 if remainder == "grid" else torch.float32)
    table = expected_square(size, remainder)
    generator, total, rounded = torch.Generator().manual_seed(2), 0.0, w.bfloat16()
    for _ in range(20):
        after = (w.float() + size * torch.randn(SIZE, generator=generator)).bfloat16()
        total = total + (after.float() - rounded.float()).double().square()
    octave = torch.frexp(rounded.float().abs())[1]
    expected = torch.from_numpy(table)[rounded.view(torch.int16).long() & 0x7FFF]
    for exponent in octave.unique():
        where = octave == exponent
        squares = total[where] / 20
        error = 5 * float(squares.std()) / math.sqrt(int(where.sum())) if int(where.sum()) > 50 else math.inf
        hidden = 1e-6 * size**2  # far out in the tail of the update, no sample is visible
        assert float(expected[where].mean()) == pytest.approx(float(squares.mean()), rel=0.03, abs=error + hidden)


def test_nothing_changed_has_no_expected_top_energy():
    w = weights()
    nulls = fit_tallies([SparseTally.of(delta(w, w))], ["grid"])
    assert nulls.top_energy.shape == nulls.top_energy_sd.shape == (1, len(TOP_FRACTIONS))
    assert np.isnan(nulls.top_energy).all()
    assert np.isnan(nulls.top_energy_sd).all()


def top_energy_of(null: Null, fraction: float) -> tuple[float, float]:
    """Mean and deviation coordinate class by coordinate class, from the largest |delta| down."""
    squares, values, numel = magnitudes**2, null.delta.copy(), round(null.changed + null.unchanged)
    values[0] -= null.unchanged
    squares[0x7F80:] = 0
    left, taken = max(1, math.ceil(fraction * numel)), np.zeros(len(squares))
    for i in np.flatnonzero(values)[::-1]:
        taken[i] = min(left, values[i])
        left -= taken[i]
    energy = float((values * squares).sum())
    top = float((taken * squares).sum()) / energy
    threshold = 0 if left > 0 else squares[np.argmax(taken > 0)]  # 0: the last one that is taken is unchanged
    influence = np.maximum(squares - threshold, 0) - top * squares
    variance = (values * influence**2).sum() - (values * influence).sum() ** 2 / numel
    return top, math.sqrt(variance) / energy


def test_top_energy_of_many_nulls_is_that_of_each():
    """Of all sizes of tensors and updates, also where all coordinates belong to the top, and where one does."""
    tallies, fractions = [], (*TOP_FRACTIONS, 0.5, 1.0)
    for n, scale, size in ((SIZE, 1.0, 1e-4), (3, 1.0, 1.0), (SIZE, 1e-6, 1e-9), (900, 1e4, 3.0), (SIZE, 1.0, 1e-2)):
        for update in ("normal", "sign"):
            w = (scale * weights()[:n].float()).bfloat16()
            z = torch.randn(n, generator=torch.Generator().manual_seed(4))
            z = z.sign() if update == "sign" else z
            tallies.append(SparseTally.of(delta(w, (w.float() + size * z).bfloat16())))
    tables = ([getattr(tally, name) for tally in tallies] for name in ("bin_bits", "hist_base", "hist_delta"))
    nulls = fit_many(*tables, ["grid"] * len(tallies), fractions=fractions)
    chosen = [fit(tally.dense().hist_base, tally.dense().hist_delta)["chosen"] for tally in tallies]
    assert {null.kind for null in chosen} >= {"sign", "normal"}
    assert [null.kind for null in chosen] == [KINDS[kind] for kind in nulls.chosen]
    expected = np.array([[top_energy_of(null, fraction) for fraction in fractions] for null in chosen])
    np.testing.assert_allclose(nulls.top_energy, expected[:, :, 0], rtol=1e-9)
    np.testing.assert_allclose(nulls.top_energy_sd, expected[:, :, 1], rtol=1e-6, atol=3e-8)  # of roots of differences


def test_visibility_at_each_magnitude_adds_up_to_the_expected_changes():
    w = weights()
    after = (w.float() + 1e-4 * torch.randn(SIZE, generator=torch.Generator().manual_seed(3))).bfloat16()
    tally = delta(w, after)
    for null in fit(tally.hist_base, tally.hist_delta).values():
        assert (tally.hist_base * null.visible).sum() == pytest.approx(null.changed)
        assert not null.visible[tally.hist_base == 0].any()
