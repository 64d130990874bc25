"""Runs the workloads on a device: each implementation is checked, warmed up, then timed in rounds in which they take
turns."""

from __future__ import annotations

import contextlib
import datetime
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdkernels.analysis.tallying import probe_device, torch_threads
from opdkernels.backends import devices, dispatch
from opdkernels.benchmark import limits, machine
from opdkernels.benchmark.memory import extra_bytes
from opdkernels.benchmark.result import FORMAT, OURS, SCHEMA_VERSION
from opdkernels.benchmark.timing import paired
from opdkernels.benchmark.workloads import WORKLOADS, Kernel, Timed, Workload, dispatched
from opdkernels.config import BenchOptions
from opdkernels.errors import printable
from opdkernels.ops import all_operators
from opdkernels.ops.gram import symmetric
from opdkernels.progress import Progress, no_progress

CHECKED = 1 << 16  # coordinates on which a kernel is compared with its reference
TOLERANCES = {"gram": 1e-10, "divergence": 0.02}  # of the norm, where backends choose the order of sums
BYTES_PER_COORDINATE = 160  # that plain PyTorch takes at most
MAX_COORDINATES = 1 << 28


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        coordinates: Coordinates of each workload.
        limit_bytes: Size of the arrays that measure bandwidths.
        product_side: Rows of the matrices that measure fp64 products; those of other dtypes have twice as many.
        budget_s: Seconds after which a workload begins no further round.
    """

    coordinates: int
    limit_bytes: int
    product_side: int
    budget_s: float


def choose_scale(device: torch.device, quick: bool) -> Scale:
    """The sizes for a device: fixed on a CPU, small without compiled kernels, as references are slow; on a GPU plain
    PyTorch takes at most half of its free memory."""
    if device.type == "cpu":
        coordinates = 1 << 21 if quick or machine.instruction_set() == "reference" else 1 << 24
        return Scale(coordinates, 1 << 26, 512, 0.5) if quick else Scale(coordinates, 1 << 28, 1024, 3.0)
    fitting = max(1 << 16, devices.free_memory_bytes(device) // 2 // BYTES_PER_COORDINATE)
    coordinates = min(1 << 24 if quick else MAX_COORDINATES, 1 << fitting.bit_length() - 1)
    return Scale(coordinates, 8 * coordinates, 1024 if quick else 4096, 0.5 if quick else 3.0)


def run_benchmark(
    options: BenchOptions,
    *,
    progress: Progress = no_progress,
    kernel: Kernel = dispatched,
    scale: Scale | None = None,
) -> dict[str, Any]:
    """Measures the kernels on a device.

    Args:
        options: Device, families, and what they are compared with.
        progress: Called with workloads done, their number and the name of the current one.
        kernel: Returns the implementation of an operator by its name.
        scale: How much is measured; chosen by the device if None.

    Returns:
        The content of benchmark.json (`opdkernels.benchmark.result.Benchmark`).

    Raises:
        InputError: There is no such device.
    """
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    began = time.monotonic()
    device = probe_device(options.device)
    with torch_threads(options.threads):
        measured = machine.describe(device)
        scale = scale or choose_scale(device, options.quick)
        chosen = [workload for workload in WORKLOADS if not options.family or workload.family in options.family]
        names = dict.fromkeys(workload.limit_on(device) for workload in chosen)
        rates, rows = {}, []
        for i, name in enumerate(names):
            progress(i, len(names) + len(chosen), f"limit: {name}")
            rates[name] = measure_limit(name, device, scale)
        for i, workload in enumerate(chosen, len(names)):
            progress(i, len(names) + len(chosen), workload.name)
            rows.append(measure_workload(workload, device, options.against, scale, rates, kernel))
            devices.empty_cache(device)
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "started": started,
        "seconds": round(time.monotonic() - began, 1),
        "machine": measured,
        "options": options.model_dump(mode="json"),
        "limits": {name: {"unit": limits.unit_of(name), "per_s": rate} for name, rate in rates.items()},
        "rows": rows,
    }


def measure_limit(name: str, device: torch.device, scale: Scale) -> float:
    """The rate of a limit, in bytes or operations per second."""
    side = scale.product_side if name == "fp64 product" else 2 * scale.product_side
    return limits.measure(name, device, scale.limit_bytes, side)


def measure_workload(
    workload: Workload,
    device: torch.device,
    against: Sequence[str],
    scale: Scale,
    rates: Mapping[str, float],
    kernel: Kernel = dispatched,
) -> dict[str, Any]:
    """A row of the result: the times of a workload's implementations, or why one has none."""
    timed = workload.make(scale.coordinates, device)
    calls: dict[str, Callable[[], Any]] = {OURS: lambda: timed.call(kernel)}
    errors: dict[str, str] = {}
    memory: dict[str, int | None] = {}
    if "eager" in against:
        calls["eager"] = timed.eager
    if "compile" in against and workload.fuses:
        calls["compile"] = torch.compile(timed.compilable or timed.eager, dynamic=False)
    with quiet_compiler() if "compile" in calls else contextlib.nullcontext():
        with failures(errors, OURS):
            check(workload, device, kernel)
        for name, call in calls.items():
            if name not in errors:
                with failures(errors, name):
                    memory[name] = warm_up(call, device, compiles=name == "compile")
        usable = {name: call for name, call in calls.items() if name not in errors}
        seconds = paired(usable, device, budget_s=scale.budget_s, warm_up=False)
    return {
        "workload": workload.name,
        "family": workload.family,
        "size": timed.size,
        "compared_with": workload.compared_with,
        "backend": dispatch.select_backend(workload.family, device.type),
        "work": timed.work,
        "unit": workload.unit,
        "limit": workload.limit_on(device),
        "timings": timings(timed, seconds, memory, rates[workload.limit_on(device)]),
        "errors": errors,
    }


