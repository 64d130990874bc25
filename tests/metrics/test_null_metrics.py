"""Expected values and their deviations under the null equal those of sampled updates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opdkernels.metrics.coordinates import TOP_FRACTIONS, TOP_LABELS, compute_metrics
from opdkernels.metrics.null_metrics import expected_top_energy, null_metrics
from opdkernels.metrics.rounding_null import Null, expected_square, fit
from opdkernels.ops.delta import delta, magnitudes
from opdkernels.ops.delta.many import SparseTally

SIZE = 40_000
NUM_UPDATES = 60


def weights(dtype=torch.bfloat16) -> torch.Tensor:
    return (0.03 * torch.randn(SIZE, generator=torch.Generator().manual_seed(0))).to(dtype)


def bins(tally: SparseTally) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(tally.bin_bits[table > 0], table[table > 0]) for table in (tally.hist_base, tally.hist_delta)]


@pytest.mark.parametrize(("kind", "size"), [("normal", 6e-5), ("normal", 4e-4), ("sign", 8e-5)])
def test_expected_metrics_and_deviations_are_those_of_sampled_updates(kind, size):
    w, generator = weights(), torch.Generator().manual_seed(1)
    tallies = []
    for _ in range(NUM_UPDATES):
        z = torch.randn(SIZE, generator=generator)
        tallies.append(SparseTally.of(delta(w, (w.float() + size * (z.sign() if kind == "sign" else z)).bfloat16())))
    columns = compute_metrics(tallies, "visible")
    expected = null_metrics(columns, [fit(*bins(tally)) for tally in tallies])
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
    null = fit(*bins(SparseTally.of(delta(w, w))))["chosen"]
    mean, deviation = expected_top_energy([null], TOP_FRACTIONS)
    assert mean.shape == deviation.shape == (len(TOP_FRACTIONS), 1)
    assert np.isnan(mean).all()
    assert np.isnan(deviation).all()


def top_energy_of_one(null: Null, fraction: float) -> tuple[float, float]:
    """Mean and deviation coordinate class by coordinate class, from the largest |delta| down."""
    squares = magnitudes[null.first : null.first + len(null.values)] ** 2
    left, taken = max(1, math.ceil(fraction * round(null.changed + null.unchanged))), np.zeros(len(squares))
    for i in reversed(range(len(squares))):
        taken[i] = min(left, null.values[i])
        left -= taken[i]
    energy = float((null.values * squares).sum())
    top = float((taken * squares).sum()) / energy
    influence = np.maximum(squares - squares[np.argmax(taken > 0)], 0) - top * squares
    numel = round(null.changed + null.unchanged)
    variance = (null.values * influence**2).sum() - (null.values * influence).sum() ** 2 / numel
    return top, math.sqrt(variance) / energy


def test_top_energy_of_many_nulls_is_that_of_each():
    """Of all sizes of tensors and updates, also where all coordinates belong to the top, and where one does."""
    nulls = []
    for n, scale, size in ((SIZE, 1.0, 1e-4), (3, 1.0, 1.0), (SIZE, 1e-6, 1e-9), (900, 1e4, 3.0), (SIZE, 1.0, 1e-2)):
        w = (scale * weights()[:n].float()).bfloat16()
        z = torch.randn(n, generator=torch.Generator().manual_seed(4))
        fitted = fit(*bins(SparseTally.of(delta(w, (w.float() + size * z).bfloat16()))))
        nulls += [fitted[kind] for kind in ("sign", "normal", "empirical", "chosen") if kind in fitted]
    fractions = (*TOP_FRACTIONS, 0.5, 1.0)
    mean, deviation = expected_top_energy(nulls, fractions)
    expected = np.array([[top_energy_of_one(null, fraction) for null in nulls] for fraction in fractions])
    np.testing.assert_allclose(mean, expected[:, :, 0], rtol=1e-9)
    np.testing.assert_allclose(deviation, expected[:, :, 1], rtol=1e-6, atol=1e-9)


def test_visibility_is_kept_on_request_only():
    w = weights()
    after = (w.float() + 1e-4 * torch.randn(SIZE, generator=torch.Generator().manual_seed(3))).bfloat16()
    base, change = bins(SparseTally.of(delta(w, after)))
    null = fit(base, change, keep_visible=True)["normal"]
    assert (base[1] * null.visible).sum() == pytest.approx(null.changed)
    assert fit(base, change)["normal"].visible.size == 0
