"""`step` in Triton's interpreter: weights, moments and what weights lack as the reference leaves them, bit for bit."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from opdkernels.backends.triton import launch
from opdkernels.ops import step as ops
from opdkernels.ops.step import PRECISIONS, adamw_scalars, masked_adamw, masked_sgd, sgd_scalars
from opdkernels.ops.step import triton as kernels
from tests.ops.step.test_step import (
    Mixed,
    State,
    Windows,
    assert_extremes_alike,
    assert_taken_and_put_alike,
    step_alike,
)

BF16, FP32 = torch.bfloat16, torch.float32
SIZES = (31, 2049, 2048)


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """The interpreter rounds a fused product and sum twice."""

    def fma(self, *factors):
        shape = np.broadcast_shapes(*(np.shape(x.data) for x in factors))
        a, b, c = (torch.from_numpy(np.array(np.broadcast_to(x.data, shape))) for x in factors)
        return interpreter.TensorHandle(ops.fma(a, b, c).numpy(), tl.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    """The interpreter takes its time a program and a tile, not an element."""
    monkeypatch.setattr(kernels, "TILE", 2048)


KERNELS = {"masked_adamw_": kernels.masked_adamw_, "masked_sgd_": kernels.masked_sgd_}
assert_as_the_reference = functools.partial(step_alike, KERNELS)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtypes", list(itertools.product((FP32, BF16), repeat=2)), ids=str)
@pytest.mark.parametrize("places", [False, True])
def test_adamw(monkeypatch, precision, dtypes, places):
    def step(state):
        for compact in (False, True):
            grads = state.grads(dtypes[1])
            if compact:
                grads = [g[m.to_bool()].float() for g, m in zip(grads, state.masks, strict=True)]
            state.step(
                grads,
                grad_scale=torch.tensor(3.0),
                clip=torch.tensor(0.7),
                seed=7 << 40 | 3,
                starts=[2**33 + 5 * i for i in range(len(SIZES))],
            )

    assert_as_the_reference(
        monkeypatch, lambda: State(SIZES, dtype=dtypes[0], precision=precision, amsgrad=True, places=places), step
    )


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.9), (0.5, 0.5)])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_options(monkeypatch, betas, amsgrad, maximize):
    monkeypatch.setattr("tests.ops.step.test_step.BETAS", betas)

    def step(state):
        for _ in range(3):
            state.step(state.grads(), maximize=maximize)

    assert_as_the_reference(monkeypatch, lambda: State((3000,), amsgrad=amsgrad), step)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.1, False), (0.9, 0.0, True)]
)
@pytest.mark.parametrize("maximize", [False, True])
def test_sgd(monkeypatch, weight_decay, momentum, dampening, nesterov, maximize):
    def step(state):
        for t in (1, 2):
            scalars = sgd_scalars([t] * len(SIZES), 0.1, momentum, dampening, weight_decay)
            masked_sgd(
                state.params,
                state.grads(BF16),
                state.held,
                state.block_counts,
                scalars,
                momentum_buffers=state.m if momentum else (),
                nesterov=nesterov,
                maximize=maximize,
                extras=state.extras,
                precision="split_master",
            )

    assert_as_the_reference(monkeypatch, lambda: State(SIZES, dtype=BF16, precision="split_master"), step)


@pytest.mark.parametrize("family", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("places", [False, True])
def test_cohorts_and_starts(monkeypatch, family, precision, dtype, places):
    def make():
        state = State(SIZES, dtype=dtype, precision=precision, places=places)
        cohorts = [torch.randint(0, 3, (m.num_active,), generator=state.generator).to(torch.uint8) for m in state.masks]
        inits = [torch.randn(m.num_active, generator=state.generator).to(dtype) for m in state.masks]
        state.options = {
            "cohorts": cohorts,
            "inits": inits,
            "rows": [3 * i for i in range(len(SIZES))],
            "ordinals": [5 * i for i in range(len(SIZES))],
        }
        return state

    def step(state):
        for t in (1, 2):
            steps = [t + 2 * c for _ in SIZES for c in range(3)]
            common = (state.params, state.grads(dtype), state.held, state.block_counts)
            options = {**state.options, "extras": state.extras, "precision": precision, "seed": -9}
            if family == "adamw":
                masked_adamw(*common, state.m, state.v, adamw_scalars(steps, 1e-3, (0.9, 0.999), 1e-8, 0.1), **options)
            else:
                masked_sgd(
                    *common, sgd_scalars(steps, 1e-2, 0.9, 0.1, 0.1), momentum_buffers=state.m, nesterov=True, **options
                )

    assert_as_the_reference(monkeypatch, make, step)


def test_a_launch_for_each_kind_of_tensors(monkeypatch):
    started, run = [], launch.run
    monkeypatch.setattr(
        launch, "run", lambda *arguments, **options: started.append(options) or run(*arguments, **options)
    )
    monkeypatch.setattr(launch, "PROGRAMS_PER_SM", 2)
    assert_as_the_reference(monkeypatch, Mixed, Mixed.step_all)
    assert len(started) == 4  # bf16 with bits; fp32 with bits; int64 places and starts; int32 places and cohorts


@pytest.mark.parametrize("tile", [512, 1024])
def test_many_tiles_a_block_and_many_programs(monkeypatch, tile):
    monkeypatch.setattr(kernels, "TILE", tile)
    monkeypatch.setattr(launch, "PROGRAMS_PER_SM", 3)
    for places in (False, True):
        assert_as_the_reference(
            monkeypatch,
            lambda places=places: State((5000, 1, 2048, 513), places=places),
            lambda state: state.step(state.grads()),
        )


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("places", [False, True])
def test_all_and_nothing(monkeypatch, density, places):
    assert_as_the_reference(
        monkeypatch,
        lambda: State(SIZES, density=density, places=places),
        lambda state: state.step(state.grads()),
        moves=density > 0,
    )


@pytest.mark.parametrize("found", [0.0, 1.0, float("inf"), float("nan")])
def test_found_inf_leaves_everything_as_it_was(monkeypatch, found):
    assert_as_the_reference(
        monkeypatch,
        lambda: State(SIZES),
        lambda state: state.step(state.grads(), found_inf=torch.tensor(found)),
        moves=found == 0,
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_extremes_round_as_the_reference(monkeypatch, precision, dtype):
    assert_extremes_alike(KERNELS, monkeypatch, precision, dtype)


@pytest.mark.parametrize("places", [False, True])
def test_what_is_frozen_or_beyond_misaligned_views_is_not_written(monkeypatch, places):
    assert_as_the_reference(monkeypatch, lambda: Windows(places), Windows.step_poisoned)


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("places", [False, True])
@pytest.mark.parametrize("tile", [512, 2048])
def test_taken_and_put(monkeypatch, dtype, places, tile):
    """Between sentinels and at any alignment; two times two bits of a bf16 are lost in rounding, and ties go to even."""
    monkeypatch.setattr(kernels, "TILE", tile)
    assert_taken_and_put_alike(kernels.masked_gather_, kernels.masked_scatter_, (0, 1, 31, 2049, 5000), dtype, places)


def test_places_beyond_two_billion(monkeypatch):
    """Of a tensor whose pages are never touched but for a few."""
    n = 2**31 + 4099
    places = torch.tensor([5, 2**31 - 1, 2**31, 2**31 + 1, n - 1])
    expected = torch.tensor([1.0, 2, 3, 4, 5])
    m, v, gradients = torch.zeros(5), torch.zeros(5), torch.tensor([1.0, -2, 3, -4, 5])
    param = torch.empty(n, dtype=BF16)
    param[places] = expected.to(BF16)
    scalars = adamw_scalars([1], 0.1, (0.9, 0.99), 1e-8, 0.1)
    none = torch.zeros(0, dtype=torch.int64)
    common = ([], [], [], scalars, [0], [0], [0], None, None, None, False, 0, 0)
    kernels.masked_adamw_([param], [gradients], [places], [none], [m], [v], [], *common)
    taken = torch.empty(5)
    kernels.masked_gather_(param, places, none, taken, False)
    small = expected.to(BF16)
    ops.reference_adamw(
        [small], [gradients], [torch.arange(5)], [none], [torch.zeros(5)], [torch.zeros(5)], [], *common
    )
    assert torch.equal(param[places], small)
    assert torch.equal(taken, small.float())


def test_a_million_coordinates(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 1 << 17)

    def make():
        return State((1_000_003, 70_001), dtype=BF16, precision="split_master")

    assert_as_the_reference(monkeypatch, make, lambda state: state.step(state.grads(BF16)))
