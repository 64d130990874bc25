"""`overlap`: kernel, reference and an oracle in NumPy agree; magnitude-conditioned chance explains unrelated ones."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdkernels.backends.layout import BINS
from opdkernels.ops import overlap as ops
from opdkernels.ops.overlap import (
    DEFAULT_THRESHOLD_BITS,
    Overlap,
    expected_magnitude,
    expected_uniform,
    overlap,
    strata_chance,
    variance_magnitude,
    variance_uniform,
    z_score,
)
from tests.conftest import ISAS
from tests.ops.conformance import DTYPES, MILLION, SIZES, check_case, dispatched, zero_pages
from tests.ops.overlap.cases import FAMILY, dtype_cases, make_runs, neighbour_cases, runs_case


def by_reference(base, runs, threshold_bits=DEFAULT_THRESHOLD_BITS) -> Overlap:
    result = Overlap.empty(len(runs), threshold_bits)
    ops.reference(base, runs, threshold_bits, *(torch.from_numpy(array) for array in result.arrays))
    return result


def rounded_once(x: np.ndarray) -> np.ndarray:
    """Doubles rounded to the eight significant bits of bf16, to nearest even."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(256 * mantissa), exponent - 8)


def rounded_by_way_of_fp32(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).float().bfloat16().double().numpy()


def test_a_difference_of_bf16_values_may_be_rounded_once_or_by_way_of_fp32():
    """CUDA kernels round once (csrc/common/cuda/packed.h). Of values further apart than here the larger one remains."""
    mantissas = np.arange(128.0, 256.0)
    for shift in range(41):
        larger = 2.0**shift * mantissas[:, None]
        for difference in (larger - mantissas, larger + mantissas):
            assert (rounded_once(difference) == rounded_by_way_of_fp32(difference)).all()
    assert (rounded_once(larger + mantissas) == larger).all()
    of_three = np.array([1 + 2.0**-8 + 2.0**-30])
    assert rounded_once(of_three) != rounded_by_way_of_fp32(of_three)


class Oracle:
    """Each coordinate's |W| and set of runs, with numbers instead of bit patterns and differences in double."""

    def __init__(self, base: torch.Tensor, runs: list[torch.Tensor], threshold_bits: int):
        threshold = float(np.uint32(threshold_bits << 16).view(np.float32))

        def as_bf16(t):
            return t.float().bfloat16().double().numpy()

        w = as_bf16(base)
        self.finite, self.changed = np.isfinite(w), []
        for run in runs:
            with np.errstate(invalid="ignore", over="ignore"):
                difference = np.abs(as_bf16(run) - w).astype(
                    np.float32
                )  # double to float to bf16: as float subtraction rounds
            visible = as_bf16(torch.from_numpy(difference))
            self.finite &= np.isfinite(visible)
            self.changed.append(visible > threshold)
        self.magnitude = (np.abs(w).astype(np.float32).view(np.uint32) >> 16)[self.finite].astype(np.int64)
        self.changed = np.array([c[self.finite] for c in self.changed])

    def check(self, found: Overlap, n: int) -> None:
        assert (found.numel, found.nonfinite) == (n, n - self.finite.sum())
        np.testing.assert_array_equal(found.hist_base, np.bincount(self.magnitude, minlength=BINS))
        for a, row in enumerate(self.changed):
            np.testing.assert_array_equal(found.hist_changed[a], np.bincount(self.magnitude[row], minlength=BINS))
            for b, other in enumerate(self.changed):
                assert found.n_both(a, b) == (row & other).sum()
        np.testing.assert_array_equal(
            found.hist_num_runs, [(self.changed.sum(0) == j).sum() for j in range(len(self.changed) + 1)]
        )


@pytest.mark.parametrize("dtypes", [(d, e, d) for d, e in itertools.product(DTYPES, DTYPES)])
def test_reference_equals_oracle(dtypes):
    for n in SIZES[:-1]:
        for threshold_bits in (0, DEFAULT_THRESHOLD_BITS - 1, DEFAULT_THRESHOLD_BITS, 0x7F7F):
            base, runs = make_runs(n, dtypes)
            Oracle(base, runs, threshold_bits).check(by_reference(base, runs, threshold_bits), n)