def warm_up(call: Callable[[], Any], device: torch.device, *, compiles: bool) -> int | None:
    """Calls once, twice where the first call compiles, and returns the extra memory of the last call."""
    if compiles or device.type == "cuda":
        call()
    return extra_bytes(call, device)


def timings(
    timed: Timed, seconds: Mapping[str, Sequence[float]], memory: Mapping[str, int | None], limit: float
) -> dict[str, dict[str, Any]]:
    """The times of each implementation, and what follows from them."""
    medians = {name: statistics.median(rounds) for name, rounds in seconds.items()}
    return {
        name: {
            "median_s": medians[name],
            "fastest_s": min(rounds),
            "slowest_s": max(rounds),
            "rounds": len(rounds),
            "per_s": timed.work / medians[name],
            "fraction_of_limit": timed.work / medians[name] / limit,
            "speedup": medians[name] / medians[OURS] if OURS in medians and name != OURS else None,
            "extra_bytes": memory[name],
        }
        for name, rounds in seconds.items()
    }


def check(workload: Workload, device: torch.device, kernel: Kernel = dispatched) -> None:
    """Raises ArithmeticError where the operators of a workload do not give the results of their references."""
    operators = all_operators()
    outputs, expected = (
        [output.clone() for output in workload.make(CHECKED, device).call(implementation)]
        for implementation in (kernel, lambda name: operators[name].reference)
    )
    for output, reference in zip(outputs, expected, strict=True):
        if not agree(workload.family, output, reference):
            raise ArithmeticError(f"the result differs from that of the reference, for {CHECKED:,} coordinates")


def agree(family: str, output: Tensor, reference: Tensor) -> bool:
    """Whether outputs are bit-identical or, where backends choose the order of sums, near to each other."""
    if family not in TOLERANCES:
        return output.dtype == reference.dtype and torch.equal(output, reference)
    if family == "gram":
        output, reference = symmetric(output), symmetric(reference)
    output, reference = output.double(), reference.double()
    return bool((output - reference).norm() <= TOLERANCES[family] * reference.norm())


@contextlib.contextmanager
def failures(errors: dict[str, str], name: str) -> Iterator[None]:
    """Records the first line of what an implementation raises: the others are still measured."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        errors[name] = printable(lines[0])[:300]


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """torch.compile without warnings, and without what it compiled for earlier workloads."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
