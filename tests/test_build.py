"""What is built: sources that compile without warnings of ours, for arm64 too, and only what a CPU offers runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ISAS

ROOT = Path(__file__).parent.parent
ARM = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
]

# Counts a pair of 3,000 coordinates and prints the tally; compiled for this machine and for arm64.
PROGRAM = r"""
#include <cstdio>
#include <cstring>
#include "csrc/common/cpu/dispatch.h"
#include "csrc/delta/cpu.h"
int main() {
  static opd_u16 w[3000], v[3000];
  static float x[3000], y[3000];
  unsigned seed = 1;
  for (int i = 0; i < 3000; i++) {
    seed = seed * 1664525u + 1013904223u;
    w[i] = (opd_u16)(seed >> 16);
    v[i] = (opd_u16)(w[i] + (seed & 7 ? 0 : seed >> 12 & 3));
    x[i] = bf16_to_float(w[i]) * 1.0009f;
    y[i] = bf16_to_float(v[i]) * 1.0011f;
  }
  DeltaOptions options = {{0, 0x3727, 0x3728, 0x7FFF}, 3, {1e-8, 1e-7, 1e-6, 1e-5, 1e-4}};
  static int64_t tables[8 * OPD_BINS], counts[49], sums[4 * OPD_SUM_LIMBS];
  double maximum = 0;
  delta(w, BF16, v, BF16, 3000, options, 1, tables, counts, sums, &maximum, nullptr);
  delta(x, FP32, y, FP32, 3000, options, 1, tables, counts, sums, &maximum, nullptr);
  unsigned long long digest = 1469598103934665603ull;
  auto add = [&](const void* data, size_t n) {
    const unsigned char* bytes = (const unsigned char*)data;
    for (size_t i = 0; i < n; i++) digest = (digest ^ bytes[i]) * 1099511628211ull;
  };
  add(tables, sizeof tables); add(counts, sizeof counts); add(sums, sizeof sums); add(&maximum, sizeof maximum);
  std::printf("%s %llx %lld\n", current_isa().c_str(), digest, (long long)counts[1]);
}
"""


def compile_program(compiler: str, folder: Path, x86: bool) -> Path:
    program = folder / "program.cpp"
    program.write_text(PROGRAM)
    sources = [
        p
        for p in [*(ROOT / "csrc/common/cpu").glob("*.cpp"), *(ROOT / "csrc").glob("*/cpu.cpp")]
        if x86 or p.stem not in ("isa_avx2", "isa_avx512")
    ]
    out = folder / "program"
    plain = [str(p) for p in sources if p.stem not in ("isa_avx2", "isa_avx512")]
    objects = []
    if x86:
        for name, flags in isa_flags().items():
            objects.append(str(folder / f"{name}.o"))
            subprocess.run(
                [
                    compiler,
                    *FLAGS,
                    "-Wno-maybe-uninitialized",
                    *flags,
                    "-c",
                    str(ROOT / f"csrc/common/cpu/{name}.cpp"),
                    "-o",
                    objects[-1],
                ],
                check=True,
            )
    subprocess.run(
        [compiler, *FLAGS, "-I", str(ROOT), str(program), *plain, *objects, "-static", "-pthread", "-o", str(out)],
        check=True,
    )
    return out


def isa_flags() -> dict[str, list[str]]:
    """ISA_FLAGS of setup.py, read without running it."""
    import ast

    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ISA_FLAGS":
            return eval(compile(ast.Expression(node.value), "setup.py", "eval"))
    raise AssertionError("setup.py has no ISA_FLAGS")


@pytest.mark.skipif(ARM is None, reason="no arm64 cross compiler (aarch64-linux-gnu-g++)")
def test_arm64_counts_the_same(tmp_path):
    (tmp_path / "arm").mkdir()
    arm = compile_program(ARM, tmp_path / "arm", x86=False)
    if EMULATOR is None or ("avx512" not in ISAS and "avx2" not in ISAS):
        return  # it compiles without a warning; nothing here runs it
    (tmp_path / "here").mkdir()
    here = compile_program(shutil.which("g++"), tmp_path / "here", x86=True)
    there = subprocess.run([EMULATOR, str(arm)], capture_output=True, text=True, check=True).stdout.split()
    assert there[0] == "baseline"
    for isa in ISAS:
        result = subprocess.run(
            [str(here)], capture_output=True, text=True, check=True, env={**os.environ, "OPDKERNELS_ISA": isa}
        ).stdout.split()
        assert result == [isa, *there[1:]]


@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
def test_an_instruction_set_that_is_not_there_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "from opdkernels import native; native.current_isa()"],
        env={**os.environ, "OPDKERNELS_ISA": "avx9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "instruction set avx9 is not available here; choose one of baseline" in done.stderr


def test_failing_nvcc_does_not_fail_the_installation(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho no license >&2\nexit 1\n")
    nvcc.chmod(0o755)
    build = (
        "import pathlib, sys; sys.path.insert(0, '.'); import setup; "
        "setup.build_cuda_if_possible(pathlib.Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path / "_cuda.so")],
        cwd=ROOT,
        env={**os.environ, "CUDA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "opdkernels: no CUDA kernels, NVRTC or Triton will serve" in done.stderr
    assert not (tmp_path / "_cuda.so").exists()
