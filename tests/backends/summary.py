"""Summarizes what the tests of GPU kernels covered, one line per family; tests/conftest.py prints it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

BROKEN_KERNEL_WORD = "detected"  # in the name of a test that breaks a kernel


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel compiled for one GPU; `wide_loads` counts 16-byte loads."""

    family: str
    compiler: str
    target: str
    registers: int
    spills: int
    wide_loads: int


COMPILED: list[CompiledKernel] = []
INTERPRETED: Counter[str] = Counter()  # tests passed in Triton's interpreter, by family


def to_builtins() -> dict[str, Any]:
    """What this process has recorded, as values that can be sent to another one."""
    return {"compiled": [list(astuple(kernel)) for kernel in COMPILED], "interpreted": dict(INTERPRETED)}


def add(recorded: dict[str, Any]) -> None:
    """Add what another process has recorded, from `to_builtins`."""
    COMPILED.extend(CompiledKernel(*fields) for fields in recorded["compiled"])
    INTERPRETED.update(recorded["interpreted"])


def compiler_line(compiler: str, kernels: list[CompiledKernel]) -> str:
    targets = ", ".join(dict.fromkeys(kernel.target for kernel in kernels))
    registers, spills = max(kernel.registers for kernel in kernels), sum(kernel.spills for kernel in kernels)
    loads = "16-byte loads" if any(kernel.wide_loads for kernel in kernels) else "no 16-byte loads"
    return f"{compiler} for {targets}: at most {registers} registers, {spills or 'no'} spills, {loads}"


def summary_lines(passed: Iterable[str]) -> list[str]:
    """One line per family with results; `passed` are the ids of the tests that passed."""
    on_fibers, broken = Counter[str](), Counter[str]()
    for test in passed:
        if match := re.match(r"tests/ops/\w+/test_(\w+)_cuda\.py::(\w+)", test):
            (broken if BROKEN_KERNEL_WORD in match[2] else on_fibers)[match[1]] += 1
    lines = []
    for family in dict.fromkeys([*INTERPRETED, *(kernel.family for kernel in COMPILED)]):
        parts = [f"{INTERPRETED[family]} tests in Triton's interpreter"] if INTERPRETED[family] else []
        for compiler in dict.fromkeys(kernel.compiler for kernel in COMPILED):
            kernels = [kernel for kernel in COMPILED if (kernel.family, kernel.compiler) == (family, compiler)]
            parts += [compiler_line(compiler, kernels)] if kernels else []
        parts += [f"{on_fibers[family]} tests of CUDA C++ on fibers"] if on_fibers[family] else []
        parts += [f"{broken[family]} of broken kernels"] if broken[family] else []
        lines.append(f"{family}: {'; '.join(parts)}")
    return lines
