"""Metrics of a tensor equal those computed from its coordinates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdkernels.metrics.batch import TallyBatch, ratio_label, to_bf16_bits
from opdkernels.metrics.coordinates import TOP_FRACTIONS, compute_metrics, near_zero, tensor_metrics
from opdkernels.ops.delta import THRESHOLDS, Tally, delta
from opdkernels.ops.delta.many import SparseTally
from opdkernels.spectral.exact import RATIOS
from tests.ops.conformance import make_pair


def sparse(source, trained) -> SparseTally:
    return SparseTally.of(delta(source, trained))


def coordinates(source, trained, view):
    """W, W' and delta of the finite coordinates, as double."""
    if view == "visible":
        w, v = source.bfloat16(), trained.bfloat16()
        d = v - w
    else:
        wide = torch.promote_types(torch.promote_types(source.dtype, trained.dtype), torch.float32)
        w, v = source.to(wide), trained.to(wide)
        d = v - w
    visible = trained.bfloat16() - source.bfloat16()
    finite = source.bfloat16().isfinite() & trained.bfloat16().isfinite() & visible.isfinite()
    return (t[finite].double().numpy() for t in (w, v, d))


@pytest.mark.parametrize("view", ["stored", "visible"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("hostile", [True, False])
def test_metrics_equal_those_computed_from_the_coordinates(view, dtype, hostile):
    source, trained = make_pair(20_001, dtype, hostile=hostile)
    row = tensor_metrics(sparse(source, trained), view)
    w, v, d = coordinates(source, trained, view)
    n, size = len(w), np.abs(d)
    assert row["frac_zero"] == (d == 0).sum() / n
    for threshold in THRESHOLDS:
        limit = float(torch.tensor(threshold).bfloat16()) if view == "visible" else threshold
        label = f"{threshold:.0e}".replace("e-0", "e-")
        assert row[f"frac_lt_{label}"] == (size < limit).sum() / n
        assert row[f"frac_le_{label}"] == (size <= limit).sum() / n
    close = lambda a, b: a == pytest.approx(b, rel=1e-12)  # noqa: E731  (sums in another order)
    assert close(row["relative_norm"], math.sqrt(math.fsum(d * d) / math.fsum(w * w)))
    assert close(row["rms_base"], math.sqrt(math.fsum(w * w) / n))
    assert close(row["rms_trained"], math.sqrt(math.fsum(v * v) / n))
    assert close(row["mean_abs"], math.fsum(size) / n)
    assert row["max_abs"] == size.max()
    order = np.sort(size)[::-1]
    for p in TOP_FRACTIONS:
        label, k = f"top_energy_{ratio_label(p)}", math.ceil(p * n)
        exact = math.fsum(order[:k] ** 2) / math.fsum(d * d)
        if view == "visible":
            assert close(row[label], exact)
        else:
            assert row[f"{label}_lower"] * (1 - 1e-12) <= exact <= row[f"{label}_upper"] * (1 + 1e-12)
            assert row[f"{label}_lower"] <= row[label] <= row[f"{label}_upper"]


@pytest.mark.parametrize("view", ["stored", "visible"])
def test_relative_thresholds_are_within_their_bounds(view):
    source, trained = make_pair(20_001, torch.float32, hostile=False)
    row = tensor_metrics(sparse(source, trained), view)
    w, _, d = coordinates(source, trained, view)
    rms = math.sqrt(math.fsum(w * w) / len(w))
    for tau, label in ((1e-4, "1e-4"), (1e-3, "1e-3"), (1e-2, "1e-2")):
        if view == "visible":
            limit = float(torch.tensor(tau * rms).bfloat16())
            assert row[f"frac_lt_rel_{label}"] == (np.abs(d) < limit).mean()
        else:
            assert (
                row[f"frac_lt_rel_{label}_lower"] <= (np.abs(d) < tau * rms).mean() <= row[f"frac_lt_rel_{label}_upper"]
            )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 400), levels=st.integers(1, 30))
def test_bounds_of_the_near_zero_mask_hold_for_any_tie_break(seed, n, levels):
    rng = np.random.default_rng(seed)
    source = torch.from_numpy(rng.integers(-levels, levels + 1, n) / 64).bfloat16()
    trained = torch.where(torch.from_numpy(rng.random(n) < 0.4), source + 1, source)
    tally = sparse(source, trained)
    changed = (source != trained).numpy()
    batch = TallyBatch([tally])
    mask = near_zero(batch, batch.changed("visible"))
    for r, ratio in enumerate(RATIOS):
        k = min(n, math.ceil(ratio * n))
        size, expected, lower, upper = (x[0, r] for x in (mask.size, mask.expected, mask.lower, mask.upper))
        assert size == k
        hits = []
        for _ in range(30):
            order = np.lexsort((rng.random(n), source.abs().float().numpy()))
            hits.append(changed[order[:k]].sum())
        assert lower <= min(hits)
        assert max(hits) <= upper
        assert lower <= expected <= upper


