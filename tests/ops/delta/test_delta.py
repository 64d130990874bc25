"""`delta`: kernel, reference and an oracle in NumPy agree for every size, dtype, instruction set and split."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdkernels.backends.layout import SUM_LIMBS
from opdkernels.ops import delta as ops
from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, THRESHOLDS, Tally, delta, exact_float, exact_floats, to_limbs
from tests.conftest import ISAS
from tests.ops.conformance import DTYPES, MILLION, SIZES, check_case, dispatched, make_pair, zero_pages
from tests.ops.delta.cases import FAMILY, pair_case

ARRAYS = ("tables", "counts", "sums", "maximum")


def by_reference(base, trained, threshold_bits=DEFAULT_THRESHOLD_BITS, mask=None) -> Tally:
    tally = Tally.empty(threshold_bits)
    ops.reference(
        base, trained, threshold_bits, THRESHOLDS, *(torch.from_numpy(getattr(tally, a)) for a in ARRAYS), mask
    )
    return tally


def rounded(x: np.ndarray) -> np.ndarray:
    """bf16 patterns, to nearest even, by comparing with both neighbours instead of adding a bias."""
    x32 = x.astype(np.float32)
    below = x32.view(np.uint32) >> 16 << 16
    with np.errstate(over="ignore", invalid="ignore"):
        above = below + np.uint32(0x10000)
        low, high = below.view(np.float32).astype(np.float64), above.view(np.float32).astype(np.float64)
        top = (below & 0x7FFFFFFF) == 0x7F7F0000
        high = np.where(top, np.copysign(2.0**128, low), high)
        to_low, to_high = np.abs(x32.astype(np.float64) - low), np.abs(high - x32.astype(np.float64))
    up = (to_high < to_low) | ((to_high == to_low) & (below >> 16 & 1 == 1))
    special = (below & 0x7F800000) == 0x7F800000
    return np.where(np.isnan(x32), 0x7FC0, np.where(special | ~up, below, above) >> 16).astype(np.int64)


def value(patterns: np.ndarray) -> np.ndarray:
    return (patterns.astype(np.uint32) << 16).view(np.float32)


class Oracle:
    """The counts and sums of a tally, computed coordinate by coordinate in NumPy."""

    def __init__(self, base: torch.Tensor, trained: torch.Tensor):
        fp64 = torch.float64 in (base.dtype, trained.dtype)
        x, y = (t.double().numpy() if fp64 else t.float().numpy() for t in (base, trained))
        w, v = rounded(x), rounded(y)
        with np.errstate(over="ignore", invalid="ignore"):
            d = rounded(value(v) - value(w)) & 0x7FFF
            finite = np.isfinite(value(w)) & np.isfinite(value(v)) & (d < 0x7F80)
            stored = np.abs(y - x)[finite]
        self.nonfinite = int((~finite).sum())
        self.visible, self.w, self.v = d[finite], w[finite] & 0x7FFF, v[finite] & 0x7FFF
        self.stored, self.x, self.y = stored, x[finite], y[finite]
        self.steps = [self.step(a, b) for a, b in zip(value(w[finite]), value(v[finite]), strict=True)]
        self.changed = np.zeros(len(d), bool)
        self.changed[finite] = self.visible > 0

    @staticmethod
    def step(a: float, b: float) -> int:
        """bf16 neighbours between a and b, through their integer order."""

        def key(f):
            return int(np.abs(np.float32(f)).view(np.uint32) >> 16) * (1 if f >= 0 else -1)

        return key(b) - key(a)


def assert_matches(tally: Tally, oracle: Oracle, n: int) -> None:
    def table(patterns):
        return np.bincount(patterns, minlength=ops.BINS)

    assert (tally.numel, tally.nonfinite) == (n, oracle.nonfinite)
    np.testing.assert_array_equal(tally.hist_base, table(oracle.w))
    np.testing.assert_array_equal(tally.hist_delta, table(oracle.visible))
    np.testing.assert_array_equal(tally.hist_trained_changed, table(oracle.v[oracle.visible > 0]))
    np.testing.assert_array_equal(tally.hist_base_changed, table(oracle.w[oracle.stored != 0]))
    np.testing.assert_array_equal(
        tally.hist_delta_stored, table(oracle.stored.astype(np.float32).view(np.uint32).astype(np.int64) >> 16)
    )
    for k, bits in enumerate(tally.threshold_bits):
        np.testing.assert_array_equal(tally.hist_base_over[k], table(oracle.w[oracle.visible > bits]))
    ends = np.clip(oracle.steps, -17, 17).astype(int) + 17 if n else np.zeros(0, int)
    np.testing.assert_array_equal(tally.ulp, np.bincount(ends, minlength=35))
    for k, threshold in enumerate(THRESHOLDS):
        assert tally.lt[k] == (oracle.stored.astype(np.float64) < threshold).sum()
        assert tally.le[k] == (oracle.stored.astype(np.float64) <= threshold).sum()
    limit = oracle.stored.dtype.type(1e-3) * np.maximum(np.abs(oracle.x), np.abs(oracle.y))
    assert tally.unchanged_rtol == (oracle.stored <= limit).sum()
    assert tally.max_delta == (oracle.stored.max() if len(oracle.stored) else 0)
    for total, values in (
        (tally.sum_base_sq, oracle.x.astype(np.float64) ** 2),
        (tally.sum_trained_sq, oracle.y.astype(np.float64) ** 2),
        (tally.sum_delta_sq, oracle.stored.astype(np.float64) ** 2),
        (tally.sum_delta_abs, oracle.stored.astype(np.float64)),
    ):
        assert exact_float(total) == math.fsum(values)  # fsum rounds the exact sum once


@pytest.mark.parametrize(("base_dtype", "trained_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_reference_equals_oracle(base_dtype, trained_dtype):
    for n in SIZES[:-1]:
        pair = make_pair(n, base_dtype, trained_dtype)
        assert_matches(by_reference(*pair), Oracle(*pair), n)


@pytest.mark.parametrize("pair", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_pair_of_dtypes(isa, threads, pair):
    for n in SIZES:
        check_case(pair_case(n, *pair), dispatched)


@pytest.mark.parametrize("case", FAMILY.collect(special=True), ids=str)
def test_matches_reference(isa, threads, case):
    check_case(case, dispatched)


@pytest.mark.parametrize("offset", range(5))
@pytest.mark.parametrize("case", FAMILY.collect([4800]), ids=str)
def test_misaligned(isa, case, offset):
    check_case(case, dispatched, offsets=(offset, offset + 3, offset + 1))


def test_bit_equal_compares_patterns():
    nan = float("nan")
    base = torch.tensor([nan, 0.0, 1.0, float("inf"), 2.0], dtype=torch.bfloat16)
    trained = torch.tensor([nan, -0.0, 1.0, float("inf"), 3.0], dtype=torch.bfloat16)
    tally = delta(base, trained)
    assert (tally.bit_equal, tally.nonfinite, tally.hist_delta[0]) == (3, 2, 2)


def test_mask_is_the_visible_change():
    base, trained = make_pair(4001)
    mask = torch.empty(501, dtype=torch.uint8)
    delta(base, trained, mask=mask)
    bits = np.unpackbits(mask.numpy(), bitorder="little")
    np.testing.assert_array_equal(bits[:4001].astype(bool), Oracle(base, trained).changed)
    assert not bits[4001:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(splits=st.lists(st.integers(0, 3000), max_size=4), seed=st.integers(0, 99))
def test_every_split_merges_to_the_same_tally(dtype, splits, seed):
    base, trained = make_pair(3000, dtype, seed=seed)
    full = delta(base, trained)
    edges = [0, *sorted(splits), 3000]
    parts = [delta(base[a:b], trained[a:b]) for a, b in itertools.pairwise(edges)]
    np.random.default_rng(seed).shuffle(parts)
    merged = Tally.empty()
    for part in parts:
        merged = merged.merge(part)
    assert merged == full
    nested = parts[0]
    for part in parts[1:]:
        nested = part.merge(nested)
    assert nested == full
    out = Tally.empty()
    for a, b in itertools.pairwise(edges):
        delta(base[a:b], trained[a:b], out=out)
    assert out == full


def test_cuts_follow_their_order(isa):
    base, trained = make_pair(3000)
    for threshold_bits in ((0,), (5,), (0, 0x3728), (0, 1, 2, 0x7F7F)):
        tally = delta(base, trained, threshold_bits=threshold_bits)
        assert tally == by_reference(base, trained, threshold_bits=threshold_bits)
        assert (np.diff(tally.hist_base_over.sum(1)) <= 0).all()


def flushing_pairs() -> dict[str, list[torch.Tensor]]:
    """Pairs with subnormal numbers or differences, also next to large numbers alone."""
    fp16 = torch.tensor([60000.0, 6e-8], dtype=torch.float16)
    bits = torch.arange(1 << 19, dtype=torch.int32) % 100
    steps = [side.to(torch.int16).view(torch.bfloat16) for side in (bits, bits + 1)]
    return {"many": list(make_pair(100_000)), "few": [fp16, fp16.flip(0)], "steps of subnormals": steps}


@pytest.mark.parametrize("name", ["many", "few", "steps of subnormals"])
def test_subnormals_count_whatever_torch_flushes(isa, threads, name):
    base, trained = flushing_pairs()[name]
    expected = by_reference(base, trained)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        results = [delta(base, trained), delta(base, trained)]
    finally:
        torch.set_flush_denormal(False)
    assert results == [expected, expected]
    ones = torch.ones(3, dtype=base.dtype)
    assert delta(ones, ones) == by_reference(ones, ones)  # nothing was left for the next call


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-308, 1e-300, 1e-290, 1e-155, 1e-150, 1e-100])
def test_sums_of_the_smallest_doubles_are_exact_and_end(isa, size):
    rng = np.random.default_rng(0)
    base = torch.from_numpy(size * rng.normal(size=3000))
    trained = torch.from_numpy(size * rng.normal(size=3000) * 1e-3)
    assert delta(base, trained) == by_reference(base, trained)
    assert delta(torch.zeros(3, dtype=torch.float64), torch.full((3,), size, dtype=torch.float64)).max_delta == size
    assert_matches(delta(base, trained), Oracle(base, trained), 3000)


def test_strided_and_high_dimensional_inputs():
    base, trained = make_pair(6000, hostile=False)
    assert delta(base.view(2, 30, 100).mT, trained.view(2, 30, 100).mT) == delta(base, trained)
    assert delta(base[::3], trained[::3]) == by_reference(base[::3], trained[::3])


def test_arguments_that_do_not_fit_are_refused():
    a = torch.zeros(4)
    with pytest.raises(TypeError, match=r"trained is torch\.int64"):
        delta(a, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shapes differ: base \(4,\), trained \(5,\)"):
        delta(a, torch.zeros(5))
    with pytest.raises(ValueError, match="base is on cpu, trained on meta"):
        delta(a, torch.zeros(4, device="meta"))
    for threshold_bits in ((), (1, 0), (0, 0), (0, 1, 2, 3, 4), (0x7F80,), (-1,)):
        with pytest.raises(ValueError, match="threshold_bits must be"):
            delta(a, a, threshold_bits=threshold_bits)
    with pytest.raises(ValueError, match="mask must be"):
        delta(a, a, mask=torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="do not merge"):
        delta(a, a).merge(delta(a, a, threshold_bits=(0,)))


def test_operator_is_registered_as_torch_expects():
    base, trained = make_pair(100)
    tally = Tally.empty()
    arguments = (
        base,
        trained,
        list(DEFAULT_THRESHOLD_BITS),
        list(THRESHOLDS),
        *(torch.from_numpy(getattr(tally, a)) for a in ARRAYS),
        None,
    )
    torch.library.opcheck(torch.ops.opdkernels.delta_.default, arguments)

    def count(w, v, tables, counts, sums, maximum):
        torch.ops.opdkernels.delta_(
            w, v, list(DEFAULT_THRESHOLD_BITS), list(THRESHOLDS), tables, counts, sums, maximum, None
        )
        return tables.sum()

    outputs = [torch.from_numpy(getattr(Tally.empty(), a)) for a in ARRAYS]
    compiled = torch.compile(count, fullgraph=True, backend="aot_eager")
    assert compiled(base, trained, *outputs) == by_reference(base, trained).tables.sum()


@pytest.mark.slow
@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
def test_more_than_two_billion_coordinates():
    """Beyond 2^31: the first and last coordinates differ, the middle is untouched zero pages of a sparse mapping."""
    n = 2**31 + 11
    with zero_pages(2 * n, 2 * n) as (zeros, edges):
        base, trained = (torch.frombuffer(m, dtype=torch.bfloat16) for m in (zeros, edges))
        trained[0] = trained[2**31] = trained[n - 1] = 1.0
        tally = delta(base, trained)
        assert (tally.numel, tally.bit_equal, tally.hist_delta[0x3F80], tally.hist_base[0]) == (n, n - 3, 3, n)
        assert exact_float(tally.sum_delta_sq) == 3.0
        del base, trained


@pytest.mark.parametrize("case", FAMILY.collect([MILLION], only="bfloat16, torch.bfloat16"), ids=str)
def test_a_million_coordinates(isa, threads, case):
    check_case(case, dispatched)


def test_doubles_nearest_to_exact_sums():
    rng = np.random.default_rng(0)
    totals = [0, 1, 2**52, 2**53 - 1, 2**1074, 3 << 1073, 2**1100 - 1, (2**53 - 1) << 900, 2**1300 + 1]
    totals += [(1 << 53 | 1) << shift for shift in range(1, 1300, 7)]  # halfway between two doubles
    totals += [((1 << 53 | 1) << shift) + sign for shift in range(40, 1300, 9) for sign in (-1, 1)]
    totals += [int(x) << int(y) for x, y in zip(rng.integers(1, 2**62, 500), rng.integers(0, 1300, 500), strict=True)]
    limbs = np.array([to_limbs(total) for total in totals], np.int64)
    carried = limbs.copy()
    carried[:, 1:] += 7 << 32
    carried[:, 2:] -= 7
    carried[:, -1] -= 7 << 32
    expected = [exact_float(total) for total in totals]
    assert exact_floats(limbs).tolist() == expected
    assert exact_floats(carried).tolist() == expected
    assert exact_floats(-limbs).tolist() == [-value for value in expected]
    assert exact_floats(limbs.reshape(1, -1, SUM_LIMBS)).tolist() == [expected]
