"""Speed of each family on a device: bytes per second compared with a device copy, and with eager and compiled PyTorch.

The workloads are those of `opdkernels bench`, and some more. Implementations are timed with device events, in rounds
after a warm-up; the median counts. The outputs of every backend are compared with those of the first one, so a fast but
wrong kernel has no result.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.backends import FAMILIES, Backend
from benchmarks.gpu.checks import on_gpu
from benchmarks.gpu.record import sources_of
from opdkernels.backends import devices
from opdkernels.benchmark import limits as device_limits
from opdkernels.benchmark.eager import eager_counts
from opdkernels.benchmark.timing import ROUNDS
from opdkernels.benchmark.workloads import WORKLOADS as COMMON
from opdkernels.benchmark.workloads import Timed, Workload, delta_of, quantile_of

LARGEST = 1 << 28  # coordinates
SUMMED = ("gram", "divergence")  # families in which backends choose the order of sums
WORKLOADS = (
    *COMMON,
    Workload("delta of an fp32 pair", "delta", delta_of(torch.float32, eager_counts), "sums and counts", "read"),
    Workload("quantile of fp32 and a mask", "quantile", quantile_of(torch.float32), "sort", "read"),
)


def seconds(call: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    """Median seconds of the rounds after one warm-up."""
    call()
    timer = devices.event_s if on_gpu(device) else devices.elapsed_s
    return statistics.median(timer(call, device) for _ in range(rounds))


def coordinates(device: torch.device) -> int:
    """As many as leave memory for the copies of eager PyTorch."""
    if not on_gpu(device):
        return 1 << 16
    free = torch.cuda.mem_get_info(device)[0]
    return min(LARGEST, 1 << (free // 160).bit_length() - 1)


def time_workload(
    workload: Workload, backends: list[Backend], device: torch.device, limits: dict[str, float], n: int | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each backend and for eager PyTorch. The reference is not timed: it is a definition."""
    timed = workload.make(n or coordinates(device), device)
    first: list[torch.Tensor] | None = None
    for backend in backends:
        if backend.name in ("package", "reference") or not backend.serves_all(FAMILIES[workload.family]):
            continue
        timed.reset()
        outputs = [output.clone() for output in timed.call(backend.kernel)]
        first = first or outputs
        if workload.family not in SUMMED:
            same = [torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(outputs, first, strict=True)]
            assert all(same), f"{backend.name} gives a different result for {workload.name}"
        yield row(workload, backend.name, lambda backend=backend: timed.call(backend.kernel), device, timed, limits)
    yield row(workload, "eager PyTorch", timed.eager, device, timed, limits)


def time_compiled(
    workload: Workload, device: torch.device, limits: dict[str, float], compiled: Callable, n: int | None = None
) -> Iterator[dict[str, Any]]:
    """The row of the compiled eager code."""
    timed = workload.make(n or coordinates(device), device)
    call = compiled(timed.compilable or timed.eager)
    yield row(workload, "torch.compile", call, device, timed, limits)


def row(
    workload: Workload,
    implementation: str,
    call: Callable[[], Any],
    device: torch.device,
    timed: Timed,
    limits: dict[str, float],
) -> dict[str, Any]:
    median_s = seconds(call, device)
    rate = timed.work / median_s
    return {
        "workload": workload.name,
        "family": workload.family,
        "implementation": implementation,
        "sources": sources_of(workload.family, implementation),
        "median_s": median_s,
        unit_of(workload): rate,
        "fraction_of_limit": rate / limits[limit_of(workload)],
        "extra_bytes": devices.extra_memory_bytes(call, device),
    }


def unit_of(workload: Workload) -> str:
    """The key of its rate."""
    return "bytes_per_s" if workload.unit == "bytes" else "flops_per_s"


def limit_of(workload: Workload) -> str:
    """The limit that it is compared with: a copy within the device for every workload that moves bytes."""
    return "copy" if workload.unit == "bytes" else workload.limit


def measured_limits(device: torch.device, n: int | None = None) -> dict[str, float]:
    """Limits of the device: bytes per second of a copy, operations per second of products in fp64 and bf16."""
    side = 4096 if on_gpu(device) else 128
    return {
        "copy": device_limits.copy_rate(device, 4 * (n or coordinates(device))),
        "fp64 product": device_limits.product_rate(device, side, torch.float64),
        "bf16 product": device_limits.product_rate(device, 2 * side, torch.bfloat16),
    }