@pytest.mark.parametrize("dtypes", [(d, e, d) for d, e in itertools.product(DTYPES, DTYPES)])
@pytest.mark.parametrize("n", [2049, 70_001])
def test_every_pair_of_dtypes(isa, threads, dtypes, n):
    check_case(runs_case(n, dtypes), dispatched)


@pytest.mark.parametrize(
    "case",
    [*FAMILY.collect([2049, 70_001], special=True), *(c for n in SIZES[:-1] for c in dtype_cases(n, hostile=False))],
    ids=str,
)
def test_matches_reference(isa, threads, case):
    check_case(case, dispatched)


@pytest.mark.parametrize("offset", range(5))
@pytest.mark.parametrize("case", [*FAMILY.collect([2501]), *dtype_cases(2501)], ids=str)
def test_misaligned(isa, case, offset):
    check_case(case, dispatched, offsets=(offset, offset + 3, offset + 1))


@pytest.mark.parametrize("count", [2, 3])
def test_differences_between_bf16_neighbours(isa, count):
    for case in neighbour_cases(count, (*range(0x3B80, 0x3B88), *range(0x3F7E, 0x3F88), *range(0x42FE, 0x4306))):
        check_case(case, dispatched)


@pytest.mark.parametrize("n_runs", [3, 4, 5, 16])
def test_many_runs(isa, threads, n_runs):
    for n in (1, 70_001):
        base, runs = make_runs(n, (torch.bfloat16,) * (n_runs + 1))
        result = overlap(base, runs)
        assert result == by_reference(base, runs)
        assert result.hist_num_runs.sum() == result.finite
        assert (result.hist_num_runs * np.arange(n_runs + 1)).sum() == np.trace(result.both)


def test_magnitudes_from_two_on_and_large_changes(isa):
    """|w| >= 2 and |delta| >= 2 leave the fast path of two runs, also within a tensor that otherwise takes it."""
    base, runs = make_runs(40_000, hostile=False)
    for at, values in (
        (5_000, (2.0, 2.0, 2.5)),
        (9_000, (0.1, 3.0, 0.1)),
        (30_000, (-1e38, 3e38, 1.0)),
        (39_999, (7.0, 7.0, 7.0)),
    ):
        base[at], runs[0][at], runs[1][at] = values
        assert overlap(base, runs) == by_reference(base, runs)
    assert overlap(base * 100, [run * 100 for run in runs]) == by_reference(base * 100, [run * 100 for run in runs])


def test_strided_and_high_dimensional_inputs():
    base, runs = make_runs(6000, hostile=False)
    turned = [tensor.view(2, 30, 100).mT for tensor in (base, *runs)]
    assert overlap(turned[0], turned[1:]) == overlap(base, runs)
    assert overlap(base[::3], [run[::3] for run in runs]) == by_reference(base[::3], [run[::3] for run in runs])


@settings(max_examples=40, deadline=None)
@given(splits=st.lists(st.integers(0, 5000), max_size=4), n_runs=st.integers(2, 6), seed=st.integers(0, 99))
def test_every_split_merges_to_the_same_overlap(splits, n_runs, seed):
    base, runs = make_runs(5000, (torch.bfloat16,) * (n_runs + 1), seed=seed)
    full = overlap(base, runs)
    edges = [0, *sorted(splits), 5000]
    out, parts = Overlap.empty(n_runs), []
    for a, b in itertools.pairwise(edges):
        piece = base[a:b], [run[a:b] for run in runs]
        parts.append(overlap(*piece))
        overlap(*piece, out=out)
    np.random.default_rng(seed).shuffle(parts)
    forward = backward = Overlap.empty(n_runs)
    for part in parts:
        forward, backward = forward.merge(part), part.merge(backward)
    assert full == forward == backward == out
    out.reset()
    assert out == Overlap.empty(n_runs)


