"""`step` in CUDA C++ on fibers: weights, moments and what weights lack as the reference leaves them, bit for bit, in every order of threads."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from opdkernels.backends.cuda import launch
from opdkernels.ops import step as ops
from opdkernels.ops.step import PRECISIONS, adamw_scalars, masked_adamw, masked_sgd, sgd_scalars
from opdkernels.ops.step import cuda as step
from tests.backends.cuda.host import ORDERS, compiled, needs_compiler, run_on, source_of
from tests.ops.step.test_step import (
    Mixed,
    State,
    Windows,
    assert_extremes_alike,
    assert_taken_and_put_alike,
    bits,
    step_alike,
)

pytestmark = needs_compiler
BF16, FP32 = torch.bfloat16, torch.float32
SIZES = (0, 31, 2049, 1, 2048, 1023, 1025)
KERNELS = {"masked_adamw_": step.masked_adamw_, "masked_sgd_": step.masked_sgd_}
assert_as_the_reference = functools.partial(step_alike, KERNELS)


@pytest.fixture(autouse=True)
def fibers(monkeypatch):
    """Blocks of two warps: a fiber costs more than a coordinate."""
    run_on(monkeypatch, compiled("step"))
    monkeypatch.setattr(step, "THREADS", 64)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtypes", list(itertools.product((FP32, BF16), repeat=2)), ids=str)
@pytest.mark.parametrize("places", [False, True])
def test_adamw(monkeypatch, precision, dtypes, places):
    def twice(state):
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
        monkeypatch, lambda: State(SIZES, dtype=dtypes[0], precision=precision, amsgrad=True, places=places), twice
    )


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.4, 0.9), (0.5, 0.5)])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_options(monkeypatch, betas, amsgrad, maximize):
    monkeypatch.setattr("tests.ops.step.test_step.BETAS", betas)

    def thrice(state):
        for _ in range(3):
            state.step(state.grads(), maximize=maximize)

    assert_as_the_reference(monkeypatch, lambda: State((3000,), amsgrad=amsgrad), thrice)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.1, False), (0.9, 0.0, True)]
)
@pytest.mark.parametrize("maximize", [False, True])
def test_sgd(monkeypatch, weight_decay, momentum, dampening, nesterov, maximize):
    def twice(state):
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

    assert_as_the_reference(monkeypatch, lambda: State(SIZES, dtype=BF16, precision="split_master"), twice)


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

    def twice(state):
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

    assert_as_the_reference(monkeypatch, make, twice)


def started(monkeypatch) -> list[str]:
    """Names of the kernels that are started from now on."""
    names, run = [], launch.run
    monkeypatch.setattr(launch, "run", lambda name, *arguments: names.append(name) or run(name, *arguments))
    return names


def test_one_launch_steps_tensors_of_every_kind(monkeypatch):
    names = started(monkeypatch)
    assert_as_the_reference(monkeypatch, Mixed, Mixed.step_all)
    assert names == ["step_adamw"]


@pytest.mark.parametrize("processors", [1, 40])
def test_more_tensors_than_a_warp_has_lanes(monkeypatch, processors):
    """Warps pass over many tensors from one tile to the next."""
    run_on(monkeypatch, compiled("step"), processors=processors)
    sizes = [3000, *[5] * 70, 5000, *[1] * 33, 2049]
    assert_as_the_reference(monkeypatch, lambda: State(sizes, density=0.4), lambda state: state.step(state.grads()))


def test_without_a_tensor_or_a_coordinate_nothing_starts(monkeypatch):
    names = started(monkeypatch)
    for sizes in ((), (0, 0)):
        assert_as_the_reference(
            monkeypatch, lambda sizes=sizes: State(sizes), lambda state: state.step(state.grads()), moves=False
        )
    assert names == []


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("places", [False, True])
def test_no_order_of_threads_shows(monkeypatch, places, order):
    run_on(monkeypatch, compiled("step"), order=order, processors=1 + order)

    def make():
        return State((5000, 1, 2048, 513), dtype=BF16, precision="stochastic", places=places)

    assert_as_the_reference(monkeypatch, make, lambda state: state.step(state.grads()))


def test_a_million_coordinates_in_blocks_as_large_as_on_a_device(monkeypatch):
    monkeypatch.setattr(step, "THREADS", 256)

    def make():
        return State((1_000_003, 70_001), dtype=BF16, precision="split_master")

    assert_as_the_reference(monkeypatch, make, lambda state: state.step(state.grads(BF16)))


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


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_second_moment_below_zero_has_no_root(monkeypatch, amsgrad):
    """No step leaves one, but a state that was loaded may hold it: it must not be taken for zero."""

    state = State((2049,), density=0.5, amsgrad=amsgrad)
    state.v[0].fill_(-1.0)
    state.most = [v.clone() for v in state.v] if amsgrad else []
    with monkeypatch.context() as patched:
        patched.setattr(torch.ops.opdkernels, "masked_adamw_", step.masked_adamw_, raising=False)
        state.step(state.grads())
    assert torch.equal(state.params[0].isnan(), state.masks[0].to_bool())


@pytest.mark.parametrize("places", [False, True])
def test_what_is_frozen_or_beyond_misaligned_views_is_not_written(monkeypatch, places):
    assert_as_the_reference(monkeypatch, lambda: Windows(places), Windows.step_poisoned)


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("places", [False, True])
def test_taken_and_put_of_misaligned_views(dtype, places):
    assert_taken_and_put_alike(step.masked_gather_, step.masked_scatter_, (*SIZES, 70_001), dtype, places)


MEETING = "__syncwarp();"


def test_a_missing_meeting_of_a_warp_is_caught(monkeypatch):
    """Without it some order of threads steps other coordinates. (The second one only orders memory.)"""
    parts = source_of("step").split(MEETING)
    assert len(parts) == 3
    kernels = compiled("step", parts[0] + parts[1] + MEETING + parts[2])
    expected, _ = stepped(ops.reference_adamw, monkeypatch)
    found = []
    for order in ORDERS:
        run_on(monkeypatch, kernels, order=order)
        found.append(stepped(step.masked_adamw_, monkeypatch)[0])
    assert any(not torch.equal(bits(weights), bits(expected)) for weights in found)


def stepped(kernel, monkeypatch) -> list[torch.Tensor]:
    state = State((3000, 2048))
    with monkeypatch.context() as patched:
        patched.setattr(torch.ops.opdkernels, "masked_adamw_", kernel, raising=False)
        state.step(state.grads())
    return state.params


@pytest.mark.parametrize(
    ("text", "spoilt"),
    [
        (
            "const opd_u32 word = __shfl_sync(OPD_ALL_LANES, mine, w);",
            "opd_u32 word = mine; if (mine >> lane & 1) word = __shfl_sync(OPD_ALL_LANES, mine, w);",
        ),
        (
            "__popc(__ballot_sync(OPD_ALL_LANES, at < tensors && tile >= ends[at]))",
            "at < tensors ? __popc(__ballot_sync(OPD_ALL_LANES, tile >= ends[at])) : 0",
        ),
    ],
    ids=["shuffle", "ballot"],
)
def test_divergent_lanes_are_refused(monkeypatch, text, spoilt):
    assert text in source_of("step")
    run_on(monkeypatch, compiled("step", source_of("step").replace(text, spoilt)), order=2)
    with pytest.raises(
        RuntimeError,
        match=r"step_adamw did not start on cpu: block \d+, thread \d+, line \d+: .*(different places|a lane of the mask)",
    ):
        stepped(step.masked_adamw_, monkeypatch)
