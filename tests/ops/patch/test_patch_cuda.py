"""`patch` in CUDA C++ on fibers: bit-identical to the reference in every order of threads; rejects the same changes."""

from __future__ import annotations

import re

import pytest
import torch

from opdkernels.ops.patch import cuda
from opdkernels.ops.patch.layout import BLOCK
from tests.backends.cuda.fibers import ORDERS, kernel_source, launch_on_fibers, load_kernels, needs_compiler
from tests.ops.conformance import MILLION, MISALIGNED, SIZES, Allocator, backend_kernel, check_case, reference
from tests.ops.patch.cases import FAMILY, assert_rejection_writes_nothing, gather, make_bits, malformed_cases, scatter

pytestmark = needs_compiler
KERNEL = backend_kernel("cuda")


@pytest.fixture(autouse=True)
def fibers(monkeypatch):
    """Blocks of two warps: the time grows with fibers, not with coordinates."""
    launch_on_fibers(monkeypatch, load_kernels("patch"))
    monkeypatch.setattr(cuda, "THREADS", 64)
    monkeypatch.setattr(cuda, "QUEUE_THREADS", 64)


@pytest.mark.parametrize("case", FAMILY.collect(SIZES, special=True), ids=str)
def test_matches_reference(case):
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", malformed_cases(), ids=str)
def test_rejected_changes_write_nothing(case):
    assert_rejection_writes_nothing(KERNEL, case)


@pytest.mark.parametrize("case", FAMILY.collect([5003]), ids=str)
def test_misaligned(case):
    check_case(case, KERNEL, offsets=MISALIGNED)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", FAMILY.collect(special=True, only=" mask, offsets"), ids=str)
def test_thread_order_changes_no_bit(monkeypatch, case, order):
    launch_on_fibers(monkeypatch, load_kernels("patch"), order=order, num_sms=1 + order)
    check_case(case, KERNEL)


@pytest.mark.parametrize("case", FAMILY.collect([MILLION], only="int16 1000003 changed 0.17"), ids=str)
def test_a_million_coordinates_in_blocks_of_device_size(monkeypatch, case):
    monkeypatch.setattr(cuda, "THREADS", 512)
    monkeypatch.setattr(cuda, "QUEUE_THREADS", 256)
    check_case(case, KERNEL)


BARRIER, SYNCWARP = "__syncthreads();", "__syncwarp();"


def only_two_bytes(source: str) -> str:
    """Removes the kernels of other widths, so that a modified source compiles faster."""
    return re.sub(r"^OPD_PATCH_WIDTH\((?!2,).*$", "", source, flags=re.MULTILINE)


def without_barrier(text: str, which: int, of: int) -> str:
    """The source without one of its barriers."""
    parts = only_two_bytes(kernel_source("patch")).split(text)
    assert len(parts) == of + 1
    return text.join(parts[: which + 1]) + text.join(parts[which + 1 :])


def gathered(kernel) -> list:
    w, v = make_bits(9000, torch.int16, 0.3)
    return [output.tolist() for output in gather(kernel, Allocator(), w, v)]


def scattered(kernel) -> list:
    w, v = make_bits(9000, torch.int16, 0.02)
    changes = gather(reference, Allocator(), w, v)[:3]
    return [output.tolist() for output in scatter(kernel, Allocator(), w, changes)]


def digested(kernel) -> list:
    return kernel("patch_digest")(make_bits(9000, torch.int16, 0.02)[0]).tolist()


def impossible_count(kernel) -> list:
    """The status of changes whose 41st block has an impossible count: a thread of the second warp finds it."""
    counts = torch.zeros(41, dtype=torch.int32)
    counts[40] = -1
    return kernel("patch_check")(counts, torch.zeros(0, dtype=torch.uint8), 41 * BLOCK, 0).tolist()


# The barrier to remove, and the outputs that depend on it.
BARRIERS = {
    "queue": (SYNCWARP, 0, gathered),
    "zero before the total": (BARRIER, 2, gathered),
    "compared": (BARRIER, 3, gathered),
    "totals of warps": (BARRIER, 4, scattered),
    "valid before impossible counts": (BARRIER, 5, impossible_count),
    "zeros before offsets": (BARRIER, 6, scattered),
    "offsets before counts": (BARRIER, 7, scattered),
    "counts before their sum": (BARRIER, 8, scattered),
    "restored": (BARRIER, 9, scattered),
    "digested": (BARRIER, 10, digested),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_missing_barrier_is_detected(monkeypatch, name):
    """Without it, some order of threads gives other outputs. (The second __syncwarp only orders memory.)"""
    text, which, outputs = BARRIERS[name]
    expected = outputs(reference)
    kernels = load_kernels("patch", without_barrier(text, which, 2 if text == SYNCWARP else 11))
    results = []
    for order in ORDERS:
        launch_on_fibers(monkeypatch, kernels, order=order)
        results.append(outputs(KERNEL))
    assert any(result != expected for result in results)


COMPARED = """__syncthreads();
  if (threadIdx.x == 0) counts[blockIdx.x]"""


@pytest.mark.parametrize(
    ("text", "broken", "message"),
    [
        ("even += __shfl_xor_sync", "if (lane & 4) even += __shfl_xor_sync", "different places|a lane of the mask"),
        ("bits |= __shfl_xor_sync", "if (bits) bits |= __shfl_xor_sync", "different places|a lane of the mask"),
        (COMPARED, COMPARED.replace(BARRIER, f"if (threadIdx.x >= 32) {BARRIER}"), "barrier"),
    ],
    ids=["sums", "bits", "barrier"],
)
def test_divergent_threads_are_detected(monkeypatch, text, broken, message):
    source = only_two_bytes(kernel_source("patch"))
    assert text in source
    launch_on_fibers(monkeypatch, load_kernels("patch", source.replace(text, broken, 1)), order=2)
    with pytest.raises(
        RuntimeError, match=rf"patch_compare_2 did not start on cpu: block \d+, thread \d+, line \d+: .*({message})"
    ):
        gathered(KERNEL)
