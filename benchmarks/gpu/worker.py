"""Runs units one after another and prints a line of JSON for each; started by `python -m benchmarks.gpu`.

An illegal memory access of a kernel costs the process its GPU, or crashes it. So the units are numbered, and a new
worker continues after the failed unit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu import atomics, checks, graphs, packed, pair, timings
from benchmarks.gpu.backends import CPU, FAMILIES, OPERATORS, available_backends, compiled_from
from benchmarks.gpu.record import NOT_CAPTURABLE
from opdkernels.backends import dispatch

SMALL = (0, 31, 1025, 5001)
ALONE = (
    "uses_current_stream",
    "indexes_beyond_32_bits",
)  # checks that other processes on the GPU would disturb
FIRST = ("packed_functions", "atomics")  # before everything else: the kernels are built on them
SANITIZED = ("memcheck", "racecheck")
MIN_SANITIZER_S = 10.0
END_MARGIN_S = 3.0  # a worker that is killed could not end the process under the sanitizer
GPU_LOST = 3  # exit status of a worker that cannot use the GPU any more


@dataclass(frozen=True)
class Unit:
    """A part of the run, of group "check", "sanitizer" or "time". `run` returns rows, and raises what is wrong."""

    group: str
    name: str
    workload: str
    backend: str
    run: Callable[[], list[dict[str, Any]]]

    @property
    def title(self) -> dict[str, str]:
        return {"group": self.group, "name": self.name, "workload": self.workload, "backend": self.backend}


def sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def sanitized(tool: str, family: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The equality checks of a family on small inputs under NVIDIA's compute-sanitizer, in another process."""
    program = sanitizer()
    if program is None:
        raise checks.Inconclusive("compute-sanitizer is not installed")
    limit_s = min(arguments.limit, arguments.until - time.monotonic() - END_MARGIN_S)
    if limit_s < MIN_SANITIZER_S:
        raise checks.Inconclusive("no time is left")
    command = [program, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    command += [sys.executable, "-m", "benchmarks.gpu.worker", "--device", arguments.device, "--family", family]
    command += ["--small", "--only", "matches_cpu", "--without", "reference,package"]
    status, stdout, stderr = run_for(command, limit_s)
    reports = [line.removeprefix("=========").strip() for line in stdout.splitlines() if line.startswith("=========")]
    reports = [line for line in reports if not line.startswith(("COMPUTE-SANITIZER", "WARNING"))]
    results = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    failed = [result for result in results if result.get("status") == "failed"]
    has_errors = status == 9 or (status is None and bool(reports))
    assert not has_errors, "; ".join(reports[:6])
    assert not failed, f"{failed[0]['workload']} {failed[0]['backend']}: {failed[0]['detail']}"
    if status is None:
        passed = [result["backend"] for result in results if result.get("status") == "passed"]
        raise checks.Inconclusive(f"stopped after {limit_s:.0f} s; passed: {', '.join(passed) or 'none'}")
    assert status == 0, stderr[-500:] or "the process crashed"
    return []


def run_for(command: list[str], limit_s: float) -> tuple[int | None, str, str]:
    """Exit status and outputs of a process; it and its children are killed after `limit_s`, and the status is None."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        outputs = process.communicate(timeout=limit_s)
        return process.returncode, *outputs
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, *process.communicate()
    except BaseException:  # such as KeyboardInterrupt, which the processes of another session do not get
        os.killpg(process.pid, signal.SIGKILL)
        raise


def is_in_part(part: str, unit: Unit, families: list[str]) -> bool:
    """Whether a worker runs a unit.

    `part`: "first" for what runs before everything else, "2/4" for the third of four workers in parallel, "alone" for
    the rest, or "" for all.
    """
    if not part:
        return True
    phase = "first" if unit.name in FIRST else "alone" if unit.group == "time" or unit.name in ALONE else "parallel"
    if "/" not in part or phase != "parallel":
        return part == phase
    which, of = map(int, part.split("/"))
    return families.index(unit.workload) % of == which


def plan(arguments: argparse.Namespace, device: torch.device) -> list[Unit]:
    """The units to run, in order: what decides most comes first, as the deadline may cut off the rest."""
    backends = [
        backend for backend in available_backends(device)[0] if backend.name not in arguments.without.split(",")
    ]
    families = [family for family in FAMILIES.values() if arguments.family in ("", family.name)]
    sizes = SMALL if arguments.small else checks.SIZES
    n = 1 << 12 if arguments.small else None
    limits: dict[str, float] = {}

    def check(name, family, backend):
        return lambda: checks.CHECKS[name](family, backend, device, sizes) or []

    def measure():
        limits.update(timings.measured_limits(device, n))
        return [{"limit": name, "per_s": value} for name, value in limits.items()]

    def limit() -> dict[str, float]:
        return limits or (measure() and limits)  # another worker measured them

    def timed(workload):
        return lambda: list(timings.time_workload(workload, backends, device, limit(), n))

    def compiled(workload):
        return lambda: list(timings.time_compiled(workload, device, limit(), torch.compile, n))

    def check_packed():
        return packed.check(compiled_from(packed.SOURCE, device), device) or []

    def measure_atomics():
        return atomics.measure(compiled_from(atomics.SOURCE, device), device)

    def sanitize(tool, family):
        return lambda: sanitized(tool, family.name, arguments)

    listed = [
        Unit("check", name, family.name, backend.name, check(name, family, backend))
        for name, family, backend in checks.units(families, backends)
    ]
    kernels = [family for family in families if any(checks.is_kernel(backend, family) for backend in backends)]
    listed = [
        Unit("check", FIRST[0], "shared code", "NVRTC", check_packed),
        Unit("time", FIRST[1], "shared memory", "NVRTC", measure_atomics),
        *(unit for unit in listed if unit.name not in ALONE),
        *(
            Unit("sanitizer", tool, family.name, "every backend", sanitize(tool, family))
            for tool in SANITIZED
            for family in kernels
        ),
        Unit("time", "limits", "the device", "PyTorch", measure),
        *(Unit("time", "backends", workload.name, "every backend", timed(workload)) for workload in timings.WORKLOADS),
        Unit(
            "time",
            "pair",
            "8B shapes",
            "package",
            lambda: pair.measure(device, pair.SMALL if arguments.small else pair.LLAMA_8B),
        ),
        *(unit for unit in listed if unit.name in ALONE),
        *(
            Unit("time", "torch.compile", workload.name, "torch.compile", compiled(workload))
            for workload in timings.WORKLOADS
            if workload.fuses
        ),
    ]
    return [
        unit
        for unit in listed
        if (not arguments.only or unit.name in arguments.only.split(","))
        and unit.group in arguments.groups.split(",")
        and is_in_part(arguments.part, unit, [family.name for family in families])
    ]


def machine(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
        }
    else:
        about = {"name": platform.machine()}
    backends, missing = available_backends(device)
    served = {
        operator: dispatch.select_backend(OPERATORS[operator].family, device.type)
        for family in FAMILIES.values()
        for operator in family.operators
    }
    return {
        "machine": about
        | {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()},
        "backends": [backend.name for backend in backends],
        "missing": missing,
        "served_by": served,
        "compared_with": CPU.name,
    }


def gpu_is_lost(device: torch.device) -> bool:
    """Whether the GPU fails every call after an illegal access of a kernel."""
    try:
        torch.ones(1, device=device).item()
        torch.cuda.empty_cache()
    except Exception:
        return True
    return False


def run(unit: Unit, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yields the result of a unit. Exits the process if the GPU is lost."""
    start = time.monotonic()
    result: dict[str, Any] = {"status": "passed", "rows": [], "detail": ""}
    try:
        result["rows"] = unit.run()
    except graphs.NotCapturable as error:
        result |= {"status": NOT_CAPTURABLE, "detail": str(error)[:600]}
    except (checks.Inconclusive, torch.OutOfMemoryError) as error:
        result |= {"status": "inconclusive", "detail": str(error).splitlines()[0]}
    except Exception as error:  # the other units still run
        result |= {"status": "failed", "detail": f"{type(error).__name__}: {error}"[:600]}
    yield {**unit.title, **result, "seconds": round(time.monotonic() - start, 2)}
    if result["status"] != "passed" and gpu_is_lost(device):
        sys.exit(GPU_LOST)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--groups", default="check,sanitizer,time")
    parser.add_argument("--only", default="")
    parser.add_argument("--family", default="")
    parser.add_argument("--without", default="")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part", default="")
    parser.add_argument("--first", type=int, default=0, help="Index of the first unit to run.")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="Time limit of a process under the sanitizer, in seconds."
    )
    parser.add_argument("--until", type=float, default=math.inf, help="When this worker ends, by time.monotonic().")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = options()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.init()  # raises where there is no GPU, or its driver is older than torch's CUDA
        device = torch.device("cuda", torch.cuda.current_device())
    if "/" in arguments.part:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(arguments.part.split("/")[1])))
    units = plan(arguments, device)
    print(json.dumps({"plan": [unit.title for unit in units], **machine(device)}), flush=True)
    for unit in units[arguments.first :]:
        for line in run(unit, device):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
