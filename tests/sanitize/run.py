"""`make sanitize`: the tests of kernels and optimizers under AddressSanitizer and UndefinedBehaviorSanitizer, and the
threaded kernels under ThreadSanitizer.

The extension is built again with g++'s sanitizers, in a copy of the package; any report ends the process that it
concerns with an error. ThreadSanitizer does not know the synchronization of OpenMP's runtime, so that the kernels are
compiled with std::thread (csrc/common/cpu/parallel.h) into a separate program, threads.cpp.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("opdkernels", "csrc", "tests", "benchmarks", "docs", "examples")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile", "CHANGELOG.md")
TESTS = ("tests/ops", "tests/optim")
NOT_IN_EXTENSION = ("--ignore-glob=*_cuda.py", "--ignore-glob=*_triton.py")  # kernels that g++ does not compile into it


def runtime(library: str) -> str:
    """The path of a runtime library of the compiler."""
    return subprocess.run(
        ["g++", f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def address_and_undefined(work: Path, tests: list[str]) -> int:
    """Run tests with an instrumented extension. Returns pytest's exit status."""
    for name in COPIED:
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, work / name)
    environment = {**os.environ, "OPDKERNELS_SANITIZERS": "address,undefined", "OPDKERNELS_REQUIRE_C": "1"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "-j", "2"], cwd=work, env=environment, check=True
    )
    environment |= {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        # The interpreter itself does not free everything at its end.
        # An allocation records few frames: most are Python's.
        "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=4:quarantine_size_mb=64",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(work),
    }
    # Reports are written to the file descriptor of the standard error, which pytest leaves alone with --capture=sys.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-n", "2", "-p", "no:benchmark", "--capture=sys"]
    return subprocess.run([*command, *NOT_IN_EXTENSION, *tests], cwd=work, env=environment).returncode


def threads(work: Path) -> int:
    """Compile and run threads.cpp under ThreadSanitizer. Returns its exit status."""
    work.mkdir(parents=True, exist_ok=True)
    isa_flags = runpy.run_path(str(ROOT / "setup.py"))["ISA_FLAGS"]
    flags = ["-std=c++17", "-O1", "-g1", "-fsanitize=thread", "-DOPD_STD_THREADS", "-ffp-contract=off", "-pthread"]
    sources = [Path(__file__).with_name("threads.cpp"), *sorted((ROOT / "csrc").glob("*/cpu.cpp"))]
    sources += sorted((ROOT / "csrc/common/cpu").glob("*.cpp"))
    objects = []
    for source in sources:
        objects.append(work / f"{source.parent.name}_{source.stem}.o")
        command = ["g++", *flags, *isa_flags.get(source.stem, []), "-c", source, "-o", objects[-1]]
        subprocess.run(command, check=True)
    program = work / "threads"
    subprocess.run(["g++", *flags, *objects, "-o", program], check=True)
    # Without randomized addresses, which the runtime of older compilers cannot map around.
    command, environment = ["setarch", "-R", program], {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    if not subprocess.run([*command, "race"], env=environment, capture_output=True).returncode:
        print("ThreadSanitizer does not report a race that there is")
        return 1
    return subprocess.run(command, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("address", "thread"), help="one half")
    parser.add_argument("tests", nargs="*", default=list(TESTS))
    options = parser.parse_args()
    work = ROOT / "build" / "sanitize"
    shutil.rmtree(work, ignore_errors=True)
    failed = 0
    for name, run in (
        ("thread", lambda: threads(work / "threads")),
        ("address", lambda: address_and_undefined(work / "address", options.tests)),
    ):
        if options.only in (None, name):
            start = time.monotonic()
            status = run()
            print(f"{name}: {'clean' if not status else f'exit status {status}'}, {time.monotonic() - start:.0f} s")
            failed |= status
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