def test_properties_of_a_small_case():
    base = torch.zeros(8)
    runs = [torch.tensor([1.0, 1, 1, 1, 0, 0, 0, math.nan]), torch.tensor([0.0, 0, 1, 1, 1, 0, 0, 0])]
    result = overlap(base, runs)
    assert (
        result.numel,
        result.finite,
        result.n_changed(0),
        result.n_changed(1),
        result.n_both(0, 1),
        result.n_either(0, 1),
    ) == (8, 7, 4, 3, 2, 5)
    assert (result.coverage(0, 1), result.coverage(1, 0), result.jaccard(0, 1)) == (2 / 4, 2 / 3, 2 / 5)
    assert (result.density(0), result.both_zero(0, 1), result.only(0, 1), result.only(1, 0)) == (
        4 / 7,
        2 / 7,
        2 / 7,
        1 / 7,
    )
    assert result.expected_uniform(0, 1) == result.expected_magnitude(0, 1) == 12 / 7
    assert result.over_uniform(0, 1) == result.over_magnitude(0, 1) == 2 / (12 / 7)
    assert math.isnan(Overlap.empty(2).jaccard(0, 1))
    assert Overlap.empty(2).z_magnitude(0, 1) == 0


@pytest.mark.parametrize(
    ("n", "n_a", "n_b"), [(1, 1, 0), (1, 1, 1), (2, 1, 1), (7, 3, 4), (9, 9, 2), (12, 5, 5), (0, 0, 0)]
)
def test_chance_is_the_mean_and_variance_over_all_placements(n, n_a, n_b):
    """Compares with every placement of b's coordinates where a has the first n_a."""
    shared = [sum(i < n_a for i in chosen) for chosen in itertools.combinations(range(n), n_b)]
    mean = Fraction(sum(shared), len(shared))
    variance = sum((x - mean) ** 2 for x in shared) / len(shared)
    assert float(expected_uniform(n_a, n_b, n)) == pytest.approx(float(mean), rel=1e-15)
    assert float(variance_uniform(n_a, n_b, n)) == pytest.approx(float(variance), rel=1e-15)


def test_chance_adds_up_over_bins():
    base, a, b = np.array([0, 1, 4, 10]), np.array([0, 1, 2, 5]), np.array([0, 1, 3, 4])
    assert expected_magnitude(base, a, b) == 1 + 6 / 4 + 20 / 10
    assert variance_magnitude(base, a, b) == pytest.approx(2 * 3 * 2 * 1 / (16 * 3) + 5 * 4 * 5 * 6 / (100 * 9))
    assert z_score(5, 3, 4) == 1.0
    assert z_score(3, 3, 0) == 0.0


