"""`delta` in CUDA C++ on fibers: tally and change bits are bit-identical to the reference in every order of threads."""

from __future__ import annotations

import contextlib
import ctypes

import pytest
import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda import launch
from opdkernels.ops.delta import cuda
from tests.backends.cuda.fibers import ORDERS, kernel_source, launch_on_fibers, load_kernels, needs_compiler
from tests.ops.conformance import MILLION, MISALIGNED, Allocator, backend_kernel, check_case, make_pair, reference
from tests.ops.delta.cases import FAMILY, call_delta

pytestmark = needs_compiler
KERNEL = backend_kernel("cuda")
SAME_DTYPES = [f"{dtype}, torch.{dtype} " for dtype in ("bfloat16", "float32", "float64")]


@pytest.fixture(autouse=True)
def fibers(monkeypatch):
    """Blocks of two warps: the time grows with fibers, not with coordinates. Kernels leave their workspace zero."""
    launch_on_fibers(monkeypatch, load_kernels("delta"))
    monkeypatch.setattr(cuda, "PAIR_THREADS", 64)
    monkeypatch.setattr(cuda, "WIDE_THREADS", 64)
    workspaces: dict = {}
    monkeypatch.setattr(launch, "workspaces", workspaces)
    yield
    assert not any(workspace.any() for workspace in workspaces.values())


@pytest.mark.parametrize("case", FAMILY.collect((0, 1, 31, 1023, 1025), special=True), ids=str)
def test_matches_reference(case):
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([2100]), ids=str)
def test_misaligned(case):
    check_case(case, KERNEL, offsets=MISALIGNED)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("only", SAME_DTYPES)
def test_thread_order_changes_no_bit(monkeypatch, only, order):
    launch_on_fibers(monkeypatch, load_kernels("delta"), order=order, num_sms=1 + order)
    for case in FAMILY.collect([5001], only=only):
        check_case(case, KERNEL)


@pytest.mark.parametrize("only", SAME_DTYPES)
def test_blocks_of_device_size(monkeypatch, only):
    monkeypatch.undo()
    launch_on_fibers(monkeypatch, load_kernels("delta"), order=2)
    for case in FAMILY.collect([70_001], only=only):
        check_case(case, KERNEL)


def test_a_million_coordinates():
    for case in FAMILY.collect([MILLION], only=SAME_DTYPES[0]):
        check_case(case, KERNEL)


@pytest.mark.parametrize("kib", [48, 99, 163, 227])
@pytest.mark.parametrize("case", FAMILY.collect(special=True, only="large"), ids=str)
def test_shared_memory_size_changes_no_count(monkeypatch, case, kib):
    launch_on_fibers(monkeypatch, load_kernels("delta"), shared_bytes=kib << 10)
    check_case(case, KERNEL)


@pytest.mark.parametrize("only", SAME_DTYPES[:2])
def test_slices_change_no_bit(monkeypatch, only):
    monkeypatch.setattr(gpu, "SLICE", 2048)
    for case in FAMILY.collect([4501], only=only):
        check_case(case, KERNEL)


def test_common_path_is_common(monkeypatch):
    """Random weights and updates take OPD_RARE code in fewer than 0.5 % of steps and changes, prefetches beyond the
    end excepted: it is what the instruction budgets leave out (tests/backends/cuda/test_budgets.py)."""
    kernels = load_kernels("delta")
    launch_on_fibers(monkeypatch, kernels)
    kernels.library.shim_rare_runs.restype = ctypes.c_longlong
    n = 400 * cuda.PAIR_THREADS * cuda.PAIR_STEP
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(n, generator=generator)).bfloat16()
    trained = (base.float() + 1e-5 * torch.randn(n, generator=generator)).bfloat16()
    kernels.library.shim_rare_runs()
    changed = int((base != trained).sum())
    call_delta(KERNEL, Allocator(), base, trained, split=0)  # without a mask
    prefetches = 2 * cuda.PAIR_THREADS  # one per thread of two blocks
    assert kernels.library.shim_rare_runs() - prefetches < 0.005 * (n / cuda.PAIR_STEP + changed)


def counts(kernel) -> list:
    base, trained = make_pair(3000)
    base[5] = trained[5] = 2.0**-24 * (1 + 40 / 128)  # a bin that only the second warp flushes, alone in its exponent
    return [output.tolist() for output in call_delta(kernel, Allocator(), base, trained, split=0)]


def bf16_only() -> str:
    """The source without the kernels of other dtypes, which a broken one does not need."""
    others = ("OPD_DELTA_KERNEL(delta_count_float", "OPD_DELTA_KERNEL(delta_count_double")
    return "\n".join(line for line in kernel_source("delta").splitlines() if not line.startswith(others))


BARRIER, SYNCWARP = "__syncthreads();", "__syncwarp();"
SHUFFLE = """const T below = __shfl_up_sync(OPD_ALL_LANES, x, d);
    x += (int)(threadIdx.x % OPD_WARP) >= d ? below : 0;"""
LIMITED, IN_SMEM = 99 << 10, 227 << 10  # shared memory of a block, with which one or the other kernel counts


@pytest.mark.parametrize(
    ("text", "which", "of", "shared_bytes"),
    [  # the first barrier of `is_last_block` separates blocks, which run one after another here
        *((BARRIER, which, 11, LIMITED) for which in (1, 2, 3, 4, 5, 6)),
        *((BARRIER, which, 11, IN_SMEM) for which in (1, 3, 4, 7, 8, 9, 10)),
        (SYNCWARP, 0, 4, IN_SMEM),
        (SYNCWARP, 2, 4, LIMITED),
    ],
)
def test_missing_barrier_is_detected(monkeypatch, text, which, of, shared_bytes):
    """Without it some order of threads gives another tally. (The second __syncwarp of a kernel only orders memory.)"""
    parts = bf16_only().split(text)
    assert len(parts) == of + 1
    kernels = load_kernels("delta", text.join(parts[: which + 1]) + text.join(parts[which + 1 :]))
    expected, result = counts(reference), []
    for order in ORDERS:
        launch_on_fibers(monkeypatch, kernels, order=order, shared_bytes=shared_bytes)
        with contextlib.suppress(RuntimeError):  # some threads return, others wait
            result.append(counts(KERNEL))
    assert any(output != expected for output in result) or len(result) < len(ORDERS)


@pytest.mark.parametrize(
    ("text", "broken", "said"),
    [
        (
            SHUFFLE,
            "if ((int)(threadIdx.x % OPD_WARP) >= d) x += __shfl_up_sync(OPD_ALL_LANES, x, d);",
            "lanes of a warp meet at different places|a lane of the mask",
        ),
        (SHUFFLE, "x += __shfl_up_sync(OPD_ALL_LANES << d, x, d);", "not in the mask"),
        (BARRIER, "if (threadIdx.x >= 32) __syncthreads();", "barrier"),
    ],
    ids=["shuffle", "mask", "barrier"],
)
def test_divergent_threads_are_detected(monkeypatch, text, broken, said):
    assert text in bf16_only()
    kernels = load_kernels("delta", bf16_only().replace(text, broken, 1))
    launch_on_fibers(monkeypatch, kernels, order=2, shared_bytes=LIMITED)
    with pytest.raises(
        RuntimeError,
        match=rf"delta_count_bf16_limited did not start on cpu: block \d+, thread \d+, line \d+: .*({said})",
    ):
        counts(KERNEL)
