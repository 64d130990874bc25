"""`quantile` in CUDA C++ on fibers: bit-identical to the reference in every order of threads."""

from __future__ import annotations

import contextlib

import pytest
import torch

from opdkernels.backends import gpu
from opdkernels.ops import quantile as ops
from opdkernels.ops.quantile import cuda
from tests.backends.cuda.fibers import ORDERS, kernel_source, launch_on_fibers, load_kernels, needs_compiler
from tests.ops.conformance import MILLION, MISALIGNED, SIZES, backend_kernel, check_case, make_pair
from tests.ops.quantile.cases import FAMILY, make_mask

pytestmark = needs_compiler
KERNEL = backend_kernel("cuda")


@pytest.fixture(autouse=True)
def fibers(monkeypatch):
    """Blocks of two warps: the time grows with fibers, not with values."""
    launch_on_fibers(monkeypatch, load_kernels("quantile"))
    monkeypatch.setattr(cuda, "THREADS", 64)


@pytest.mark.parametrize("case", FAMILY.collect(SIZES, special=True), ids=str)
def test_matches_reference(case):
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([3001]), ids=str)
def test_misaligned(case):
    check_case(case, KERNEL, offsets=MISALIGNED)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", FAMILY.collect([5001]), ids=str)
def test_thread_order_changes_no_count(monkeypatch, case, order):
    launch_on_fibers(monkeypatch, load_kernels("quantile"), order=order, num_sms=1 + order)
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([MILLION], only="float32"), ids=str)
def test_a_million_values_in_blocks_of_device_size(monkeypatch, case):
    monkeypatch.setattr(cuda, "THREADS", 1024)
    check_case(case, KERNEL)


@pytest.mark.parametrize("kib", [48, 99, 163])
@pytest.mark.parametrize("case", FAMILY.collect(special=True, only="large"), ids=str)
def test_shared_memory_size_changes_no_count(monkeypatch, case, kib):
    launch_on_fibers(monkeypatch, load_kernels("quantile"), shared_bytes=kib << 10)
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect(special=True, only="many zeros"), ids=str)
def test_slices_change_no_count(monkeypatch, case):
    monkeypatch.setattr(gpu, "SLICE", 2048)
    check_case(case, KERNEL)


BARRIER = "__syncthreads();"


@pytest.mark.parametrize(
    ("which", "kib"),
    [  # barriers of `count_first`, of `count`, which counts with less shared memory, and of `quantile_find`
        *((which, 227) for which in (2, 3, 6, 7, 8)),
        *((which, 99) for which in (4, 5)),
    ],
)
def test_missing_barrier_is_detected(monkeypatch, which, kib):
    parts = kernel_source("quantile").split(BARRIER)
    assert len(parts) == 10
    kernels = load_kernels("quantile", BARRIER.join(parts[: which + 1]) + BARRIER.join(parts[which + 1 :]))
    dtype = torch.float32 if which == 8 else torch.bfloat16  # the tables are cleared for a second digit
    values, ranks, mask = make_pair(3000, dtype)[0], [700, 3, 2000], make_mask(3000)
    expected = ops.reference(values, ranks, True, mask)[1]
    result = []
    for order in ORDERS:
        launch_on_fibers(monkeypatch, kernels, order=order, shared_bytes=kib << 10)
        with contextlib.suppress(RuntimeError):  # lanes of a warp that wait at another barrier
            result.append(cuda.quantile(values, ranks, True, mask)[1])
    assert any(not torch.equal(counts, expected) for counts in result) or len(result) < len(ORDERS)


def test_divergent_shuffle_is_detected(monkeypatch):
    line = "const opd_u32 total = warp_sum(zeros[inside]);"
    assert line in kernel_source("quantile")
    broken = kernel_source("quantile").replace(
        line, "opd_u32 total = zeros[inside]; if (threadIdx.x & 1) total = warp_sum(total);"
    )
    launch_on_fibers(monkeypatch, load_kernels("quantile", broken), shared_bytes=48 << 10)
    with pytest.raises(
        RuntimeError, match=r"quantile_count_2 did not start on cpu: .*(different places|a lane of the mask)"
    ):
        cuda.quantile(make_pair(3000)[0], [700], True, None)
