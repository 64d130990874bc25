"""`overlap` in CUDA C++ on fibers: bit-identical to the reference in every order of threads."""

from __future__ import annotations

import pytest

from opdkernels.backends import gpu
from opdkernels.ops.overlap import cuda
from tests.backends.cuda.fibers import ORDERS, kernel_source, launch_on_fibers, load_kernels, needs_compiler
from tests.ops.conformance import MILLION, MISALIGNED, Allocator, backend_kernel, check_case, reference
from tests.ops.overlap.cases import FAMILY, call_overlap, make_runs

pytestmark = needs_compiler
KERNEL = backend_kernel("cuda")


@pytest.fixture(autouse=True)
def fibers(monkeypatch):
    """Blocks of two warps: the time grows with fibers, not with coordinates."""
    launch_on_fibers(monkeypatch, load_kernels("overlap"))
    monkeypatch.setattr(cuda, "THREADS", 64)


@pytest.mark.parametrize("case", FAMILY.collect([2049], special=True), ids=str)
def test_matches_reference(case):
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([2501]), ids=str)
def test_misaligned(case):
    check_case(case, KERNEL, offsets=MISALIGNED)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", FAMILY.collect([5001]), ids=str)
def test_thread_order_changes_no_count(monkeypatch, case, order):
    launch_on_fibers(monkeypatch, load_kernels("overlap"), order=order, num_sms=1 + order)
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([MILLION], only="bfloat16, torch.bfloat16"), ids=str)
def test_a_million_coordinates_in_blocks_of_device_size(monkeypatch, case):
    monkeypatch.setattr(cuda, "THREADS", 1024)
    check_case(case, KERNEL)


@pytest.mark.parametrize("kib", [48, 99, 163])
@pytest.mark.parametrize("case", FAMILY.collect(special=True, only="large"), ids=str)
def test_shared_memory_size_changes_no_count(monkeypatch, case, kib):
    launch_on_fibers(monkeypatch, load_kernels("overlap"), shared_bytes=kib << 10)
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([5001]), ids=str)
def test_slices_change_no_count(monkeypatch, case):
    monkeypatch.setattr(gpu, "SLICE", 2048)
    check_case(case, KERNEL)


BARRIER = "__syncthreads();"


def counts(kernel) -> list:
    return [output.tolist() for output in call_overlap(kernel, Allocator(), *make_runs(3000))]


@pytest.mark.parametrize("which", [2, 3])
def test_missing_barrier_is_detected(monkeypatch, which):
    parts = kernel_source("overlap").split(BARRIER)
    assert len(parts) == 5
    kernels = load_kernels("overlap", BARRIER.join(parts[: which + 1]) + BARRIER.join(parts[which + 1 :]))
    expected, result = counts(reference), []
    for order in ORDERS:
        launch_on_fibers(monkeypatch, kernels, order=order)
        result.append(counts(KERNEL))
    assert any(output != expected for output in result)


def test_divergent_shuffle_is_detected(monkeypatch):
    line = "nonfinite = warp_sum(nonfinite);"
    assert line in kernel_source("overlap")
    launch_on_fibers(
        monkeypatch, load_kernels("overlap", kernel_source("overlap").replace(line, f"if (threadIdx.x & 1) {line}"))
    )
    with pytest.raises(
        RuntimeError, match=r"overlap_count did not start on cpu: .*(different places|a lane of the mask|barrier)"
    ):
        counts(KERNEL)
