"""The launches of the CUDA launchers, recorded on fake "cuda" tensors that have shapes, dtypes and strides only."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from opdkernels.backends.cuda import launch
from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, THRESHOLDS
from opdkernels.ops.delta import cuda as delta
from opdkernels.ops.overlap import cuda as overlap
from opdkernels.ops.patch import cuda as patch
from opdkernels.ops.patch.layout import blocks_of
from opdkernels.ops.quantile import cuda as quantile
from opdkernels.ops.step import adamw_scalars
from opdkernels.ops.step import cuda as step
from opdkernels.ops.step.layout import BLOCK, STEP_ROW

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
BEYOND = 2**31 + 11
HOPPER, AMPERE, ADA = 227 << 10, 163 << 10, 99 << 10  # shared memory of a block, bytes

pytestmark = pytest.mark.filterwarnings("error")


def on_cuda(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def launches(monkeypatch, call: Callable[[], Any], shared_bytes: int = HOPPER) -> list[tuple]:
    started: list[tuple] = []
    monkeypatch.setattr(launch, "run", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(launch, "device_limits", lambda device: (132, shared_bytes))
    monkeypatch.setattr(launch, "stream_address", lambda device: 0)
    monkeypatch.setattr(launch, "is_capturing", lambda device: False)
    monkeypatch.setattr(launch, "workspaces", {})
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: 16, raising=False)  # it has no memory
    with FakeTensorMode():
        call()
    return started


def call_delta(source: torch.dtype, trained: torch.dtype, n: int) -> None:
    outputs = (
        on_cuda(8, 32768),
        on_cuda(49),
        on_cuda(4, 44),
        on_cuda(1, dtype=FP64),
        on_cuda((n + 7) // 8, dtype=torch.uint8),
    )
    delta.delta_(on_cuda(n, dtype=source), on_cuda(n, dtype=trained), DEFAULT_THRESHOLD_BITS, THRESHOLDS, *outputs)


def call_quantile(dtype: torch.dtype, n: int) -> None:
    quantile.quantile(on_cuda(n, dtype=dtype), [n // 10, n // 2], True, on_cuda((n + 7) // 8, dtype=torch.uint8))


def call_overlap(runs: int, n: int, dtype: torch.dtype = BF16) -> None:
    outputs = (on_cuda(32768), on_cuda(runs, 32768), on_cuda(runs, runs), on_cuda(runs + 1), on_cuda(2))
    overlap.overlap_(on_cuda(n, dtype=BF16), [on_cuda(n, dtype=dtype)] * runs, 0x3728, *outputs)


def call_patch(dtype: torch.dtype, n: int) -> None:
    w, v, values = (on_cuda(n, dtype=dtype) for _ in range(3))
    blocks = blocks_of(n)
    counts, positions = on_cuda(blocks, dtype=torch.int32), on_cuda((n + 7) // 8, dtype=torch.uint8)
    patch.patch_gather_(w, v, True, counts, positions, values, on_cuda(2, blocks, 2))
    patch.patch_scatter_(w, counts, positions, values, True, v, on_cuda(blocks, 2))
    patch.patch_digest(w)
    patch.patch_check(counts, positions, n, n)


def call_adamw(sizes: list[int], active: int, changed: bool = False) -> None:
    params, grads = ([on_cuda(n, dtype=BF16) for n in sizes] for _ in range(2))
    masks, offsets = (
        [on_cuda((n + 7) // 8, dtype=torch.uint8) for n in sizes],
        [on_cuda(-(-n // BLOCK) + 1) for n in sizes],
    )
    m, v = ([on_cuda(active, dtype=FP32) for _ in sizes] for _ in range(2))
    order = list(range(len(sizes)))
    step.masked_adamw_(
        params,
        grads,
        masks,
        offsets,
        m,
        v,
        [],
        [on_cuda(active, dtype=torch.int16) for _ in sizes],
        [],
        [],
        [on_cuda((n + 7) // 8, dtype=torch.uint8) for n in sizes] if changed else [],
        adamw_scalars([1.0] * len(sizes), 1e-3, (0.9, 0.99), 1e-8, 0.1),
        order,
        order,
        order,
        None,
        None,
        on_cuda(1, dtype=FP32),
        False,
        1,
        5,
    )


@pytest.mark.parametrize(
    ("dtype", "name"), [(BF16, "delta_count_bf16"), (FP32, "delta_count_float"), (FP64, "delta_count_double")], ids=str
)
def test_more_than_2_31_coordinates_take_slices(monkeypatch, dtype, name):
    started = launches(monkeypatch, lambda: call_delta(dtype, dtype, BEYOND))
    assert [launched[0] for launched in started] == [name] * 3
    sizes = [arguments[15] for arguments in started]
    assert (sum(sizes), max(sizes)) == (BEYOND, 2**30)
    assert launches(monkeypatch, lambda: call_delta(dtype, dtype, 0)) == []


def test_quantile_takes_one_pass_per_digit(monkeypatch):
    for dtype, passes in ((BF16, 1), (FP32, 2), (FP64, 4)):
        started = launches(monkeypatch, lambda dtype=dtype: call_quantile(dtype, 1 << 20))
        names = [f"quantile_count_{dtype.itemsize}", "quantile_find"] * passes
        assert [launched[0] for launched in started] == names
        assert [launched[1] for launched in started][1::2] == [1, *[2] * (passes - 1)]


class Operations(TorchDispatchMode):
    """The operations of torch that are executed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("runs", "dtype", "kernel"),
    [
        (2, BF16, "overlap_count_bf16_2"),
        (4, BF16, "overlap_count_bf16_4"),
        (2, FP32, "overlap_count"),
        (5, BF16, "overlap_count"),
        (16, BF16, "overlap_count"),
    ],
    ids=str,
)
def test_overlap_is_one_launch_without_copies(monkeypatch, runs, dtype, kernel):
    """Runs are arguments of the kernel, which adds to the outputs itself; torch only takes views."""
    with Operations() as operations:
        (launched,) = launches(monkeypatch, lambda: call_overlap(runs, 1 << 20, dtype))
    size, n_runs, threshold, _, *trained = launched[12:]
    assert (launched[0], size, n_runs, threshold) == (kernel, 1 << 20, runs, 0x3728)
    assert [tensor is not None for tensor in trained] == [True] * runs + [False] * (16 - runs)
    assert {name for name in operations.names if name.startswith("aten.") and "empty" not in name} <= {
        "aten.view.default",
        "aten.slice.Tensor",
    }
    sizes = [launched[12] for launched in launches(monkeypatch, lambda: call_overlap(runs, BEYOND, dtype))]
    assert (len(sizes), sum(sizes), max(sizes)) == (3, BEYOND, 2**30)


