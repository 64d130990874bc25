"""`quantile`: the threshold is exactly the k-th magnitude; kernel, reference and an oracle that sorts agree."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdkernels.ops import quantile as ops
from opdkernels.ops.quantile import Quantile, quantile, quantiles
from tests.ops.conformance import DTYPES, MILLION, MISALIGNED, SIZES, check_case, dispatched, make_pair
from tests.ops.quantile.cases import FAMILY, hostile_arrays, make_mask, ranks

SAMPLED = 140_003  # beyond the size from which the kernel samples


class Oracle:
    """The definition: sorts doubles and compares each value."""

    def __init__(self, values: torch.Tensor, mask: torch.Tensor | None = None):
        self.size = np.abs(values.double().numpy().ravel())
        self.numbers = np.sort(self.size[~np.isnan(self.size)])
        self.bits = None
        if mask is not None:
            self.bits = np.unpackbits(mask.numpy(), bitorder="little")[: len(self.size)].astype(bool)

    def __call__(self, k: int, largest: bool = True) -> Quantile:
        threshold = float(self.numbers[-k] if largest else self.numbers[k - 1])
        above, tied = (self.size > threshold if largest else self.size < threshold), self.size == threshold
        masked = (None, None) if self.bits is None else (int((above & self.bits).sum()), int((tied & self.bits).sum()))
        return Quantile(k, threshold, int(above.sum()), int(tied.sum()), len(self.size) - len(self.numbers), *masked)


def without_mask(found: Quantile) -> Quantile:
    return replace(found, above_masked=None, tied_masked=None)


def assert_exact(values: torch.Tensor, wanted: list[int] | None = None) -> None:
    """All ranks at once and one alone, from the top and the bottom, with and without a mask."""
    n, mask = values.numel(), make_mask(values.numel())
    valid, oracle = n - int(values.isnan().sum()), Oracle(values, mask)
    wanted = [k for k in wanted or ranks(n) if k <= valid]
    for largest in (True, False):
        expected = [oracle(k, largest) for k in wanted]
        assert quantiles(values, wanted, largest=largest, mask=mask) == expected
        assert quantiles(values, wanted[-2:], largest=largest) == [
            without_mask(expected_one) for expected_one in expected[-2:]
        ]
        for k, expected_one in list(zip(wanted, expected, strict=True))[:1]:
            assert quantile(values, k, largest=largest, mask=mask) == expected_one


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_equals_oracle(dtype):
    for n in SIZES[:-1]:
        values, mask = make_pair(n, dtype, seed=n)[0], make_mask(n)
        valid, oracle = n - int(values.isnan().sum()), Oracle(values, mask)
        for largest in (True, False):
            for k in ranks(valid):
                expected_one = oracle(k, largest)
                thresholds, counts = ops.reference(values, [k], largest, mask)
                assert (thresholds.item(), counts.tolist()) == (
                    expected_one.threshold,
                    [
                        [
                            expected_one.above,
                            expected_one.tied,
                            expected_one.above_masked,
                            expected_one.tied_masked,
                            expected_one.nan,
                        ]
                    ],
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*SIZES, SAMPLED])
def test_kernel_equals_oracle(isa, threads, dtype, n):
    assert_exact(make_pair(n, dtype, seed=n)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hostile_data(isa, threads, dtype):
    for _, values in hostile_arrays(SAMPLED):
        assert_exact(torch.from_numpy(values.copy()).to(dtype), [7, SAMPLED // 5, SAMPLED])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bracket_that_misses_is_answered_exactly(isa, threads, dtype):
    """The result is exact for any values at the sampled positions, which here get misleading ones."""
    n = 140_000
    honest = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for value in (1e-6, 1e6):
        values = honest.clone()
        values[positions(n)] = value
        assert_exact(values, [10, n // 5, n - 10])


def positions(n: int, size: int = 1 << 13) -> torch.Tensor:
    """Where the kernel samples n values: one in each stratum, at a splitmix64 offset."""
    i = np.arange(1, size + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        i = i * np.uint64(0x9E3779B97F4A7C15)
        i = (i ^ (i >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        i = (i ^ (i >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        i = i ^ (i >> np.uint64(31))
    first = (n / size * np.arange(size)).astype(np.int64)
    last = np.minimum((n / size * np.arange(1, size + 1)).astype(np.int64), n)
    return torch.from_numpy(first + ((i >> np.uint64(32)).astype(np.int64) * (last - first) >> 32))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=True) | st.sampled_from([0.0, -0.0, 1.0, -1.0]), min_size=1, max_size=40
    ),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_small_array(values, dtype, data):
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    valid = len(values) - int(tensor.isnan().sum())
    if valid:
        assert_exact(tensor, [data.draw(st.integers(1, valid))])


def test_bounds_hold_every_way_to_break_ties():
    """All choices among the ties of a small case: the extremes are the bounds, the mean is the expectation."""
    from itertools import combinations

    values = torch.tensor([5.0, -3, 3, 3, 1, -3, 0])
    mask = torch.tensor([0b0101011], dtype=torch.uint8)
    inside = [bool(0b0101011 >> i & 1) for i in range(7)]
    tied = [1, 2, 3, 5]
    for k in (2, 3, 4, 5):
        result = quantile(values, k, mask=mask)
        counts = [inside[0] + sum(inside[i] for i in chosen) for chosen in combinations(tied, k - 1)]
        assert (result.lower, result.upper) == (min(counts), max(counts))
        assert result.expected == pytest.approx(sum(counts) / len(counts), rel=1e-15)


def test_topk_is_between_the_bounds():
    values, mask = make_pair(50_000, torch.bfloat16, hostile=False)[0], make_mask(50_000)
    bits = ops.unpack(mask, 50_000)
    for largest in (True, False):
        result = quantile(values, 5000, largest=largest, mask=mask)
        chosen = values.abs().topk(5000, largest=largest).indices
        assert result.lower <= int(bits[chosen].sum()) <= result.upper
        assert result.lower <= result.expected <= result.upper


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_views(isa, dtype):
    values = make_pair(5000, dtype)[0]
    masks = torch.cat([make_mask(4801), torch.full((8,), 255, dtype=torch.uint8)])
    for offset in range(5):
        view, mask = values[offset : offset + 4801], masks[offset : offset + 601]
        assert quantile(view, 777, mask=mask) == Oracle(view, mask)(777)


def test_strided_and_high_dimensional_inputs():
    values = make_pair(6000, torch.float32)[0].view(20, 300)
    assert quantile(values.T, 600) == quantile(values, 600)
    assert quantile(values[:, ::3], 200) == Oracle(values[:, ::3])(200)


def test_nan_is_left_out_and_counted(isa):
    for dtype in DTYPES:
        values = torch.tensor([math.nan, 2, -math.inf, -math.nan, 1], dtype=dtype)
        assert quantile(values, 1) == Quantile(1, math.inf, 0, 1, 2)
        assert quantile(values, 3) == Quantile(3, 1.0, 2, 1, 2)
        assert quantile(values, 1, largest=False) == Quantile(1, 1.0, 0, 1, 2)
        with pytest.raises(ValueError, match="k is 4, but of 5 values 2 are NaN"):
            quantile(values, 4)
        thresholds, counts = torch.ops.opdkernels.quantile(torch.full((3,), math.nan, dtype=dtype), [2], True, None)
        assert thresholds.isnan().all()
        assert counts.tolist() == [[0, 0, 0, 0, 3]]


def test_arguments_that_do_not_fit_are_refused():
    values = torch.zeros(9)
    with pytest.raises(TypeError, match=r"values is torch.int64"):
        quantile(values.long(), 1)
    for k in (0, 10, -1):
        with pytest.raises(ValueError, match=r"k must be in 1 \.\. 9"):
            quantile(values, k)
    with pytest.raises(ValueError, match=r"k must be in 1 \.\. 0"):
        quantile(torch.zeros(0), 1)
    assert quantiles(torch.zeros(0), []) == []
    for mask in (
        torch.zeros(1, dtype=torch.uint8),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(4, dtype=torch.uint8)[::2],
    ):
        with pytest.raises(ValueError, match="mask must be"):
            quantile(values, 1, mask=mask)
    with pytest.raises(ValueError, match="others on meta"):
        quantile(values, 1, mask=torch.zeros(2, dtype=torch.uint8, device="meta"))
    with pytest.raises(ValueError, match="without a mask"):
        _ = quantile(values, 1).expected


def test_operator_is_registered_as_torch_expects():
    values, mask = make_pair(100, torch.float32)[0], make_mask(100)
    for arguments in ((values, [3, 10], True, mask), (values, [5], False, None)):
        torch.library.opcheck(torch.ops.opdkernels.quantile.default, arguments)

    def double(x, bits):
        thresholds, counts = torch.ops.opdkernels.quantile(x, [3, 10], True, bits)
        return thresholds * 2, counts.sum()

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(values, mask), double(values, mask), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("case", FAMILY.collect(SIZES, special=True), ids=str)
def test_matches_reference(isa, threads, case):
    check_case(case, dispatched)


@pytest.mark.parametrize("case", FAMILY.collect([3001]), ids=str)
def test_misaligned(isa, case):
    check_case(case, dispatched, offsets=MISALIGNED)


@pytest.mark.parametrize("case", FAMILY.collect([MILLION], only="float32"), ids=str)
def test_a_million_values(isa, threads, case):
    check_case(case, dispatched)


def test_subnormal_thresholds_whatever_torch_flushes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        values = torch.tensor([1.0, 3e-40, 2e-40, 1e-40]).to(dtype)
        if dtype == torch.float16:
            values = torch.tensor([1.0, 6e-7, 4e-7, 2e-7], dtype=dtype)
        expected = quantiles(values, [1, 2, 3])
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormals")
        try:
            result = quantiles(values, [1, 2, 3])
        finally:
            torch.set_flush_denormal(False)
        assert result == expected
        assert 0 < expected[2].threshold < 1e-6