def dense_runs(n=1 << 20, shared=0.0, seed=0):
    """Dense updates of a bf16 base, stored in bf16: unrelated, or both confined to the same random mask."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(n, generator=generator)

    base = (0.02 * normal()).bfloat16()
    mask = torch.rand(n, generator=generator) < 0.3 if shared else torch.ones(n, dtype=torch.bool)
    return base, [(base.float() + 3e-5 * normal() * mask).bfloat16() for _ in range(2)]


def test_unrelated_dense_updates_are_explained_by_magnitude_and_not_by_uniform_chance():
    base, runs = dense_runs()
    result = overlap(base, runs)
    assert result.over_uniform(0, 1) >= 1.6
    assert result.over_magnitude(0, 1) == pytest.approx(1.0, abs=0.02)
    assert abs(result.z_magnitude(0, 1)) < 5
    for strata in ops.STRATA:
        expected, variance = strata_chance(base.view(1024, 1024), [run.view(1024, 1024) for run in runs], strata)
        assert result.n_both(0, 1) / expected[0, 1] == pytest.approx(
            1.0, abs=0.05
        )  # two classes to a power of two: coarser
        assert variance[0, 1] > 0


def test_a_planted_shared_mask_is_far_above_chance():
    result = overlap(*dense_runs(shared=0.3))
    assert result.over_magnitude(0, 1) > 2
    assert result.z_magnitude(0, 1) > 10


@pytest.mark.parametrize("strata", ["row", "column"])
@pytest.mark.parametrize("shape", [(3, 7), (1, 3000), (1500, 3), (0, 4), (130, 90)])
def test_strata_chance_equals_a_loop_over_lines_and_classes(strata, shape, monkeypatch):
    monkeypatch.setattr(ops, "STRATA_LINES", 64)
    monkeypatch.setattr(ops, "STRATA_TILE", 64 * 32)
    n = shape[0] * shape[1]
    base, runs = make_runs(n)
    oracle = Oracle(base, runs, DEFAULT_THRESHOLD_BITS)
    magnitude, changed = np.full(n, -1), np.zeros((2, n), bool)
    magnitude[oracle.finite] = oracle.magnitude >> 6
    changed[:, oracle.finite] = oracle.changed
    line = np.arange(n) // shape[1] if strata == "row" else np.arange(n) % max(shape[1], 1)
    mean = variance = 0.0
    for stratum in set(zip(line[oracle.finite].tolist(), magnitude[oracle.finite].tolist(), strict=True)):
        inside = (line == stratum[0]) & (magnitude == stratum[1])
        size, a, b = int(inside.sum()), int(changed[0][inside].sum()), int(changed[1][inside].sum())
        mean += a * b / size
        variance += a * b * (size - a) * (size - b) / (size**2 * (size - 1)) if size > 1 else 0
    got = strata_chance(base.view(shape), [run.view(shape) for run in runs], strata)
    assert got[0][0, 1] == got[0][1, 0] == pytest.approx(mean, rel=1e-12)
    assert got[1][0, 1] == pytest.approx(variance, rel=1e-12)


def test_changes_confined_to_shared_rows_are_explained_by_rows():
    """Runs that change the same rows overlap beyond the magnitude-conditioned chance level, not that of rows."""
    base, runs = dense_runs(seed=1)
    base, runs = base.view(1024, 1024), [run.view(1024, 1024) for run in runs]
    for run in runs:
        run[100:] = base[100:]
    result = overlap(base, runs)
    assert result.over_magnitude(0, 1) > 5
    assert result.n_both(0, 1) / strata_chance(base, runs, "row")[0][0, 1] == pytest.approx(1.0, abs=0.05)


def test_arguments_that_do_not_fit_are_refused():
    a = torch.zeros(4)
    for runs in ([a], [a] * 17):
        with pytest.raises(ValueError, match="takes 2 to 16 runs"):
            overlap(a, runs)
    with pytest.raises(TypeError, match=r"run 1 is torch.int64"):
        overlap(a, [a, a.long()])
    with pytest.raises(ValueError, match=r"shapes differ: base \(4,\), run 0 \(5,\)"):
        overlap(a, [torch.zeros(5), a])
    with pytest.raises(ValueError, match="base is on cpu, run 1 on meta"):
        overlap(a, [a, torch.zeros(4, device="meta")])
    for threshold_bits in (-1, 0x7F80):
        with pytest.raises(ValueError, match="threshold_bits must be"):
            overlap(a, [a, a], threshold_bits=threshold_bits)
    with pytest.raises(ValueError, match="out has threshold_bits"):
        overlap(a, [a, a], out=Overlap.empty(3))
    with pytest.raises(ValueError, match="do not merge"):
        overlap(a, [a, a]).merge(overlap(a, [a, a], threshold_bits=0))
    with pytest.raises(ValueError, match="strata must be one of row, column"):
        strata_chance(a, [a, a], "diagonal")
    with pytest.raises(ValueError, match="rows or columns of a matrix"):
        strata_chance(a, [a, a], "row")


def test_operator_is_registered_as_torch_expects():
    base, runs = make_runs(100)

    def arguments():
        return (base, runs, DEFAULT_THRESHOLD_BITS, *(torch.from_numpy(array) for array in Overlap.empty(2).arrays))

    torch.library.opcheck(torch.ops.opdkernels.overlap_.default, arguments())

    def count(w, trained, threshold_bits, table, *outputs):
        torch.ops.opdkernels.overlap_(w, trained, threshold_bits, table, *outputs)
        return table.sum()

    compiled = torch.compile(count, fullgraph=True, backend="aot_eager")
    assert compiled(*arguments()) == by_reference(base, runs).finite


@pytest.mark.slow
@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
def test_more_than_two_billion_coordinates():
    """Beyond 2^31: a few coordinates differ, the rest is untouched zero pages of a sparse mapping."""
    n = 2**31 + 11
    with zero_pages(2 * n, 2 * n) as (zeros, edges):
        base, run = (torch.frombuffer(m, dtype=torch.bfloat16) for m in (zeros, edges))
        run[0] = run[2**31] = run[n - 1] = 1.0
        result = overlap(base, [run, run])
        assert (result.numel, result.n_both(0, 1), result.hist_base[0]) == (n, 3, n)
        assert result.hist_num_runs.tolist() == [n - 3, 0, 3]
        del base, run


@pytest.mark.parametrize("case", FAMILY.collect([MILLION], only="bfloat16, torch.bfloat16"), ids=str)
def test_a_million_coordinates(isa, threads, case):
    check_case(case, dispatched)
