"""`overlap` in CUDA C++ on fibers: bit-identical to the reference in every order of threads."""

from __future__ import annotations

import contextlib
import ctypes

import pytest
import torch

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
    monkeypatch.setattr(cuda, "BF16_THREADS", 64)
    monkeypatch.setattr(cuda, "MIXED_THREADS", 64)


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
    monkeypatch.undo()
    launch_on_fibers(monkeypatch, load_kernels("overlap"), order=2)
    check_case(case, KERNEL)


@pytest.mark.parametrize("kib", [48, 99, 163])
@pytest.mark.parametrize("case", FAMILY.collect(special=True, only="large"), ids=str)
def test_shared_memory_size_changes_no_count(monkeypatch, case, kib):
    launch_on_fibers(monkeypatch, load_kernels("overlap"), shared_bytes=kib << 10)
    check_case(case, KERNEL)


@pytest.mark.parametrize("kib", [20, 30])
@pytest.mark.parametrize("case", FAMILY.collect(special=True, only="runs of torch.bfloat16"), ids=str)
def test_shared_memory_for_no_row_or_one_changes_no_count(monkeypatch, case, kib):
    launch_on_fibers(monkeypatch, load_kernels("overlap"), shared_bytes=kib << 10)
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([5001]), ids=str)
def test_slices_change_no_count(monkeypatch, case):
    monkeypatch.setattr(gpu, "SLICE", 2048)
    check_case(case, KERNEL)


def bf16_runs(n: int, n_runs: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Weights and updates of the size of trained models."""
    generator = torch.Generator().manual_seed(n_runs)
    base = (0.02 * torch.randn(n, generator=generator)).bfloat16()
    return base, [(base.float() + 1e-5 * torch.randn(n, generator=generator)).bfloat16() for _ in range(n_runs)]


@pytest.mark.parametrize("n_runs", [2, 3, 4])
def test_common_path_is_common(monkeypatch, n_runs):
    """Random weights and updates take OPD_RARE code in fewer than 0.5 % of steps and changes, the first turn and the
    last tile excepted: it is what the instruction budgets leave out (tests/backends/cuda/test_budgets.py)."""
    kernels = load_kernels("overlap")
    launch_on_fibers(monkeypatch, kernels)
    kernels.library.shim_rare_runs.restype = ctypes.c_longlong
    n = 400 * cuda.BF16_THREADS * cuda.BF16_STEP
    base, runs = bf16_runs(n, n_runs)
    kernels.library.shim_rare_runs()
    changed = int(torch.stack([base != run for run in runs]).any(0).sum())
    outputs = call_overlap(KERNEL, Allocator(), base, runs)
    assert int(outputs[3][1:].sum()) > 0.05 * n
    first_turns = 2 * cuda.BF16_THREADS  # one per thread of two blocks
    assert kernels.library.shim_rare_runs() - first_turns < 0.005 * (n / cuda.BF16_STEP + changed)


BARRIER, SYNCWARP = "__syncthreads();", "__syncwarp();"


def counts(kernel) -> list:
    return [output.tolist() for output in call_overlap(kernel, Allocator(), *make_runs(3000))]


# The first two barriers are those of `is_last_block`, which other families use.
@pytest.mark.parametrize(("text", "which", "of"), [*((BARRIER, which, 5) for which in (2, 3, 4)), (SYNCWARP, 0, 2)])
def test_missing_barrier_is_detected(monkeypatch, text, which, of):
    """Without it some order of threads gives other counts. (The second __syncwarp only orders memory.)"""
    parts = kernel_source("overlap").split(text)
    assert len(parts) == of + 1
    kernels = load_kernels("overlap", text.join(parts[: which + 1]) + text.join(parts[which + 1 :]))
    expected, result = counts(reference), []
    for order in ORDERS:
        launch_on_fibers(monkeypatch, kernels, order=order)
        with contextlib.suppress(RuntimeError):  # some threads return, others wait
            result.append(counts(KERNEL))
    assert any(output != expected for output in result) or len(result) < len(ORDERS)


def test_divergent_shuffle_is_detected(monkeypatch):
    line = "const opd_u32 appended = __shfl_sync(OPD_ALL_LANES, up_to_here, OPD_WARP - 1);"
    assert line in kernel_source("overlap")
    broken = f"opd_u32 appended = 0; if (threadIdx.x & 1) {line.removeprefix('const opd_u32 ')}"
    launch_on_fibers(monkeypatch, load_kernels("overlap", kernel_source("overlap").replace(line, broken)))
    with pytest.raises(
        RuntimeError,
        match=r"overlap_count_bf16_2 did not start on cpu: .*(different places|a lane of the mask|barrier)",
    ):
        counts(KERNEL)
