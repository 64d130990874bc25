"""`step`: torch's AdamW on the active coordinates bit for bit, and nothing at all on the others, by every kernel and
the reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opdkernels.masks import Mask
from opdkernels.ops import step as ops
from opdkernels.ops.step import (
    PRECISIONS,
    adamw_scalars,
    masked_adamw,
    masked_gather,
    masked_scatter,
    masked_sgd,
    sgd_scalars,
)
from opdkernels.ops.step.validation import DTYPES, RESIDUAL_DTYPES
from tests.conftest import ISAS
from tests.ops.conformance import MISALIGNED, check_case, dispatched, expected_outputs, inputs_of
from tests.ops.step.cases import FAMILY, bf16_patterns, call_steps, changed_cases, million, special_cases, unmoved_cases

SIZES = (1, 31, 1023, 2048, 2049, 70_001)
BETAS, EPS = (0.9, 0.999), 1e-8
MILLION = million()


class RightSqrt(TorchDispatchMode):
    """torch's square root on the CPU may be off by one unit in the last place; this one is rounded right."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.sqrt.default and args[0].dtype == torch.float32:
            return args[0].double().sqrt().float()
        return func(*args, **(kwargs or {}))


class State:
    """Parameters, masks and compact state, as an optimizer would hold them."""

    def __init__(
        self, sizes, density=0.2, dtype=torch.float32, precision="nearest", amsgrad=False, places=False, seed=0
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.params = [(0.02 * torch.randn(n, generator=self.generator)).to(dtype) for n in sizes]
        self.masks = [Mask.from_bool(torch.rand(n, generator=self.generator) < density) for n in sizes]
        self.precision, self.steps = precision, 0
        self.payloads = [(m.indices if places else m.bitmap) for m in self.masks]
        self.block_counts = [torch.zeros(0, dtype=torch.int64) if places else m.block_counts for m in self.masks]
        self.m, self.v = ([torch.zeros(m.num_active) for m in self.masks] for _ in range(2))
        self.v_max = [torch.zeros(m.num_active) for m in self.masks] if amsgrad else []
        kind = RESIDUAL_DTYPES.get(precision) if dtype == torch.bfloat16 else None
        self.residuals = [torch.zeros(m.num_active, dtype=kind) for m in self.masks] if kind else []

    def grads(self, dtype=torch.float32):
        return [(1e-3 * torch.randn(len(p), generator=self.generator)).to(dtype) for p in self.params]

    def step(self, grads, lr=1e-3, wd=0.01, **options):
        self.steps += 1
        scalars = adamw_scalars([self.steps] * len(self.params), lr, BETAS, EPS, wd)
        masked_adamw(
            self.params,
            grads,
            self.payloads,
            self.block_counts,
            self.m,
            self.v,
            scalars,
            max_exp_avg_sqs=self.v_max,
            residuals=self.residuals,
            precision=self.precision,
            **options,
        )

    def copies(self):
        return [t.clone() for t in (*self.params, *self.m, *self.v, *self.v_max, *self.residuals)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.itemsize])


