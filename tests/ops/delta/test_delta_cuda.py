"""`delta` in CUDA C++ on fibers: tally and change bits are bit-identical to the reference in every order of threads."""

from __future__ import annotations

import pytest

from opdkernels.backends import gpu
from opdkernels.ops.delta import cuda
from tests.backends.cuda.fibers import ORDERS, kernel_source, launch_on_fibers, load_kernels, needs_compiler
from tests.ops.conformance import MILLION, MISALIGNED, Allocator, backend_kernel, check_case, make_pair, reference
from tests.ops.delta.cases import FAMILY, call_delta

pytestmark = needs_compiler
KERNEL = backend_kernel("cuda")
SAME_DTYPES = [f"{dtype}, torch.{dtype} " for dtype in ("bfloat16", "float32", "float64")]


@pytest.fixture(autouse=True)
def fibers(monkeypatch):
    """Blocks of two warps: the time grows with fibers, not with coordinates."""
    launch_on_fibers(monkeypatch, load_kernels("delta"))
    shape = cuda.launch_shape
    monkeypatch.setattr(cuda, "launch_shape", lambda *dtypes: (shape(*dtypes)[0], 64, shape(*dtypes)[2]))


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


def counts(kernel) -> list:
    return [output.tolist() for output in call_delta(kernel, Allocator(), *make_pair(3000), split=0)]


def bf16_only() -> str:
    """The source without the kernels of other dtypes, which a broken one does not need."""
    others = ("OPD_DELTA_COUNT(delta_count_float", "OPD_DELTA_COUNT(delta_count_double")
    return "\n".join(line for line in kernel_source("delta").splitlines() if not line.startswith(others))


BARRIER, SYNCWARP = "__syncthreads();", "__syncwarp();"
SHUFFLE = """const int before = __shfl_up_sync(OPD_ALL_LANES, position, d);
      position += lane >= d ? before : 0;"""


@pytest.mark.parametrize(
    ("text", "which", "of"),
    [(BARRIER, 0, 3), (BARRIER, 1, 3), (BARRIER, 2, 3), (SYNCWARP, 0, 2)],
    ids=["0", "1", "2", "warp"],
)
def test_missing_barrier_is_detected(monkeypatch, text, which, of):
    """Without it some order of threads gives another tally. (The second __syncwarp only orders memory.)"""
    parts = bf16_only().split(text)
    assert len(parts) == of + 1
    kernels = load_kernels("delta", text.join(parts[: which + 1]) + text.join(parts[which + 1 :]))
    expected, result = counts(reference), []
    for order in ORDERS:
        launch_on_fibers(monkeypatch, kernels, order=order)
        result.append(counts(KERNEL))
    assert any(output != expected for output in result)


@pytest.mark.parametrize(
    ("text", "broken", "said"),
    [
        (
            SHUFFLE,
            "if (lane >= d) position += __shfl_up_sync(OPD_ALL_LANES, position, d);",
            "lanes of a warp meet at different places|a lane of the mask",
        ),
        (SHUFFLE, "position += __shfl_up_sync(OPD_ALL_LANES << d, position, d);", "not in the mask"),
        (BARRIER, "if (threadIdx.x >= 32) __syncthreads();", "barrier"),
    ],
    ids=["shuffle", "mask", "barrier"],
)
def test_divergent_threads_are_detected(monkeypatch, text, broken, said):
    assert text in bf16_only()
    launch_on_fibers(monkeypatch, load_kernels("delta", bf16_only().replace(text, broken, 1)), order=2)
    with pytest.raises(
        RuntimeError, match=rf"delta_count_bf16 did not start on cpu: block \d+, thread \d+, line \d+: .*({said})"
    ):
        counts(KERNEL)
