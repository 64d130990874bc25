"""`make dist`: the source archive and a wheel for each processor that has a compiler here, in dist/.

    python -m tools.dist [--python python3.12 ...] [--with-torch]

The kernels are called through ctypes, so that a wheel serves every version of Python. auditwheel checks it and names
the oldest glibc that it runs on, which is that of this machine or somewhat older: run this in a manylinux container
for wheels that others install. Then it is installed into a new environment for each Python that is found, and its
kernels are called there. libgomp is left to the system, or to torch, which carries it: two copies would be two pools
of threads.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CROSS_COMPILERS = {"x86_64": "x86_64-linux-gnu-g++", "aarch64": "aarch64-linux-gnu-g++"}
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
MAX_WHEEL_BYTES = 20 << 20

# What runs in each new environment. Without torch, the library alone: what it reports, and its refusal of bad input.
CHECK_KERNELS = """
import opdkernels
from opdkernels import native
assert native.available_isas()[0] == "baseline" and native.current_isa() in native.available_isas()
count = native.declare("opd_patch_digest", native.PTR, native.INT, native.INT, native.INT, native.PTR)
try:
    count(0, 3, 1, 1, 0)
except ValueError as error:
    assert "1, 2, 4 or 8 bytes" in str(error)
else:
    raise AssertionError("an element of three bytes was accepted")
print(opdkernels.__version__, native.compiler, ",".join(native.available_isas()))
"""
CHECK_TORCH = """
import torch
from opdkernels.backends import cpu, dispatch
from opdkernels.ops.delta import delta
assert dispatch.select_backend("delta", "cpu") == "cpu", cpu.unavailable_reason()
base = torch.randn(100_000).bfloat16()
trained = base.clone()
trained[::7] *= 2
tally = delta(base, trained)
assert tally.numel == 100_000 and tally.bit_equal == int((base == trained).sum())
print("torch", torch.__version__)
"""


def run(*command: object, **options: object) -> str:
    """Runs a command and returns its output. Raises SystemExit with its error."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def build_sdist(out: Path) -> Path:
    """Builds the source archive and returns it, unpacked into a folder next to it."""
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT)
    (archive,) = out.glob("*.tar.gz")
    folder = out / "unpacked"
    shutil.unpack_archive(archive, folder)
    (source,) = folder.iterdir()
    return source


def compiler(machine: str) -> str | None:
    """The C++ compiler for a processor, or None."""
    return shutil.which("g++" if machine == platform.machine() else CROSS_COMPILERS[machine])


def build_wheel(source: Path, machine: str, out: Path) -> Path:
    """Builds the wheel for a processor from the unpacked source archive and returns the audited one."""
    cxx = compiler(machine)
    environment = {
        **os.environ,
        "CC": str(cxx),
        "CXX": str(cxx),
        "LDSHARED": f"{cxx} -shared",
        "LDCXXSHARED": f"{cxx} -shared",
        "OPDKERNELS_REQUIRE_C": "1",
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
    }
    if machine != platform.machine():
        environment["OPDKERNELS_NO_CUDA"] = "1"  # nvcc compiles for the processor that it runs on
    shutil.rmtree(source / "build", ignore_errors=True)
    for library in source.rglob("*.so"):
        library.unlink()
    raw = out / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", raw, source, env=environment)
    (wheel,) = raw.glob("*.whl")
    before = set(out.glob("*.whl"))
    audit = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", out, wheel]
    run(*audit, env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    (audited,) = set(out.glob("*.whl")) - before
    return audited


def check_wheel(wheel: Path, machine: str) -> None:
    """Raises SystemExit for a wheel of another tag, without kernels, or too large."""
    if not re.search(rf"-py3-none-manylinux_\d+_\d+_{machine}[.]", wheel.name):
        raise SystemExit(f"{wheel.name} is not tagged py3-none-manylinux for {machine}")
    names = run(sys.executable, "-m", "zipfile", "-l", wheel)
    if "opdkernels/_cpu.so" not in names:
        raise SystemExit(f"{wheel.name} has no compiled kernels")
    if wheel.stat().st_size > MAX_WHEEL_BYTES:
        raise SystemExit(f"{wheel.name} has {wheel.stat().st_size} bytes, more than {MAX_WHEEL_BYTES}")


def check_installed(wheel: Path, python: str, work: Path, with_torch: bool) -> str:
    """Installs a wheel into a new environment and calls its kernels. Returns what the check printed."""
    environment = work / f"venv-{Path(python).name}"
    run(python, "-m", "venv", environment)
    installed = environment / "bin" / "python"
    if with_torch:
        run(installed, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel)
    else:
        run(installed, "-m", "pip", "install", "-q", "--no-deps", wheel)
    text = run(installed, "-c", CHECK_KERNELS, cwd=work)
    if with_torch:
        text += run(installed, "-c", CHECK_TORCH, cwd=work)
    shutil.rmtree(environment)
    return " ".join(text.split())


def found_pythons() -> list[str]:
    """The Pythons of PYTHONS that are on the path and run; pyenv puts one there for versions that it does not use."""
    paths = filter(None, (shutil.which(f"python{version}") for version in PYTHONS))
    return [path for path in paths if runs(path)]


def runs(python: str) -> bool:
    """Whether an executable is a Python that runs."""
    try:
        return subprocess.run([python, "-c", ""], capture_output=True, check=False, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder that is replaced")
    parser.add_argument("--python", nargs="*", default=found_pythons(), help="Pythons that the wheel is installed for")
    parser.add_argument(
        "--with-torch", action="store_true", help="install the dependencies, and run a kernel on tensors"
    )
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = build_sdist(work)
        for archive in work.glob("*.tar.gz"):
            shutil.copy(archive, options.out)
            print(archive.name)
        for machine in CROSS_COMPILERS:
            if compiler(machine) is None:
                print(f"no wheel for {machine}: {CROSS_COMPILERS[machine]} is missing")
                continue
            wheel = build_wheel(source, machine, work)
            check_wheel(wheel, machine)
            shutil.copy(wheel, options.out)
            print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
            if machine != platform.machine():
                print(f"  not run: this machine is {platform.machine()}")
                continue
            for python in options.python:
                print(f"  {python}: {check_installed(wheel, python, work, options.with_torch)}")
            missing = [version for version in PYTHONS if not any(version in path for path in options.python)]
            if missing:
                print(f"  not installed for Python {', '.join(missing)}: not on the path, or not given")


if __name__ == "__main__":
    main()
