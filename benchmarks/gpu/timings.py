"""Speed of each family on a device: bytes per second compared with a device copy, and with eager and compiled PyTorch.

The workloads are those of `opdkernels bench`, and some more. Implementations are timed with device events, in rounds
after a warm-up; the median counts. A call alone includes what the host does before its first kernel; the time of a call
in a CUDA graph of twenty does not, so only that is comparable with a copy. The outputs of every backend are compared
with those of the first one, so a fast but wrong kernel has no result.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu import graphs, predictions
from benchmarks.gpu.backends import FAMILIES, Backend
from benchmarks.gpu.checks import on_gpu
from benchmarks.gpu.record import NOT_CAPTURABLE, sources_of
from opdkernels.backends import devices
from opdkernels.benchmark import limits as device_limits
from opdkernels.benchmark.eager import eager_counts
from opdkernels.benchmark.timing import ROUNDS
from opdkernels.benchmark.workloads import WORKLOADS as COMMON
from opdkernels.benchmark.workloads import Timed, Workload, delta_of, quantile_of

LARGEST = predictions.COORDINATES
GRAPH_CALLS, GRAPH_ROUNDS = 20, 3
GRAPH_LIMIT_S = 0.01  # of a call: what the host does is a small part of longer ones
UPDATES = {25: 2.25e-5, 99: 1e-2}  # standard deviations of updates, by the percentage of the coordinates that change
SUMMED = ("gram", "divergence")  # families in which backends choose the order of sums
WORKLOADS = (
    *COMMON,
    Workload("delta of an fp32 pair", "delta", delta_of(torch.float32, eager_counts), "sums and counts", "read"),
    Workload("quantile of fp32 and a mask", "quantile", quantile_of(torch.float32), "sort", "read"),
    *(
        Workload(
            f"delta of a bf16 pair, {percent} % changed",
            "delta",
            delta_of(torch.bfloat16, eager_counts, update),
            "sums and counts",
            "read",
        )
        for percent, update in UPDATES.items()
    ),
)


def seconds(call: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    """Median seconds of the rounds after one warm-up."""
    call()
    timer = devices.event_s if on_gpu(device) else devices.elapsed_s
    return statistics.median(timer(call, device) for _ in range(rounds))


def seconds_in_graph(call: Callable[[], Any], device: torch.device, median_s: float) -> tuple[float | None, str]:
    """Median seconds of a call in a graph, and ""; or None, and why."""
    if not on_gpu(device):
        return None, "no GPU"
    if median_s > GRAPH_LIMIT_S:
        return None, f"a call takes more than {1000 * GRAPH_LIMIT_S:.0f} ms"
    try:
        replay, _ = graphs.capture(call, device, GRAPH_CALLS)
    except graphs.NotCapturable as error:
        return None, f"{NOT_CAPTURABLE}: {error}"
    except torch.OutOfMemoryError as error:
        return None, graphs.first_line(error)
    return seconds(replay, device, GRAPH_ROUNDS) / GRAPH_CALLS, ""


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_properties(device).name if on_gpu(device) else ""


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
    n = n or coordinates(device)
    timed = workload.make(n, device)
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
        call = functools.partial(timed.call, backend.kernel)
        yield row(workload, backend.name, call, device, timed, limits) | predicted(workload, backend.name, device, n)
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
    extra_bytes = devices.extra_memory_bytes(call, device)
    graph_s, graph_note = seconds_in_graph(call, device, median_s)
    rate, limit = timed.work / median_s, limits[limit_of(workload)]
    return {
        "workload": workload.name,
        "family": workload.family,
        "implementation": implementation,
        "sources": sources_of(workload.family, implementation),
        "median_s": median_s,
        unit_of(workload): rate,
        "fraction_of_limit": rate / limit,
        "graph_s": graph_s,
        "graph_fraction_of_limit": timed.work / graph_s / limit if graph_s else None,
        "graph_note": graph_note,
        "extra_bytes": extra_bytes,
    }


def predicted(workload: Workload, implementation: str, device: torch.device, n: int) -> dict[str, Any]:
    """The predicted seconds of a row, if there are any."""
    expected = predictions.expected_s(workload.name, implementation, gpu_name(device), n)
    return {"expected_s": expected} if expected else {}


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
