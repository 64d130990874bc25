"""`quantile` in CUDA C++ on fibers: bit-identical to the reference in every order of threads."""

from __future__ import annotations

import pytest
import torch

from opdkernels.backends import gpu
from opdkernels.ops import quantile as ops
from opdkernels.ops.quantile import cuda
from tests.backends.cuda.host import ORDERS, compiled, needs_compiler, run_on, source_of
from tests.ops.conformance import MILLION, MISALIGNED, SIZES, backend_kernel, check_case, make_pair
from tests.ops.quantile.cases import FAMILY

pytestmark = needs_compiler
KERNEL = backend_kernel("cuda")


@pytest.fixture(autouse=True)
def fibers(monkeypatch):
    """Blocks of two warps: the time grows with fibers, not with values."""
    run_on(monkeypatch, compiled("quantile"))
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
    run_on(monkeypatch, compiled("quantile"), order=order, processors=1 + order)
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([MILLION], only="float32"), ids=str)
def test_a_million_values_in_blocks_of_device_size(monkeypatch, case):
    monkeypatch.setattr(cuda, "THREADS", 1024)
    check_case(case, KERNEL)


@pytest.mark.parametrize("kib", [48, 99, 163])
@pytest.mark.parametrize("case", FAMILY.collect(special=True, only="large"), ids=str)
def test_shared_memory_size_changes_no_count(monkeypatch, case, kib):
    run_on(monkeypatch, compiled("quantile"), shared_bytes=kib << 10)
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect(special=True, only="many zeros"), ids=str)
def test_slices_change_no_count(monkeypatch, case):
    monkeypatch.setattr(gpu, "SLICE", 2048)
    check_case(case, KERNEL)


BARRIER = "__syncthreads();"


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_barrier_is_caught(monkeypatch, which):
    parts = source_of("quantile").split(BARRIER)
    assert len(parts) == 3
    kernels = compiled("quantile", BARRIER.join(parts[: which + 1]) + BARRIER.join(parts[which + 1 :]))
    values = make_pair(3000)[0]
    expected = ops.reference(values, [700], True, None)[1]
    found = []
    for order in ORDERS:
        run_on(monkeypatch, kernels, order=order)
        found.append(cuda.quantile(values, [700], True, None)[1])
    assert any(not torch.equal(counts, expected) for counts in found)


def test_a_divergent_shuffle_is_refused(monkeypatch):
    line = "const opd_u32 total = warp_sum(zeros[inside]);"
    assert line in source_of("quantile")
    spoilt = source_of("quantile").replace(
        line, "opd_u32 total = zeros[inside]; if (threadIdx.x & 1) total = warp_sum(total);"
    )
    run_on(monkeypatch, compiled("quantile", spoilt))
    with pytest.raises(
        RuntimeError, match=r"quantile_count_2 did not start on cpu: .*(different places|a lane of the mask)"
    ):
        cuda.quantile(make_pair(3000)[0], [700], True, None)