def test_expected_near_zero_count_is_the_mean_over_tie_breaks():
    source = torch.tensor([0.0, 1, 1, 1, 1, 2, 2, 3, 4, 5], dtype=torch.bfloat16)
    trained = source + torch.tensor([0, 1, 0, 0, 1, 0, 1, 0, 0, 0], dtype=torch.bfloat16)
    tally = sparse(source, trained)
    batch = TallyBatch([tally])
    result = near_zero(batch, batch.changed("stored"), [0.2])  # 0 and one of four ones, two of which changed
    assert (result.size[0, 0], result.expected[0, 0], result.lower[0, 0], result.upper[0, 0]) == (2, 0.5, 0, 1)


@pytest.mark.parametrize("view", ["stored", "visible"])
def test_a_batch_gives_the_metrics_of_each_tensor(view):
    """Empty, unmoved, all non-finite and ordinary tensors together, in more than one batch."""
    kinds = [
        sparse(*make_pair(n, dtype, seed=n, hostile=hostile))
        for n, dtype, hostile in (
            (500, torch.float32, True),
            (0, torch.float32, False),
            (64, torch.bfloat16, False),
            (1, torch.float64, False),
        )
    ]
    kinds += [sparse(torch.ones(9), torch.ones(9)), sparse(torch.full((3,), float("nan")), torch.ones(3))]
    tallies = [kinds[i % len(kinds)] for i in range(150)]
    columns = compute_metrics(tallies, view)
    for i, tally in enumerate(tallies):
        alone = tensor_metrics(tally, view)
        for name, column in columns.items():
            value = None if column.dtype == float and math.isnan(column[i]) else column[i]
            assert value == alone[name], (i, name)


def test_thresholds_round_as_torch_rounds_them():
    for value in (1e-8, 1e-5, 3.3e-7, 0.1, 1.0, 2.0**-133, 1e30):
        assert to_bf16_bits(value) == int(torch.tensor(value).bfloat16().view(torch.int16))


@pytest.mark.parametrize("view", ["stored", "visible"])
def test_undefined_metrics_are_none(view):
    same = torch.ones(10)
    row = tensor_metrics(sparse(same, same), view)
    assert (row["frac_zero"], row["relative_norm"], row["top_energy_1pct"], row["near_zero_coverage_10pct"]) == (
        1.0,
        0.0,
        None,
        None,
    )
    row = tensor_metrics(sparse(torch.empty(0), torch.empty(0)), view)
    assert (row["frac_zero"], row["relative_norm"], row["max_abs"], row["near_zero_coverage_10pct"]) == (
        None,
        None,
        None,
        None,
    )
    assert all(v is None or not (isinstance(v, float) and math.isnan(v)) for v in row.values())


def test_a_sparse_tally_round_trips():
    tally = delta(*make_pair(3000, torch.float32))
    assert SparseTally.of(tally).dense() == tally
    assert SparseTally.of(Tally.empty()).dense() == Tally.empty()


def test_bounds_of_top_energy_hold_at_the_edges_of_bins():
    """|delta| next to the largest fp32, and fp64 values that fp32 rounds across an edge of a bin."""
    largest = torch.tensor([1.6947e38, 1.698e38, 1.6975e38, 1e37, 2e37, 3e36] * 4, dtype=torch.float64)
    edges = torch.tensor([1.0, 1.5, 2.0**-126, 3 * 2.0**-133, 2.0**-140], dtype=torch.float64)
    pairs = [(-largest.to(dtype), largest.to(dtype)) for dtype in (torch.float32, torch.float64)]
    pairs += [
        (torch.zeros(9, dtype=torch.float64), edge * (1 + side * 2.0**-40) * torch.ones(9))
        for edge in edges
        for side in (-1, 0, 1)
    ]
    pairs.append((torch.zeros(40, dtype=torch.float64), torch.cat([edges * (1 - 2.0**-50)] * 8)))
    # With a larger value the bin at the edge is not bounded by the largest |delta|. The smaller of the two distances
    # from an edge is a quarter of the least fp32 number: it matters where the edge itself is subnormal.
    pairs += [
        (torch.zeros(60, dtype=torch.float64), torch.cat([2 * edge.view(1), (edge + side * distance).repeat(59)]))
        for edge in edges
        for distance in (edge * 2.0**-40, 2.0**-151)
        for side in (-1, 0, 1)
    ]
    for base, trained in pairs:
        row = tensor_metrics(sparse(base, trained), "stored")
        _, _, d = coordinates(base, trained, "stored")
        order = np.sort(np.abs(d))[::-1]
        assert len(d) == len(base)
        for p in TOP_FRACTIONS:
            label, k = f"top_energy_{ratio_label(p)}", math.ceil(p * len(d))
            exact = math.fsum(order[:k] ** 2) / math.fsum(d * d)
            assert row[f"{label}_lower"] <= exact <= row[f"{label}_upper"]
            assert row[f"{label}_lower"] <= row[label] <= row[f"{label}_upper"]
