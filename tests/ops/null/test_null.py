"""The null against what it claims to predict: dense updates, independent of W, rounded by torch itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opdkernels.ops import null as null_ops
from opdkernels.ops.null import Null, fit_many
from opdkernels.ops.null.histograms import INFINITY
from opdkernels.ops.null.layout import FIT_SIZE, KINDS
from tests.conftest import ISAS, native
from tests.ops.conformance import Allocator, check_case, dispatched, inputs_of, run_case
from tests.ops.null.cases import FAMILY, OPTIONS, call_null

CASES = FAMILY.collect((1, 31, 1025, 70_001), special=True)
STD = 0.03
RATIOS = (0.01, 0.05, 0.1, 0.2)
Table = np.ndarray | tuple[np.ndarray, np.ndarray]  # dense, or bf16 bits and counts


def dense_table(table: Table) -> np.ndarray:
    if isinstance(table, np.ndarray):
        return table
    dense = np.zeros(1 << 15, np.int64)
    dense[table[0]] = table[1]
    return dense


def fit(base: Table, delta: Table, remainder: str = "grid") -> dict[str, Null]:
    return null_ops.fit(dense_table(base), dense_table(delta), remainder, RATIOS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_agrees_with_the_reference(isa, case):
    check_case(case, dispatched)


@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_instruction_sets_and_threads_change_no_bit(case, threads):
    before, outputs = native.current_isa(), []
    try:
        for isa in ISAS:
            native.use_isa(isa)
            outputs.append(run_case(case, dispatched))
    finally:
        native.use_isa(before)
    torch.set_num_threads(1)
    outputs.append(run_case(case, dispatched))
    for tensors in zip(*outputs, strict=True):
        assert len({tensor.numpy().tobytes() for tensor in tensors}) == 1


def test_operator_is_registered_as_torch_wants_it():
    (flat,) = [inputs_of(case) for case in CASES if case.name == "unchanged and empty"]
    call_null(lambda name: lambda *arguments: torch.library.opcheck(dispatched(name), arguments), Allocator(), *flat)


@pytest.mark.parametrize("starts", [[1, 3], [0, 2], [0, 4], [0, -1], [0, 3, 2, 3], [0, 9, 3]], ids=str)
def test_starts_that_are_not_those_of_the_bins_are_refused(starts):
    bits, counts = torch.tensor([0, 5, 6]), torch.tensor([1, 1, 1])
    uniform = torch.zeros(len(starts) - 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="starts"):
        call_null(dispatched, Allocator(), torch.tensor(starts), bits, counts, counts, uniform, *OPTIONS)


def patterns(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16).int() & 0x7FFF


def table(x: torch.Tensor) -> np.ndarray:
    return torch.bincount(patterns(x).flatten(), minlength=1 << 15).numpy()


def pair(base: torch.Tensor, trained: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tables of |W|, of |visible delta|, and of |W| where it is not zero, of two fp32 tensors."""
    base = base.bfloat16()
    delta = trained.bfloat16() - base
    return table(base), table(delta), table(base[delta != 0])


def near_zero(base: np.ndarray, changed: np.ndarray, ratio: float) -> float:
    """Observed |mask and changed| by its definition: one by one, ties at the threshold have equal parts."""
    left, result = math.ceil(ratio * base.sum()), 0.0
    for pattern in np.flatnonzero(base):
        taken = min(left, base[pattern])
        result += taken * changed[pattern] / base[pattern]
        left -= taken
    return result


def weights(shape: str, n: int, generator: torch.Generator) -> torch.Tensor:
    z = torch.randn(n, generator=generator)
    if shape == "student":  # Student-t(4) of the same spread
        chi = sum(torch.randn(n, generator=generator) ** 2 for _ in range(4))
        z = z / torch.sqrt(chi / 4)
        z = z / z.std()
    return z * STD


def update(kind: str, n: int, size: float, generator: torch.Generator) -> torch.Tensor:
    z = torch.randn(n, generator=generator)
    if kind == "sign":
        return torch.sign(z) * size
    if kind == "normal":
        return z * size
    return torch.sign(z) * torch.exp(1.5 * torch.randn(n, generator=generator)) * size / 3  # a heavy tail