def same(a, b) -> bool:
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.9)])
@pytest.mark.parametrize("places", [False, True])
def test_active_coordinates_are_torchs_adamw_bit_for_bit(isa, amsgrad, maximize, betas, places, monkeypatch):
    monkeypatch.setattr("tests.ops.step.test_step.BETAS", betas)
    state = State(SIZES, amsgrad=amsgrad, places=places)
    dense = [torch.nn.Parameter(p.clone()) for p in state.params]
    before = [p.clone() for p in state.params]
    optimizer = torch.optim.AdamW(
        dense, lr=1e-3, betas=betas, eps=EPS, weight_decay=0.01, amsgrad=amsgrad, maximize=maximize, foreach=False
    )
    for _ in range(5):
        grads = state.grads()
        state.step(grads, maximize=maximize)
        for p, g in zip(dense, grads, strict=True):
            p.grad = g.clone()
        with RightSqrt():
            optimizer.step()
    for p, d, old, mask in zip(state.params, dense, before, state.masks, strict=True):
        active = mask.to_bool()
        assert torch.equal(bits(p)[active], bits(d.detach())[active])
        assert torch.equal(bits(p)[~active], bits(old)[~active])


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.1, False), (0.9, 0.0, True)]
)
@pytest.mark.parametrize("maximize", [False, True])
def test_active_coordinates_are_torchs_sgd_bit_for_bit(isa, weight_decay, momentum, dampening, nesterov, maximize):
    state = State(SIZES)
    dense = [torch.nn.Parameter(p.clone()) for p in state.params]
    before = [p.clone() for p in state.params]
    optimizer = torch.optim.SGD(
        dense, 0.1, momentum, dampening, weight_decay, nesterov, maximize=maximize, foreach=False
    )
    for step in range(1, 6):
        grads = state.grads()
        scalars = sgd_scalars([step] * len(SIZES), 0.1, momentum, dampening, weight_decay)
        masked_sgd(
            state.params,
            grads,
            state.payloads,
            state.block_counts,
            scalars,
            momentum_buffers=state.m if momentum else (),
            nesterov=nesterov,
            maximize=maximize,
        )
        for p, g in zip(dense, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for p, d, old, mask in zip(state.params, dense, before, state.masks, strict=True):
        active = mask.to_bool()
        assert torch.equal(bits(p)[active], bits(d.detach())[active])
        assert torch.equal(bits(p)[~active], bits(old)[~active])


def with_step_groups(state) -> dict:
    """Three step_groups in every tensor, and where each weight began."""
    state.step_groups = [
        torch.randint(0, 3, (m.num_active,), generator=state.generator).to(torch.uint8) for m in state.masks
    ]
    state.init_values = [
        torch.randn(m.num_active, generator=state.generator).to(p.dtype)
        for m, p in zip(state.masks, state.params, strict=True)
    ]
    return {
        "step_groups": state.step_groups,
        "init_values": state.init_values,
        "scalar_rows": [3 * i for i in range(len(SIZES))],
        "param_ids": [5 * i for i in range(len(SIZES))],
    }


def test_step_groups_match_separate_optimizers():
    """A coordinate of cohort c moves as if its tensor had its step count alone."""
    state = State((5000,), density=0.5)
    options = with_step_groups(state)
    alone = [State((5000,), density=0.5) for _ in range(3)]
    for step in range(1, 4):
        (grad,) = state.grads()
        ages = [step, step + 10, step + 100]
        masked_adamw(
            state.params,
            [grad],
            state.payloads,
            state.block_counts,
            state.m,
            state.v,
            adamw_scalars(ages, 1e-3, BETAS, EPS, 0.1),
            step_groups=options["step_groups"],
        )
        for one, age in zip(alone, ages, strict=True):
            masked_adamw(
                one.params,
                [grad],
                one.payloads,
                one.block_counts,
                one.m,
                one.v,
                adamw_scalars([age], 1e-3, BETAS, EPS, 0.1),
            )
    places = state.masks[0].indices.long()
    for c, one in enumerate(alone):
        mine = options["step_groups"][0] == c
        assert torch.equal(bits(state.params[0])[places[mine]], bits(one.params[0])[places[mine]])


def test_weight_decay_pulls_to_initial_values():
    """With no gradient only decay moves a weight, each step by its share of the distance: against fp64."""
    state = State((5000,))
    w0 = [torch.randn(state.masks[0].num_active)]
    started = state.params[0][state.masks[0].to_bool()].double()
    for step in range(1, 11):
        masked_adamw(
            state.params,
            [torch.zeros(5000)],
            state.payloads,
            state.block_counts,
            state.m,
            state.v,
            adamw_scalars([step], 0.1, BETAS, EPS, 0.5),
            init_values=w0,
        )
    wanted = w0[0].double() + (started - w0[0].double()) * 0.95**10
    torch.testing.assert_close(state.params[0][state.masks[0].to_bool()].double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("hostile", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_coordinates_are_neither_read_nor_written(isa, hostile, dtype):
    state = State(SIZES, dtype=dtype, precision="split_master" if dtype == torch.bfloat16 else "nearest")
    clean = State(SIZES, dtype=dtype, precision=state.precision)
    grads = state.grads(dtype)
    poisoned = [torch.where(m.to_bool(), g, hostile) for g, m in zip(grads, state.masks, strict=True)]
    for p, m in zip(state.params, state.masks, strict=True):
        p[~m.to_bool()] = hostile
    before = [bits(p).clone() for p in state.params]
    state.step(poisoned)
    clean.step(grads)
    assert same((*state.m, *state.v), (*clean.m, *clean.v))
    for p, c, old, m in zip(state.params, clean.params, before, state.masks, strict=True):
        active = m.to_bool()
        assert torch.equal(bits(p)[active], bits(c)[active])
        assert torch.equal(bits(p)[~active], old[~active])


def test_nan_gradient_affects_only_its_coordinate(isa):
    state, clean = State((5000,)), State((5000,))
    (grad,) = state.grads()
    at = int(state.masks[0].indices[7])
    broken = grad.clone()
    broken[at] = float("nan")
    state.step([broken])
    clean.step([grad])
    differs = torch.nonzero(bits(state.params[0]) != bits(clean.params[0])).view(-1)
    assert differs.tolist() == [at]
    assert state.params[0][at].isnan()


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_masks(isa, density):
    state = State(SIZES, density=density)
    before = [p.clone() for p in state.params]
    state.step(state.grads())
    assert same(state.params, before) == (density == 0)


def test_split_master_matches_fp32_master(isa):
    """bf16 weight and remainder are the fp32 master that torch's AdamW would keep, at a rate that plain rounding
    loses."""
    state = State(SIZES, dtype=torch.bfloat16, precision="split_master")
    masters = [torch.nn.Parameter(p.float()) for p in state.params]
    optimizer = torch.optim.AdamW(masters, lr=1e-6, betas=BETAS, eps=EPS, weight_decay=0.01, foreach=False)
    for _ in range(20):
        grads = state.grads(torch.bfloat16)
        state.step(grads, lr=1e-6)
        for p, g in zip(masters, grads, strict=True):
            p.grad = g.float()
        with RightSqrt():
            optimizer.step()
    for p, master, residual, mask in zip(state.params, masters, state.residuals, state.masks, strict=True):
        active, low = mask.to_bool(), residual.int() & 0xFFFF
        high = ((bits(p)[active].int() & 0xFFFF) - (low >> 15)) & 0xFFFF
        assert torch.equal((high << 16 | low).view(torch.float32), master.detach()[active])
        nearest = master.detach()[active].bfloat16()
        tie = low == 0x8000
        assert torch.equal(p[active][~tie], nearest[~tie])


def test_split_master_round_trips_every_bit_pattern():
    """Of weight and remainder in the reference: every upper half with some lower ones, NaN aside."""
    lows = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    masters = (torch.arange(1 << 16).unsqueeze(1) << 16 | lows).view(-1)
    masters = torch.where(masters >= 1 << 31, masters - (1 << 32), masters).int().view(torch.float32)
    masters = masters[~masters.isnan()]
    residual = torch.empty(len(masters), dtype=torch.int16)
    weight = ops.round_to_storage(masters, torch.bfloat16, residual, PRECISIONS.index("split_master"), ())
    back = ops.to_fp32(weight, residual, PRECISIONS.index("split_master"))
    assert torch.equal(bits(back), bits(masters))


@pytest.mark.parametrize("precision", ["nearest", "split_master", "kahan", "stochastic"])
def test_small_updates_are_kept_by_precision(precision):
    """At a rate of 1e-6 rounding loses nearly the whole run, the others do not."""
    state = State((20_000,), density=1.0, dtype=torch.bfloat16, precision=precision)
    full = State((20_000,), density=1.0, dtype=torch.float32)
    full.params = [p.float() for p in state.params]
    start = full.params[0].clone()
    drift = 1e-3 * torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    for i in range(100):
        grads = [drift + g for g in full.grads()]
        state.step(grads, lr=1e-6, seed=i)
        full.step(grads, lr=1e-6)
    wanted = full.params[0] - start
    got = (
        ops.to_fp32(state.params[0], state.residuals[0] if state.residuals else None, PRECISIONS.index(precision))
        - start
    )
    error = float((got - wanted).norm() / wanted.norm())
    low, high = {"nearest": (0.8, 1.2), "split_master": (0, 1e-6), "kahan": (0, 0.1), "stochastic": (0.3, 1.5)}[
        precision
    ]
    assert low <= error <= high
    if precision == "stochastic":
        assert float((got * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.05)  # on average all of it


def test_stochastic_rounding_does_not_depend_on_sharding(isa):
    full = State((70_001,), dtype=torch.bfloat16, precision="stochastic")
    (grad,) = full.grads(torch.bfloat16)
    for cut in (1, 1000, 4096):
        parts = [State((70_001,), dtype=torch.bfloat16, precision="stochastic") for _ in range(2)]
        for part, (a, b) in zip(parts, ((0, cut), (cut, 70_001)), strict=True):
            mask = part.masks[0].flat(a, b)
            mask = Mask.from_bool(mask.to_bool())
            part.params, part.payloads, part.block_counts = (
                [part.params[0][a:b].clone()],
                [mask.bitmap],
                [mask.block_counts],
            )
            part.m, part.v = [torch.zeros(mask.num_active)], [torch.zeros(mask.num_active)]
            part.step([grad[a:b].clone()], seed=5, shard_offsets=[a])
        fresh = State((70_001,), dtype=torch.bfloat16, precision="stochastic")
        fresh.step([grad], seed=5)
        assert torch.equal(bits(torch.cat([part.params[0] for part in parts])), bits(fresh.params[0]))


def test_philox_matches_published_vectors():
    """Known answers of Random123: counter and key all zeros, and all ones."""
    assert int(ops.philox(0, 0, 0, torch.tensor([0]))[0]) == 0x6627E8D5
    ones = (1 << 32) - 1
    assert int(ops.philox((1 << 64) - 1, ones, ones, torch.tensor([-1]))[0]) == 0x408F276D


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_skips_the_step(isa, found):
    state = State(SIZES)
    before = state.copies()
    state.step(state.grads(), found_inf=torch.tensor(found))
    assert same(state.copies(), before) == (found == 1)


@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
def test_thread_count_changes_no_bit():
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        state = State((300_000, 5, 70_001), dtype=torch.bfloat16, precision="split_master")
        for _ in range(2):
            state.step(state.grads(torch.bfloat16))
        results.append(state.copies())
    torch.set_num_threads(threads)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("places", [False, True])
def test_gather_and_scatter(isa, dtype, places):
    state = State(SIZES, dtype=dtype, places=places)
    for p, mask, held, offsets in zip(state.params, state.masks, state.payloads, state.block_counts, strict=True):
        active, before = mask.to_bool(), p.clone()
        taken = masked_gather(p, held, offsets, torch.full((mask.num_active,), float("nan")))
        assert torch.equal(taken, p[active].float())
        assert torch.equal(masked_gather(p, held, offsets, taken.clone(), add=True), 2 * taken)
        values = torch.randn(mask.num_active)
        masked_scatter(p, held, offsets, values)
        assert torch.equal(p[active], values.to(dtype))
        assert torch.equal(bits(p)[~active], bits(before)[~active])
        with pytest.raises(ValueError, match="compact values of param 0"):
            masked_gather(p, held, offsets, torch.zeros(mask.num_active + 1))


def test_fused_multiply_add_is_rounded_once():
    """Against exact rational arithmetic."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3000, generator=generator) for _ in range(2))
    c = -(a * b) * (1 + torch.randint(-3, 4, (3000,), generator=generator) * 2.0**-24)
    result = ops.fma(a, b, c)
    for x, y, z, r in zip(a.tolist(), b.tolist(), c.tolist(), result.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        down, up = (float(np.nextafter(np.float32(r), np.float32(side * np.inf))) for side in (-1, 1))
        assert abs(exact - Fraction(r)) <= min(abs(exact - Fraction(down)), abs(exact - Fraction(up)))


def test_bad_input_is_refused_by_name():
    state = State((100,))
    (grad,) = state.grads()
    fits = {
        "params": state.params,
        "grads": [grad],
        "masks": state.payloads,
        "block_counts": state.block_counts,
        "exp_avgs": state.m,
        "exp_avg_sqs": state.v,
    }
    scalars = adamw_scalars([1], 1e-3, BETAS, EPS, 0.0)
    for changes, options, error, message in (
        ({"params": [state.params[0].double()]}, {}, TypeError, r"params\[0\] is torch.float64"),
        ({"grads": [grad.half()]}, {}, TypeError, r"grads\[0\] is torch.float16"),
        ({"grads": [grad[:50].clone()]}, {}, ValueError, "of one shape"),
        ({"grads": [grad.repeat(2)[::2]]}, {}, ValueError, "contiguous"),
        ({"exp_avgs": [state.m[0][1:].clone()]}, {}, ValueError, "exp_avgs of param 0"),
        ({"exp_avg_sqs": [state.v[0].double()]}, {}, ValueError, "exp_avg_sqs of param 0"),
        ({"masks": [state.payloads[0][1:].clone()]}, {}, ValueError, "param 0: its mask must be"),
        (
            {"block_counts": [state.block_counts[0] + 1]},
            {},
            ValueError,
            "param 0: its block_counts are not the prefix popcounts of its mask",
        ),
        (
            {"masks": [state.payloads[0] | 0xF0]},
            {},
            ValueError,
            "param 0: its mask has bits beyond the last of the 100 coordinates",
        ),
        (
            {"masks": [torch.tensor([5, 1 << 28])], "block_counts": [torch.zeros(0, dtype=torch.int64)]},
            {},
            ValueError,
            "param 0: the indices of its mask must ascend within the 100 coordinates",
        ),
        ({}, {"scalar_rows": [1]}, ValueError, "a row for each"),
        ({}, {"init_values": [state.m[0].bfloat16()]}, ValueError, "init_values of param 0"),
        ({}, {"step_groups": [torch.ones_like(state.m[0], dtype=torch.uint8)]}, ValueError, "step group 1 and 1 rows"),
        ({}, {"changed": [state.payloads[0][1:].clone()]}, ValueError, "changed of param 0"),
        ({}, {"changed": [state.payloads[0].bool()]}, ValueError, "changed of param 0"),
        ({}, {"changed": [state.payloads[0].repeat(2)[::2]]}, ValueError, "changed of param 0"),
        ({}, {"changed": [state.payloads[0]]}, ValueError, "share memory"),
        ({}, {"changed": 2 * [state.payloads[0][:0]]}, ValueError, "as many changed"),
        ({"grads": []}, {}, ValueError, "as many grads"),
        ({}, {"precision": "double"}, ValueError, "precision must be one of"),
        (
            {"params": [state.params[0].bfloat16()]},
            {"precision": "split_master"},
            ValueError,
            "precision split_master needs residuals",
        ),
    ):
        with pytest.raises(error, match=message):
            masked_adamw(*({**fits, **changes}.values()), scalars, **options)


@pytest.mark.parametrize(("dtype", "precision"), list(itertools.product(DTYPES, PRECISIONS)), ids=str)
def test_opcheck(dtype, precision):
    state = State((40, 9), dtype=dtype, precision=precision)
    scalars = adamw_scalars([1, 1], 1e-3, BETAS, EPS, 0.0)
    torch.library.opcheck(
        torch.ops.opdkernels.masked_sgd_,
        (
            state.params,
            state.grads(dtype),
            state.payloads,
            state.block_counts,
            state.m,
            state.residuals,
            [],
            [],
            [torch.zeros_like(mask) for mask in state.payloads],
            scalars,
            [0, 1],
            [0, 0],
            [0, 1],
            None,
            None,
            None,
            False,
            True,
            PRECISIONS.index(precision),
            0,
        ),
    )
    torch.library.opcheck(
        torch.ops.opdkernels.masked_adamw_,
        (
            state.params,
            state.grads(dtype),
            state.payloads,
            state.block_counts,
            state.m,
            state.v,
            state.v_max,
            state.residuals,
            [],
            [],
            [torch.zeros_like(mask) for mask in state.payloads],
            scalars,
            [0, 1],
            [0, 0],
            [0, 1],
            None,
            None,
            None,
            False,
            PRECISIONS.index(precision),
            0,
        ),
    )


@pytest.mark.parametrize("case", [*special_cases(SIZES), *FAMILY.collect((0, 1025))], ids=str)
def test_matches_reference(isa, threads, case):
    check_case(case, dispatched)


@pytest.mark.parametrize("case", [*FAMILY.collect([1025]), *changed_cases()], ids=str)
def test_misaligned(isa, case):
    check_case(case, dispatched, offsets=MISALIGNED)


def test_cases_change_weights_unless_they_must_not():
    unmoved = {case.name for case in unmoved_cases(SIZES)}
    for case in special_cases():
        if case.call is call_steps:
            params = inputs_of(case)[0]["params"]
            moved = any(not torch.equal(bits(a), bits(b)) for a, b in zip(expected_outputs(case), params, strict=False))
            assert moved == (case.name not in unmoved), case.name


@pytest.mark.parametrize("case", changed_cases(), ids=str)
def test_cases_change_some_of_the_bf16_values(case):
    """Bits are added, and some active coordinates keep their bf16 value, unless none is active."""
    state, outputs = inputs_of(case)[0], expected_outputs(case)
    changed = outputs[len(outputs) - len(state["changed"]) :]
    assert any(bool((bits & ~had).any()) for bits, had in zip(changed, state["changed"], strict=True)) == (
        case.name != "changed density 0"
    )
    unchanged = [
        (bf16_patterns(before) == bf16_patterns(after)) & active_flags(mask, before.numel())
        for before, after, mask in zip(state["params"], outputs, state["masks"], strict=False)
    ]
    assert any(flags.any() for flags in unchanged) == (case.name != "changed density 0")


def active_flags(mask: torch.Tensor, n: int) -> np.ndarray:
    flags = np.zeros(n, bool)
    flags[ops.active_indices(mask, n).numpy()] = True
    return flags


@pytest.mark.parametrize("places", [False, True])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "nearest"), *((torch.bfloat16, p) for p in PRECISIONS)]
)
def test_changed_contains_what_differs_from_the_first_state(isa, dtype, precision, places):
    """Exactly what differs after one step; after several also what returned to its first value."""
    state = State(SIZES, dtype=dtype, precision=precision, places=places)
    first = [bf16_patterns(p) for p in state.params]
    sizes = [m.num_active if places else len(p) for m, p in zip(state.masks, state.params, strict=True)]
    changed = [torch.zeros((n + 7) // 8, dtype=torch.uint8) for n in sizes]
    returned = 0
    for i in range(6):
        grads = state.grads(dtype)
        state.step([g if i % 2 else -g for g in grads], lr=5e-5, wd=0.0, seed=i, changed=changed)
        for p, mask, bits_set, old, n in zip(state.params, state.masks, changed, first, sizes, strict=True):
            differs = bf16_patterns(p) != old
            differs = differs[mask.indices.numpy()] if places else differs
            recorded = np.unpackbits(bits_set.numpy(), bitorder="little")
            assert not recorded[n:].any()
            assert not (differs & ~(recorded[:n] == 1)).any()
            assert i or np.array_equal(differs, recorded[:n] == 1)
            returned += int((~differs & (recorded[:n] == 1)).sum())
    assert returned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_changed_compares_bits(isa, dtype):
    """-0 differs from +0; an equal NaN does not differ, nor does an fp32 change that bf16 does not show."""
    weights = torch.tensor([0.0, float("nan"), 1.0, 1.0, 0.0])
    grads = torch.tensor([1e-44, 1.0, 1e-3, 1.0, 0.0])
    mask, changed = Mask.from_bool(torch.ones(5, dtype=torch.bool)), torch.zeros(1, dtype=torch.uint8)
    param = weights.to(dtype)
    masked_sgd(
        [param],
        [grads],
        [mask.bitmap],
        [mask.block_counts],
        sgd_scalars([1], 0.1, 0.0, 0.0, 0.0),
        changed=[changed],
    )
    assert param.bfloat16()[0] == 0
    assert bool(param[0].signbit())
    assert int(changed) == 0b01001
    if dtype == torch.float32:
        assert param[2] != 1


@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
def test_changed_is_the_same_for_any_number_of_threads():
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        state = State((300_001, 5, 70_001), dtype=torch.bfloat16)
        changed = [torch.zeros_like(mask) for mask in state.payloads]
        state.step(state.grads(), lr=2e-5, changed=changed)
        results.append(changed)
    torch.set_num_threads(threads)
    assert bool(results[0][0].any())
    assert all(map(torch.equal, *results))


def test_a_million_coordinates(isa, threads):
    check_case(MILLION, dispatched)


def test_mask_changed_in_place_is_validated_again():
    """A mask is validated at its first use; after an in-place change it must not be trusted."""
    state = State((100,), places=True)
    state.step(state.grads())
    state.payloads[0][-1] = 100
    with pytest.raises(ValueError, match="must ascend within the 100 coordinates"):
        state.step(state.grads())
    groups = [torch.zeros_like(state.m[0], dtype=torch.uint8)]
    state.payloads[0][-1] = 99
    state.step(state.grads(), step_groups=groups)
    groups[0][0] = 1
    with pytest.raises(ValueError, match="step group 1 and 1 rows"):
        state.step(state.grads(), step_groups=groups)