def test_step_of_many_tensors_is_one_launch(monkeypatch):
    for sizes, blocks in (([BEYOND, 5, 0, 4096], 4 * 132), ([1], 1), ([BLOCK] * 9, 2)):
        ((name, grid, threads, shared_bytes, device, table, ends, count, scalars, *_),) = launches(
            monkeypatch, lambda sizes=sizes: call_adamw(sizes, 7)
        )
        some = sum(n > 0 for n in sizes)
        assert (name, grid, threads, shared_bytes) == ("step_adamw", blocks, 256, 8 * 4096)
        assert (len(table), len(ends), count) == ((STEP_ROW.itemsize // 8 + 1) * some, some, some)
        assert {tensor.device.type for tensor in (table, scalars)} == {device.type} == {"cuda"}
    assert launches(monkeypatch, lambda: call_adamw([0], 0)) == []
    ((name, _, _, shared_bytes, *_),) = launches(monkeypatch, lambda: call_adamw([BLOCK], 7, changed=True))
    assert (name, shared_bytes) == ("step_adamw_changed", 8 * (4096 + BLOCK // 8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_patch_gathers_and_scatters_in_three_launches(monkeypatch, dtype):
    width, blocks = dtype.itemsize, -(-BEYOND // 2**16)
    started = launches(monkeypatch, lambda: call_patch(dtype, BEYOND))
    names = [
        f"patch_compare_{width}",
        "patch_plan",
        f"patch_compress_{width}",
        "patch_plan",
        "patch_decode",
        f"patch_restore_{width}",
        "patch_digest",
        "patch_plan",
        "patch_decode",
    ]
    assert [launched[0] for launched in started] == names
    assert [launched[1] for launched in started] == [blocks, 1, 4 * 132, 1, *[blocks] * 3, 1, blocks]
    sums, change_bits, plan = 4096 * width, 8208, 264  # bytes in shared memory: 64 per unit
    expected = [2 * sums + 8, plan, 8 * 4096, plan, change_bits, sums, sums, plan, change_bits]
    assert [launched[3] for launched in started] == expected
    assert max(launched[3] for launched in started) <= ADA
    assert [launched[0] for launched in launches(monkeypatch, lambda: call_patch(dtype, 0))] == [
        "patch_plan",
        "patch_decode",
    ] * 2  # they validate the lengths


@pytest.mark.parametrize(
    ("shared_bytes", "kernel", "threads"),
    [
        (HOPPER, "delta_count_bf16", 768),
        (AMPERE, "delta_count_bf16", 448),
        (ADA, "delta_count_bf16_limited", 768),
        (48 << 10, "delta_count_bf16_limited", 768),
    ],
)
def test_bf16_pairs_use_the_kernel_whose_tables_fit(monkeypatch, shared_bytes, kernel, threads):
    name, blocks, started_threads, asked, *_ = launches(
        monkeypatch, lambda: call_delta(BF16, BF16, 1 << 24), shared_bytes
    )[0]
    assert (name, blocks, started_threads) == (kernel, 132, threads)
    assert asked <= shared_bytes


@pytest.mark.parametrize(("shared_bytes", "tables"), [(HOPPER, 10), (AMPERE, 8), (ADA, 4), (48 << 10, 0)])
def test_blocks_use_the_available_shared_memory(monkeypatch, shared_bytes, tables):
    _, blocks, _, asked, *rest = launches(monkeypatch, lambda: call_delta(FP32, FP32, 1 << 24), shared_bytes)[0]
    assert (blocks, rest[12]) == (132, tables)
    assert asked == launch.SMEM_HEADER_BYTES + tables * launch.SMEM_TABLE_BYTES <= shared_bytes


@pytest.mark.parametrize(
    ("shared_bytes", "runs", "kernel", "threads", "rows"),
    [
        (HOPPER, 4, "overlap_count_bf16_4", 640, 5),
        (AMPERE, 4, "overlap_count_bf16_4", 640, 5),
        (ADA, 2, "overlap_count_bf16_2", 640, 3),
        (ADA, 3, "overlap_count_bf16_3", 416, 4),
        (ADA, 4, "overlap_count", 1024, 3),
        (HOPPER, 16, "overlap_count", 1024, 11),
        (48 << 10, 2, "overlap_count", 1024, 0),
    ],
)
def test_overlap_uses_the_kernel_whose_rows_fit(monkeypatch, shared_bytes, runs, kernel, threads, rows):
    launched = launches(monkeypatch, lambda: call_overlap(runs, 1 << 24), shared_bytes)[0]
    assert (launched[0], launched[1], launched[2], launched[15]) == (kernel, 132, threads, rows)
    assert launched[3] <= shared_bytes


def test_kernels_launch_on_the_current_stream(monkeypatch):
    started = []
    kernels = launch.LibraryKernels.__new__(launch.LibraryKernels)  # without a library
    kernels.library = SimpleNamespace(delta_count_bf16_launch=lambda *arguments: started.append(arguments) or 0)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1 << 40 | device.index)
    )
    kernels.launch("delta_count_bf16", [1 << 45, -1], 2**31, 32, 70_000, torch.device("cuda", 3))
    ((arguments, count, blocks, *shape, device, stream),) = started
    assert (list(arguments), count) == ([1 << 45, -1], 2)
    assert (blocks.value, shape, device, stream.value) == (2**31, [32, 70_000], 3, 1 << 40 | 3)


def test_launch_error_names_kernel_device_and_remedy():
    kernels = launch.LibraryKernels.__new__(launch.LibraryKernels)
    kernels.library = SimpleNamespace(
        delta_count_bf16_launch=lambda *launch: 35,
        opd_cuda_error=lambda status: b"driver too old" * (status == 35),
    )
    with pytest.raises(
        RuntimeError,
        match="delta_count_bf16 did not start on cpu: driver too old; update the NVIDIA driver, "
        "or set OPDKERNELS_BACKEND=triton",
    ):
        kernels.launch("delta_count_bf16", [0], 1, 32, 0, torch.device("cpu"))
