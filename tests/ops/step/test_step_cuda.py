"""`step` in CUDA C++ on fibers: weights and state are bit-identical to the reference in every order of threads."""

from __future__ import annotations

import pytest

from opdkernels.backends.cuda import launch
from opdkernels.ops.step import cuda
from tests.backends.cuda.fibers import ORDERS, kernel_source, launch_on_fibers, load_kernels, needs_compiler
from tests.ops.conformance import MISALIGNED, Allocator, backend_kernel, check_case, reference
from tests.ops.step.cases import FAMILY, Inputs, call_steps, changed_cases, copy_cases, million, stochastic_cases

pytestmark = needs_compiler
KERNEL = backend_kernel("cuda")


@pytest.fixture(autouse=True)
def fibers(monkeypatch):
    """Blocks of two warps: the time grows with fibers, not with coordinates."""
    launch_on_fibers(monkeypatch, load_kernels("step"))
    monkeypatch.setattr(cuda, "THREADS", 64)


def launched(monkeypatch) -> list[str]:
    """Names of the kernels that are launched from now on."""
    names, run = [], launch.run
    monkeypatch.setattr(launch, "run", lambda name, *arguments: names.append(name) or run(name, *arguments))
    return names


@pytest.mark.parametrize("case", FAMILY.collect([1025], special=True), ids=str)
def test_matches_reference(case):
    check_case(case, KERNEL)


@pytest.mark.parametrize(
    "case",
    [*FAMILY.collect([1025], special=True, only="frozen"), *changed_cases((31, 2049)), *copy_cases((31, 2049))],
    ids=str,
)
def test_misaligned(case):
    check_case(case, KERNEL, offsets=MISALIGNED)


@pytest.mark.parametrize(("case", "kernel"), [("mixed", "step_adamw"), ("changed of some", "step_adamw_changed")])
def test_tensors_of_every_kind_take_one_launch(monkeypatch, case, kernel):
    names = launched(monkeypatch)
    check_case(*FAMILY.collect(special=True, only=case), KERNEL)
    assert names == [kernel]


@pytest.mark.parametrize("case", FAMILY.collect(special=True, only="sizes ("), ids=str)
def test_no_launch_without_coordinates(monkeypatch, case):
    names = launched(monkeypatch)
    check_case(case, KERNEL)
    assert names == []


@pytest.mark.parametrize("num_sms", [1, 40])
@pytest.mark.parametrize("case", FAMILY.collect(special=True, only="many tensors"), ids=str)
def test_more_tensors_than_a_warp_has_lanes(monkeypatch, case, num_sms):
    """Warps skip many tensors from one tile to the next."""
    launch_on_fibers(monkeypatch, load_kernels("step"), num_sms=num_sms)
    check_case(case, KERNEL)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", stochastic_cases(), ids=str)
def test_thread_order_changes_no_bit(monkeypatch, case, order):
    launch_on_fibers(monkeypatch, load_kernels("step"), order=order, num_sms=1 + order)
    check_case(case, KERNEL)


def test_a_million_coordinates_in_blocks_of_device_size(monkeypatch):
    monkeypatch.setattr(cuda, "THREADS", 256)
    check_case(million(), KERNEL)


SYNCWARP = "__syncwarp();"


@pytest.mark.parametrize("removed", range(3))
def test_missing_syncwarp_is_detected(monkeypatch, removed):
    """Without it some order of threads steps other coordinates or sets other bits. (The last one only orders memory;
    those for bits also separate what the first one does.)"""
    parts = kernel_source("step").split(SYNCWARP)
    assert len(parts) == 5
    before, after = parts[: removed + 1], parts[removed + 1 :]
    kernels = load_kernels("step", SYNCWARP.join(before) + SYNCWARP.join(after))
    changed = removed > 0
    expected, result = stepped(reference, changed), []
    for order in ORDERS:
        launch_on_fibers(monkeypatch, kernels, order=order)
        result.append(stepped(KERNEL, changed))
    assert any(output != expected for output in result)


def stepped(kernel, changed: bool = False) -> list[list[float]]:
    """Weights, and bits for changes."""
    inputs = Inputs((3000, 2048))
    state, *arguments = (inputs.with_changed() if changed else inputs).add_step().finish()
    call_steps(kernel, Allocator(), state, *arguments)
    return [tensor.tolist() for tensor in (*state["params"], *state["changed"])]


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        (
            "const opd_u32 word = __shfl_sync(OPD_ALL_LANES, lane_word, w);",
            "opd_u32 word = lane_word; if (lane_word >> lane & 1) word = __shfl_sync(OPD_ALL_LANES, lane_word, w);",
        ),
        (
            "__popc(__ballot_sync(OPD_ALL_LANES, at < tensors && tile >= end_tiles[at]))",
            "at < tensors ? __popc(__ballot_sync(OPD_ALL_LANES, tile >= end_tiles[at])) : 0",
        ),
    ],
    ids=["shuffle", "ballot"],
)
def test_divergent_lanes_are_detected(monkeypatch, text, broken):
    assert text in kernel_source("step")
    launch_on_fibers(monkeypatch, load_kernels("step", kernel_source("step").replace(text, broken)), order=2)
    with pytest.raises(
        RuntimeError,
        match=r"step_adamw did not start on cpu: block \d+, thread \d+, line \d+: .*"
        r"(different places|a lane of the mask)",
    ):
        stepped(KERNEL)
