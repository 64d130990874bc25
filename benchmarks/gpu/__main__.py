"""Checks and measures the kernels on a GPU. Needs torch and NumPy; uses Triton, CuPy and nvcc where installed.

    python3 -m benchmarks.gpu            # builds, checks, measures; under eight minutes
    python3 -m benchmarks.gpu --tests    # only the checks
    python3 -m benchmarks.gpu --bench    # only the measurements

Prints a table and writes one JSON file. Exit status: 0 if every check that ran passed, 1 if one failed, 4 if there is
no GPU. Checks that the deadline does not reach are reported as not reached.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu import build, record

DEADLINE_S = 450.0
PARALLEL_FRACTION = 0.6  # of the time, for checks and compute-sanitizer; measurements have the rest
TESTS_FRACTION = 0.8  # the same without measurements; checks that run alone have the rest
UNIT_LIMIT_S = 120.0  # a unit that takes longer is stuck
GROUPS = {"tests": "check,sanitizer", "bench": "time"}
MAX_RESTARTS = 24  # of workers that crashed
GPU_LOST = 3  # exit status, as in benchmarks/gpu/worker.py, which imports torch
JOBS = max(
    1, min(7, (os.cpu_count() or 1) // 2)
)  # processes that check different families; most of the time is compilation


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


BEGAN = time.monotonic()


def exit_reason(status: int) -> str:
    return f"the process ended with status {status}"


def follow(process: subprocess.Popen, seconds: Callable[[], float], take: Callable[[dict], None]) -> str:
    """Passes each line of JSON that a process prints to `take`; kills the process if no line comes for `seconds()`.

    Returns why the process stopped, or "" if it finished.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(seconds(), 0.01))
        except queue.Empty:
            process.kill()
            process.wait()
            return "stuck" if seconds() >= UNIT_LIMIT_S else "late"
        if line is None:
            status = process.wait()
            return "" if status == 0 else exit_reason(status)
        if line.startswith("{"):
            take(json.loads(line))


class Results:
    """Results of the workers so far: the machine, the plan, and a result for each unit that has run."""

    def __init__(self) -> None:
        self.about: dict[str, Any] = {}
        self.plan: list[dict[str, Any]] = []
        self.done: list[dict[str, Any]] = []

    def take(self, line: dict[str, Any]) -> None:
        if "plan" in line:
            self.plan = line.pop("plan")
            self.about = line
            return
        self.done.append(line)
        what = f"{line['name']} of {line['workload']} by {line['backend']}".replace("_", " ")
        say(f"{what}: {line['status']}{', ' + line['detail'] if line['detail'] else ''} ({line['seconds']:.1f} s)")

    def fail_next(self, why: str) -> None:
        self.take({**self.plan[len(self.done)], "status": "failed", "rows": [], "detail": why, "seconds": 0.0})

    def join(self, others: list[Results]) -> None:
        for other in others:
            self.about = self.about or other.about
            self.plan += other.plan
            self.done += other.finish()["units"]

    def finish(self) -> dict[str, Any]:
        late = [
            {**unit, "status": "not reached", "rows": [], "detail": "", "seconds": 0.0}
            for unit in self.plan[len(self.done) :]
        ]
        return {**self.about, "units": [*self.done, *late]}