def dense(kind: str, remainder: str, shape: str, relative: float, n: int = 1_000_000):
    generator = torch.Generator().manual_seed(11)
    base = weights(shape, n, generator)
    base = base.bfloat16().float() if remainder == "grid" else base
    return pair(base, base + update(kind, n, STD * relative, generator))


@pytest.mark.parametrize("remainder", ["grid", "uniform"])
@pytest.mark.parametrize("relative", [5e-4, 1e-3, 2e-3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["normal", "student"])
def test_a_dense_update_is_explained_by_its_kind_of_null(shape, kind, relative, remainder):
    base, delta, changed = dense(kind, remainder, shape, relative)
    null = fit(base, delta, remainder=remainder)["chosen"]
    assert null.kind == kind
    assert changed.sum() / null.changed == pytest.approx(1, abs=0.02)
    for ratio in (0.05, 0.1, 0.2):
        observed = near_zero(base, changed, ratio) / changed.sum()
        # A shape comes from the weights that are below some thirty updates: here one in a hundred, 10,000 in all.
        assert observed / (null.near_zero[ratio] / null.changed) == pytest.approx(
            1, abs=0.03 if kind == "empirical" else 0.02
        )
    assert null.distance < 0.011
    if kind != "empirical":
        # A jump of the sign's energy pins its size to a plateau: a hundredth is what the table can tell.
        assert null.size == pytest.approx(STD * relative, rel=0.02)


@pytest.mark.parametrize("remainder", ["grid", "uniform"])
@pytest.mark.parametrize("density", [0.02, 0.175, 0.6])
def test_an_update_of_a_random_mask_is_not_explained(density, remainder):
    """A distribution with a mass at 0 would explain a mask by itself."""
    generator = torch.Generator().manual_seed(3)
    base = weights("normal", 400_000, generator)
    base = base.bfloat16().float() if remainder == "grid" else base
    mask = torch.rand(len(base), generator=generator) < density
    base_table, delta, changed = pair(base, base + mask * update("normal", len(base), 1e-3 * STD / density, generator))
    nulls = fit(base_table, delta, remainder=remainder)
    assert "empirical" not in nulls
    assert changed.sum() / nulls["chosen"].changed < 0.85


@pytest.mark.parametrize("remainder", ["grid", "uniform"])
def test_a_heavy_tail_is_nearer_to_empirical_than_to_normal(remainder):
    base, delta, _ = dense("lognormal", remainder, "normal", 1e-3)
    nulls = fit(base, delta, remainder=remainder)
    assert nulls["empirical"].distance < nulls["normal"].distance / 20


def test_larger_updates_of_small_weights_are_not_explained():
    """The distribution of the empirical null comes from small weights, not from the visible fraction at each |W|."""
    generator = torch.Generator().manual_seed(3)
    base = weights("normal", 1_000_000, generator).bfloat16().float()
    moved = update("normal", len(base), STD * 1e-3, generator) * (1 + 3 * (base.abs() < 0.1 * STD))
    base, delta, changed = pair(base, base + moved)
    for kind, null in fit(base, delta).items():
        coverage = near_zero(base, changed, 0.05) / changed.sum()
        assert abs(coverage / (null.near_zero[0.05] / null.changed) - 1) > 0.05, kind


# One weight repeated, with an update of the order of its spacing: powers of two, zero, subnormals, others.
SINGLE = [
    (1.0, 2**-8),
    (1.0, 2**-9),
    (1.5, 2**-7),
    (1.5, 2**-4),
    (2.0**-126, 2.0**-133),
    (2.0**-125, 2.0**-132),
    (3 * 2.0**-133, 2.0**-132),
    (0.0, 2.0**-131),
    (0.0, 0.013),
    (1e-9, 0.013),
    (-0.5, 0.002),
]


@pytest.mark.parametrize(("weight", "size"), SINGLE)
@pytest.mark.parametrize("kind", ["sign", "normal"])
def test_closed_form_agrees_with_rounding_many_updates(weight, size, kind):
    n = 400_000
    generator = torch.Generator().manual_seed(5)
    size *= 1.07  # away from ties, which training meets with probability zero
    base = torch.full((n,), weight)
    base, delta, changed = pair(base, base + update(kind, n, size, generator))
    null = fit(base, delta)[kind]
    assert null.changed == pytest.approx(changed.sum(), abs=5 * math.sqrt(n))
    distance = np.abs(null.delta - delta).sum() / 2 / n
    assert distance == pytest.approx(null.distance, abs=1e-9)
    assert distance < math.sqrt(np.count_nonzero(null.delta > 0.5) / n)  # what sampling alone costs


@pytest.mark.parametrize("spacings", [0.3, 0.8, 1.9, 5.3, 40.0])
@pytest.mark.parametrize("kind", ["sign", "normal"])
def test_closed_form_agrees_over_an_octave(spacings, kind):
    """All weights of an octave are equally frequent, so that steps across both its powers of two occur."""
    n = 128 * 8000
    generator = torch.Generator().manual_seed(5)
    base = (1 + torch.arange(n) % 128 / 128) / 32
    base, delta, changed = pair(base, base + update(kind, n, spacings * 2.0**-12, generator))
    null = fit(base, delta)[kind]
    assert null.changed == pytest.approx(changed.sum(), abs=5 * math.sqrt(changed.sum()))
    assert null.distance < 0.01 + spacings / 1000


@pytest.mark.parametrize("exponent", [0, -20, -125])
@pytest.mark.parametrize("kind", ["sign", "normal"])
def test_remainder_closed_form_agrees_with_rounding_many_updates(exponent, kind):
    n = 1_000_000
    generator = torch.Generator().manual_seed(5)
    base = (1 + torch.rand(n, generator=generator)) * 2.0**exponent
    moved = base + update(kind, n, 2.0 ** (exponent - 8), generator)
    base, delta, changed = pair(base, moved)
    null = fit(base, delta, remainder="uniform")[kind]
    assert null.changed == pytest.approx(changed.sum(), rel=0.005)
    assert null.distance < 0.01


@pytest.mark.parametrize("remainder", ["grid", "uniform"])
def test_nothing_changed(remainder):
    base = table(torch.randn(1000).bfloat16())
    delta = np.zeros(1 << 15, np.int64)
    delta[0] = 1000
    for null in fit(base, delta, remainder=remainder).values():
        assert (null.size, null.changed, null.distance) == (0, 0, 0)
        assert np.array_equal(null.delta, delta)
        assert set(null.near_zero.values()) == {0.0}


@pytest.mark.parametrize("remainder", ["grid", "uniform"])
def test_no_coordinates(remainder):
    empty = np.zeros(1 << 15, np.int64)
    for null in fit(empty, empty, remainder=remainder).values():
        assert (null.size, null.changed, null.distance, null.delta.sum()) == (0, 0, 0, 0)
    assert fit_many([], [], [], []).fits.shape == (0, 3, 5)


@pytest.mark.parametrize("remainder", ["grid", "uniform"])
@pytest.mark.parametrize("step", [0x0001, 0x3C00, 0x3F80, INFINITY - 1, INFINITY])
@pytest.mark.parametrize("weight", [0, 1, 0x3F80, INFINITY - 1])
def test_one_coordinate(weight, step, remainder):
    base, delta = np.zeros(1 << 15, np.int64), np.zeros(1 << 15, np.int64)
    base[weight] = delta[step] = 1
    for null in fit(base, delta, remainder=remainder).values():
        assert 0 <= null.distance <= 1 + 1e-9
        assert 0 <= null.changed <= 1 + 1e-9
        assert math.isfinite(null.size)
        assert null.delta.sum() == pytest.approx(1)


def test_huge_updates_change_everything_and_keep_their_energy():
    generator = torch.Generator().manual_seed(7)
    base = weights("normal", 100_000, generator).bfloat16().float()
    base, delta, changed = pair(base, base + update("normal", len(base), 1e6, generator))
    null = fit(base, delta)["chosen"]
    assert null.kind == "normal"
    assert null.size == pytest.approx(1e6, rel=0.01)
    assert null.changed == pytest.approx(changed.sum(), abs=1)
    assert null.near_zero[0.1] == pytest.approx(10_000, abs=1)


def test_ties_at_the_threshold_count_in_expectation():
    base, delta = np.zeros(1 << 15, np.int64), np.zeros(1 << 15, np.int64)
    base[0x3F81], delta[0], delta[0x3C00] = 1000, 600, 400
    null = fit(base, delta)["normal"]
    for ratio in RATIOS:
        assert null.near_zero[ratio] == pytest.approx(ratio * null.changed)


def test_many_tensors_equal_each_alone():
    cases = [("sign", 1e-3), ("normal", 1e-2), ("lognormal", 1e-4)]
    made = [dense(kind, "grid", "normal", relative, 20_000)[:2] for kind, relative in cases]
    empty = np.zeros(1 << 15, np.int64)
    made = [*made, (empty, empty)] * 80  # more than a call of the operator takes
    bits = [np.flatnonzero(base + change) for base, change in made]
    remainders = ["grid", "uniform", "grid", "uniform"] * 80
    inputs = [[side[used] for side, used in zip(sides, bits, strict=True)] for sides in zip(*made, strict=True)]
    nulls = fit_many(bits, *inputs, remainders, ratios=RATIOS, fractions=(0.01,), limits=(0, 0x3C00))
    assert nulls.near_zero.shape == nulls.near_zero_sd.shape == (320, 3, 4)
    for t, (base, delta) in enumerate(made[:4]):
        alone = fit(base, delta, remainders[t])
        assert KINDS[nulls.chosen[t]] == alone["chosen"].kind
        assert nulls.below[t] == pytest.approx([alone["chosen"].delta[: stop + 1].sum() for stop in (0, 0x3C00)])
        for k, kind in enumerate(KINDS):
            size = alone[kind].size if kind in alone else math.nan
            assert nulls.fits[t, k, FIT_SIZE] == pytest.approx(size, nan_ok=True)
    for name in ("fits", "near_zero", "near_zero_sd", "chosen", "top_energy", "top_energy_sd", "below"):
        values = getattr(nulls, name)
        np.testing.assert_array_equal(values, np.concatenate([values[:4]] * 80), err_msg=name)


def test_invalid_tables_are_rejected():
    base, delta = np.zeros(1 << 15, np.int64), np.zeros(1 << 15, np.int64)
    base[5] = 1
    with pytest.raises(ValueError, match="different numbers of coordinates"):
        fit(base, delta)
    delta[0] = 1
    with pytest.raises(ValueError, match="'grid' or 'uniform', not 'none'"):
        fit(base, delta, remainder="none")
    single = np.array([1])
    with pytest.raises(ValueError, match="1 lists of bins, 0 base and 1 delta tables, 1 remainders"):
        fit_many([single], [], [single], ["grid"])
    with pytest.raises(ValueError, match="another number of bins"):
        fit_many([single], [base], [single], ["grid"])
    for bits in ([5, 5], [6, 5], [-1, 5], [5, 1 << 15]):
        with pytest.raises(ValueError, match="unique and ascending"):
            fit_many([np.array(bits)], [np.array([1, 1])], [np.array([1, 1])], ["grid"])
    with pytest.raises(ValueError, match="must not be negative"):
        fit_many([np.array([0, 5])], [np.array([2, -1])], [np.array([1, 0])], ["grid"])
    for counts in ([1 << 62, 1 << 62], [1 << 53, 1], [(1 << 53) - 1, 1]):
        huge = np.array(counts)
        with pytest.raises(ValueError, match=r"2\^53 or more coordinates"):
            fit_many([np.array([0, 5])], [huge], [huge], ["grid"])
    assert fit_many([np.array([0])], [np.array([(1 << 53) - 1])], [np.array([(1 << 53) - 1])], ["grid"]).chosen == [0]
    with pytest.raises(ValueError, match="ratios and fractions are between 0 and 1"):
        fit_many([single], [single], [single], ["grid"], ratios=(1.5,))
    with pytest.raises(ValueError, match="ratios and fractions are between 0 and 1"):
        fit_many([single], [single], [single], ["grid"], fractions=(math.nan,))
    with pytest.raises(ValueError, match="limits are bf16 bits"):
        fit_many([single], [single], [single], ["grid"], limits=(1 << 15,))
    base[5], base[INFINITY] = 0, 1
    with pytest.raises(ValueError, match="infinities"):
        fit(base, delta)


@st.composite
def tables(draw):
    """Any base bins, and as many coordinates in any delta bins."""
    finite = st.integers(0, INFINITY - 1)
    base = draw(st.dictionaries(finite, st.integers(1, 10_000), min_size=1, max_size=8))
    left, delta = sum(base.values()), {}
    for pattern in draw(st.lists(finite, max_size=8, unique=True)):
        delta[pattern] = draw(st.integers(0, left))
        left -= delta[pattern]
    delta[0] = delta.get(0, 0) + left
    return [tuple(np.array(column) for column in zip(*sorted(side.items()), strict=True)) for side in (base, delta)]


@settings(max_examples=60, deadline=None)
@given(tables(), st.sampled_from(["grid", "uniform"]))
@example(
    ((np.array([0x7F60]), np.array([1])), (np.array([0, 0x7F01]), np.array([0, 1]))), "grid"
)  # stops at the largest value
def test_expected_counts_are_counts(pair, remainder):
    (patterns, counts), delta = pair
    n = counts.sum()
    nulls = fit((patterns, counts), delta, remainder=remainder)
    assert nulls["chosen"].distance == min(null.distance for null in nulls.values())
    for null in nulls.values():
        assert null.delta.min() >= -1e-6 * n
        assert null.delta.sum() == pytest.approx(n, rel=1e-6)
        assert null.delta[1:].sum() == pytest.approx(null.changed, abs=1e-6 * n)
        assert -1e-9 <= null.distance <= 1 + 1e-6
        within = [null.near_zero[ratio] for ratio in RATIOS]
        assert within == sorted(within)
        assert within[-1] <= null.changed + 1e-6 * n
        assert all(0 <= x <= math.ceil(r * n) * (1 + 1e-9) for r, x in zip(RATIOS, within, strict=True))


@settings(max_examples=20, deadline=None)
@given(st.integers(-30, 30), st.sampled_from(KINDS), st.sampled_from(["grid", "uniform"]))
def test_scaling_by_a_power_of_two_only_scales_the_size(shift, kind, remainder):
    base, delta, _ = dense(kind, remainder, "normal", 1e-3, 30_000)
    # Each table is moved by whole exponents; the few bins that would become subnormal are left out on both sides.
    keep = delta.copy()
    keep[1 : 60 << 7] = 0
    keep[0] += delta.sum() - keep.sum()
    weights = base.copy()
    weights[: 60 << 7] = 0
    weights[100 << 7] += base.sum() - weights.sum()

    def moved(counts, start):
        bins = np.arange(start, 1 << 15)[counts[start:] > 0]
        return np.concatenate([np.arange(start), bins + 128 * shift]), np.concatenate([counts[:start], counts[bins]])

    plain, scaled = fit(weights, keep, remainder=remainder), fit(moved(weights, 0), moved(keep, 1), remainder=remainder)
    for name, null in plain.items():
        assert scaled[name].size == pytest.approx(math.ldexp(null.size, shift), rel=1e-6)
        assert scaled[name].changed == pytest.approx(null.changed, rel=1e-5, abs=1e-3)
        assert scaled[name].distance == pytest.approx(null.distance, abs=1e-5)


@pytest.mark.parametrize("remainder", ["grid", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_duplicating_a_tensor_doubles_the_counts_at_the_same_size(kind, remainder):
    base, delta, _ = dense(kind, remainder, "student", 1e-3, 100_000)
    once, twice = fit(base, delta, remainder=remainder), fit(2 * base, 2 * delta, remainder=remainder)
    for name in ("sign", "normal"):  # the empirical density resolves finer with more coordinates
        assert twice[name].size == pytest.approx(once[name].size, rel=1e-9)
        assert twice[name].distance == pytest.approx(once[name].distance, abs=1e-9)
        np.testing.assert_allclose(twice[name].delta, 2 * once[name].delta, rtol=1e-6, atol=1e-3)
    if "empirical" in once and "empirical" in twice:
        assert twice["empirical"].size == pytest.approx(once["empirical"].size, rel=0.01)
