"""Fuzzes everything that reads files of users: `python -m tests.robustness.fuzz [--seconds N] [--scale F] [NAME ...]`.

Cases run in forked processes, so that a crash ends one process and is counted; a case that takes more than CASE_SECONDS
is ended by a signal and counted as a hang, one that takes more than CASE_BYTES of memory as an error. Every case is
given by its target and its number: --first N --scale 0 repeats case N alone.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from tests.robustness.targets import TARGETS, Check, Target

CASE_SECONDS = 20.0  # a case takes milliseconds; the limit allows for a busy machine
CASE_BYTES = 4 << 30
BATCH = 2_000  # cases per process
FIELDS = 3  # of the shared memory: the current case, accepted files, finished cases


class Finding(NamedTuple):
    """A case that failed, and how."""

    target: str
    case: int
    what: str


def run_case(check: Check, name: str, case: int) -> bool:
    """Runs one case. Raises any exception but the package's own errors."""
    return check(random.Random(f"{name}/{case}"))


def run_batch(check: Check, name: str, cases: range, shared: memoryview, errors: Path) -> None:
    """In a forked process: runs cases, each under a timer; an exception is written to `errors`."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + CASE_BYTES, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for case in cases:
        shared[0] = case
        signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
        try:
            shared[1] += run_case(check, name, case)
        except BaseException:
            signal.setitimer(signal.ITIMER_REAL, 0)
            with open(errors, "a") as file:
                file.write(f"{case}\t{traceback.format_exc()}\0")
        signal.setitimer(signal.ITIMER_REAL, 0)
        shared[2] += 1


def address_space() -> int:
    """Bytes of the address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def fuzz(name: str, target: Target, cases: range, seconds: float, workers: int) -> tuple[int, int, list[Finding]]:
    """Runs the cases of a target in forked processes.

    Args:
        name: Name of the target.
        target: The target.
        cases: Numbers of the cases.
        seconds: Time after which no further process is started.
        workers: Number of processes at once.

    Returns:
        Finished cases, accepted files, and the findings.
    """
    parent = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    checks, shared = [], []
    for worker in range(workers):
        folder = parent / str(worker)
        folder.mkdir()
        checks.append(target.make(folder))
        shared.append(memoryview(mmap.mmap(-1, 8 * FIELDS)).cast("q"))
    torch.set_num_threads(1)
    findings: list[Finding] = []
    running: dict[int, tuple[int, range]] = {}  # process: worker and cases
    waiting = [cases[i : i + BATCH] for i in range(0, len(cases), BATCH)]
    start = time.monotonic()
    while running or (waiting and time.monotonic() - start < seconds):
        free = set(range(workers)) - {worker for worker, _ in running.values()}
        while free and waiting and time.monotonic() - start < seconds:
            worker, batch = free.pop(), waiting.pop(0)
            process = os.fork()
            if process == 0:
                run_batch(checks[worker], name, batch, shared[worker], parent / f"{worker}.errors")
                os._exit(0)
            running[process] = worker, batch
        process, status = os.wait()
        worker, batch = running.pop(process)
        if status:
            case = shared[worker][0]
            hang = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
            how = f"a hang of more than {CASE_SECONDS:.0f} s" if hang else f"the process died, status {status}"
            findings.append(Finding(name, case, how))
            if rest := batch[batch.index(case) + 1 :]:
                waiting.insert(0, rest)
    for file in parent.glob("*.errors"):
        for entry in filter(None, file.read_text(errors="backslashreplace").split("\0")):
            case, _, text = entry.partition("\t")
            findings.append(Finding(name, int(case), text.strip()))
    finished, accepted = sum(fields[2] for fields in shared), sum(fields[1] for fields in shared)
    shutil.rmtree(parent)
    return finished, accepted, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"targets: {', '.join(TARGETS)}; all if not given")
    parser.add_argument("--seconds", type=float, default=3600, help="time limit of all targets together")
    parser.add_argument("--scale", type=float, default=1, help="fraction of the cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    names = options.names or list(TARGETS)
    stop = time.monotonic() + options.seconds
    total: list[Finding] = []
    for i, name in enumerate(names):
        target = TARGETS[name]
        cases = range(options.first, options.first + max(1, round(target.count * options.scale)))
        share = (stop - time.monotonic()) / (len(names) - i)  # what a target leaves, the next ones may use
        start = time.monotonic()
        finished, accepted, findings = fuzz(name, target, cases, share, options.workers)
        seconds = time.monotonic() - start
        rate = finished / max(seconds, 1e-9)
        print(
            f"{name}: {finished:,} of {len(cases):,} cases, {accepted:,} accepted, {len(findings)} failed,"
            f" {seconds:.0f} s, {rate:,.0f} per second",
            flush=True,
        )
        for finding in findings[:5]:
            print(f"  case {finding.case}: {finding.what[-1500:]}", flush=True)
        total += findings
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