def supervise(command: list[str], deadline: float, results: Results) -> str:
    """Runs workers, a new one after each crash, until all units are done or the deadline passes.

    Returns why no unit could start, or "".
    """
    for _ in range(MAX_RESTARTS):
        process = subprocess.Popen(
            [*command, "--first", str(len(results.done)), "--until", str(deadline)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=build.ROOT,
            env={
                "OMP_WAIT_POLICY": "PASSIVE",
                **os.environ,
            },  # expected outputs are computed on the CPU, which other processes use too
        )
        stderr: list[str] = []
        threading.Thread(
            target=lambda process=process, stderr=stderr: stderr.extend(process.stderr), daemon=True
        ).start()
        why = follow(process, lambda: min(UNIT_LIMIT_S, deadline - time.monotonic()), results.take)
        if not results.about:
            return (stderr[-1].strip() if stderr else why) or "nothing was planned"
        if not why or time.monotonic() >= deadline or len(results.done) >= len(results.plan):
            break
        if why != exit_reason(GPU_LOST):  # a worker without its GPU has reported its unit
            results.fail_next(why)
    return ""


def supervise_parallel(command: list[str], jobs: int, deadline: float) -> tuple[Results, str]:
    """As `supervise`, with several processes at a time."""
    parts = [Results() for _ in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        why = pool.map(lambda i: supervise([*command, "--part", f"{i}/{jobs}"], deadline, parts[i]), range(jobs))
    results = Results()
    results.join(parts)
    return results, next(filter(None, why), "")


def run_phases(command: list[str], jobs: int, deadline: float, with_measurements: bool) -> tuple[Results, str]:
    """All units in one process; with several jobs, the first ones, then checks in parallel, then the rest.

    Returns the results, and why units did not start, or "".
    """
    results = Results()
    if jobs == 1:
        return results, supervise(command, deadline, results)
    first = Results()
    why = supervise([*command, "--part", "first"], deadline, first)
    results.join([first])
    if not results.about:
        return results, why
    now = time.monotonic()
    parallel_deadline = now + (PARALLEL_FRACTION if with_measurements else TESTS_FRACTION) * (deadline - now)
    checked, why = supervise_parallel(command, jobs, parallel_deadline)
    results.join([checked])
    if not results.about:
        return results, why
    rest = Results()
    late = supervise([*command, "--part", "alone"], deadline, rest)
    results.join([rest])
    return results, "; ".join(filter(None, (why, late and f"units that run alone: {late}")))


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tests", action="store_true", help="only the checks")
    parser.add_argument("--bench", action="store_true", help="only the measurements")
    parser.add_argument(
        "--deadline", type=float, default=DEADLINE_S, metavar="S", help="time limit in seconds (%(default).0f)"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to test the command itself")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the JSON file")
    parser.add_argument("--small", action="store_true", help="small inputs, to test the command itself")
    parser.add_argument(
        "--jobs",
        type=int,
        default=JOBS,
        metavar="N",
        help="processes that run checks in parallel (default: %(default)d); measurements run alone",
    )
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    parser.add_argument("--no-build", action="store_true", help="use the existing build")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = options(arguments)
    deadline = BEGAN + chosen.deadline if arguments is None else time.monotonic() + chosen.deadline
    if not chosen.no_build:
        build.build(say, deadline - time.monotonic())
    groups = [GROUPS[name] for name in GROUPS if getattr(chosen, name)] or list(GROUPS.values())
    command = [sys.executable, "-m", "benchmarks.gpu.worker", "--device", chosen.device]
    command += [*(["--small"] if chosen.small else []), *(["--only", chosen.only] if chosen.only else [])]
    jobs = chosen.jobs if GROUPS["tests"] in groups else 1
    results, why = run_phases([*command, "--groups", ",".join(groups)], jobs, deadline, len(groups) > 1)
    if not results.about:
        print(
            f"nothing was checked on {chosen.device}: {why}; see `nvidia-smi`, and `python3 -m opdkernels doctor`",
            file=sys.stderr,
        )
        return 4
    report = results.finish()
    path = record.write(chosen.out, report)
    print(f"\n{record.table(report)}\n")
    for reason in report["missing"]:
        print(f"unavailable: {reason}")
    if why:
        print(f"not reached: {why}")
    failed = [unit for unit in report["units"] if unit["status"] == "failed"]
    for unit in failed:
        print(f"failed: {unit['name']} of {unit['workload']} by {unit['backend']}: {unit['detail']}")
    counts = {status: sum(unit["status"] == status for unit in report["units"]) for status in record.MARKS}
    print(f"{', '.join(f'{count} {status}' for status, count in counts.items() if count)}; written to {path}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
