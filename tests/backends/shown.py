"""What the tests of kernels for GPUs have shown in this process: `tests/conftest.py` lists it, a line a family, at the end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

NEGATIVE = ("caught", "refused")  # in the name of a test that spoils a kernel


@dataclass(frozen=True)
class Code:
    """A kernel compiled for one GPU. wide_loads: of 16 bytes."""

    family: str
    compiler: str
    target: str
    registers: int
    spills: int
    wide_loads: int


CODE: list[Code] = []
INTERPRETED: Counter[str] = Counter()  # tests passed in Triton's interpreter, by family


def compiled_line(compiler: str, code: list[Code]) -> str:
    targets = ", ".join(dict.fromkeys(one.target for one in code))
    widest = "16-byte loads" if any(one.wide_loads for one in code) else "no 16-byte loads"
    spills = sum(one.spills for one in code)
    return f"{compiler} for {targets}: at most {max(one.registers for one in code)} registers, {spills or 'no'} spills, {widest}"


def lines(passed: Iterable[str]) -> list[str]:
    """One a family of which something was shown; `passed` are the ids of the tests that passed."""
    fibers, negative = Counter[str](), Counter[str]()
    for test in passed:
        if found := re.match(r"tests/ops/\w+/test_(\w+)_cuda\.py::(\w+)", test):
            (negative if any(word in found[2] for word in NEGATIVE) else fibers)[found[1]] += 1
    families = dict.fromkeys([*INTERPRETED, *(one.family for one in CODE)])
    said = []
    for family in families:
        parts = [f"{INTERPRETED[family]} tests in Triton's interpreter"] if INTERPRETED[family] else []
        for compiler in dict.fromkeys(one.compiler for one in CODE):
            mine = [one for one in CODE if (one.family, one.compiler) == (family, compiler)]
            parts += [compiled_line(compiler, mine)] if mine else []
        parts += [f"{fibers[family]} tests of CUDA C++ on fibers"] if fibers[family] else []
        parts += [f"{negative[family]} of spoilt kernels"] if negative[family] else []
        said.append(f"{family}: {'; '.join(parts)}")
    return said
