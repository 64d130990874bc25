"""Instruction budgets: how many instructions of each class the loops of a kernel spend, in machine code for three GPUs.

A build with OPD_BUDGET replaces OPD_RARE code by a trap, so that the body of a loop is what ordinary coordinates
execute. A loop is the range of addresses that a backward branch closes, without the loops inside it.
"""

from __future__ import annotations

import collections
import functools
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.backends.cuda import machine_code
from tests.backends.cuda.fibers import ROOT, build_dir
from tests.backends.cuda.machine_code import NVCC, TARGETS

pytestmark = pytest.mark.skipif(
    NVCC is None or machine_code.tools() is None, reason="no nvcc, or no nvdisasm and cuobjdump"
)
CLASSES = {
    "shared atomics": r"ATOMS",
    "global atomics": r"RED(?!UX)|ATOMG|ATOM\b",
    "global loads": r"LDG|LD\b",
    "global stores": r"STG|ST\b",
    "shared loads": r"LDS",
    "shared stores": r"STS",
    "spills": r"LDL|STL",
    "warp": r"SHFL|VOTE|MATCH|REDUX",
    "quarter rate": r"MUFU|POPC|FLO|BREV|F2F|I2F|F2I|S2R\b",
    "fp64": r"D(FMA|ADD|MUL|SETP|MNMX)",
    "multiplier": r"IMAD|IDP",
    "fp32": r"F(FMA|ADD|MUL|SETP|MNMX|SEL|SET|CHK)|H",
    "integer": r"LOP3|IADD3|SHF|ISETP|VIADD|VIMNMX|IMNMX|PRMT|SEL|LEA|PLOP3|R2P|P2R|SGXT|BMSK|CS2R|MOV",
    "uniform": r"U|S2UR|R2UR",
    "control": r"BRA|BSSY|BSYNC|BAR|WARPSYNC|EXIT|NOP|YIELD|CALL|RET|BREAK|BPT|DEPBAR",
    "constants": r"LDC",
}
Instructions = collections.Counter[str]


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel and what it may spend.

    Attributes:
        kernel: The kernel.
        name: What one run of the loop does.
        selects: Whether a loop of the kernel is this one.
        instructions: The most instructions of all classes, for each of TARGETS.
        classes: The most instructions of a class, on every target.
    """

    kernel: str
    name: str
    selects: Callable[[Instructions], bool]
    instructions: Mapping[str, int]
    classes: Mapping[str, int]

    def __str__(self) -> str:
        return f"{self.kernel}, {self.name}"


LOOPS = (
    Loop(
        "delta_count_bf16",
        "a step of 16 coordinates",
        lambda loop: loop["global loads"] == 4 and loop["shared atomics"] == 16,
        {"sm_80": 311, "sm_90": 231, "sm_100": 231},
        {"shared stores": 16, "constants": 2, "spills": 0, "fp64": 0, "global atomics": 0},
    ),
    Loop(
        "delta_count_bf16",
        "a change",
        lambda loop: loop["shared atomics"] == 4 and loop["shared loads"] == 2,
        {"sm_80": 39, "sm_90": 40, "sm_100": 39},
        {"constants": 0, "spills": 0, "fp64": 0, "global atomics": 0},
    ),
    *(
        Loop(
            f"overlap_count_bf16_{n_runs}",
            "a step of 16 coordinates",
            lambda loop, n_runs=n_runs: loop["global loads"] == 2 * (n_runs + 1) and loop["shared atomics"] == 16,
            dict(zip(TARGETS, instructions, strict=True)),
            {"shared stores": 16, "spills": 0, "fp64": 0, "global atomics": 0},
        )
        for n_runs, instructions in ((2, (408, 300, 277)), (3, (461, 345, 337)), (4, (512, 386, 377)))
    ),
    *(
        Loop(
            f"overlap_count_bf16_{n_runs}",
            "a change",
            lambda loop, n_runs=n_runs: loop["shared atomics"] == n_runs + 1 and loop["shared loads"] == 1,
            dict(zip(TARGETS, instructions, strict=True)),
            {"constants": 0, "spills": 0, "fp64": 0, "global atomics": 0},
        )
        for n_runs, instructions in ((2, (25, 24, 24)), (3, (30, 29, 29)), (4, (35, 34, 34)))
    ),
    Loop(
        "quantile_count_2",
        "a step of 8 values",
        lambda loop: loop["global loads"] == 1 and loop["shared atomics"] == 8,
        {"sm_80": 51, "sm_90": 50, "sm_100": 54},
        {"constants": 0, "spills": 0, "fp64": 0, "global atomics": 0},
    ),
    Loop(
        "quantile_count_2",
        "a step of 8 values with a mask",
        lambda loop: loop["global loads"] == 2 and loop["shared atomics"] == 8,
        {"sm_80": 79, "sm_90": 75, "sm_100": 72},
        {"constants": 1, "spills": 0, "fp64": 0, "global atomics": 0},
    ),
    Loop(
        "quantile_count_4",
        "a step of 4 values with a mask",
        lambda loop: loop["global loads"] == 2 and loop["shared atomics"] == 4,
        {"sm_80": 64, "sm_90": 64, "sm_100": 64},
        {"constants": 1, "spills": 0, "fp64": 0, "global atomics": 0},
    ),
)


def class_of(instruction: str) -> str:
    name = re.sub(r"^@!?U?P\d+ ", "", instruction).split()[0]
    return next((kind for kind, pattern in CLASSES.items() if re.match(pattern, name)), name)


@functools.cache
def cubin(family: str, target: str) -> Path:
    """The machine code of a family without its rare code."""
    path = build_dir() / f"{family}-budget-{target}.cubin"
    command = [NVCC, "-std=c++17", "-O3", "--fmad=false", "-DOPD_BUDGET", f"-arch={target}", "-cubin"]
    subprocess.run([*command, str(ROOT / "csrc" / family / "cuda.cu"), "-o", str(path)], check=True)
    return path


def code_of(cubin: Path) -> dict[str, list[tuple[int, str]]]:
    """Addresses and instructions of every kernel; a branch names the address that it goes to."""
    parts = re.split(r"^\.text\.(\w+):$", machine_code.run_tool("nvdisasm", "-c", cubin), flags=re.MULTILINE)
    kernels = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        code: list[tuple[int, str]] = []
        labels: dict[str, int] = {}
        pending: list[str] = []
        for line in body.splitlines():
            if label := re.match(r"^(\.L_x_\d+):", line):
                pending.append(label[1])
            elif instruction := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
                address = int(instruction[1], 16)
                labels |= dict.fromkeys(pending, address)
                pending = []
                code.append((address, instruction[2]))

        def to_address(match: re.Match, labels: dict[str, int] = labels) -> str:
            return hex(labels.get(match[1], 1 << 40))

        kernels[name] = [(address, re.sub(r"`\((\.L_x_\d+)\)", to_address, text)) for address, text in code]
    return kernels


def loops_of(code: list[tuple[int, str]]) -> list[Instructions]:
    """The instructions of each loop by class."""
    ends: dict[int, int] = {}
    for address, instruction in code:
        branch = re.search(r"\bBRA\b(?!\.DIV).*?(0x[0-9a-f]+)$", instruction)
        if branch and (start := int(branch[1], 16)) < address:
            ends[start] = max(address, ends.get(start, 0))
    loops = []
    for start, end in sorted(ends.items()):
        inner = [(s, e) for s, e in ends.items() if (s, e) != (start, end) and start <= s and e <= end]
        outside_inner = [
            instruction
            for address, instruction in code
            if start <= address <= end and not any(s <= address <= e for s, e in inner)
        ]
        loops.append(collections.Counter(map(class_of, outside_inner)))
    return loops


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_loop_stays_within_its_budget(loop, target):
    loops = loops_of(code_of(cubin(loop.kernel.split("_")[0], target))[loop.kernel])
    (instructions,) = [found for found in loops if loop.selects(found)]
    assert instructions.total() <= loop.instructions[target], instructions
    for kind, most in loop.classes.items():
        assert instructions[kind] <= most, (kind, instructions)


def test_a_loop_is_counted_without_the_loops_inside_it():
    code = [
        (0x00, "MOV R1, RZ"),
        (0x10, "LDG.E.128 R4, [R2.64]"),
        (0x20, "ATOMS.POPC.INC.32 RZ, [R1+0x10]"),
        (0x30, "@P0 BRA 0x20"),
        (0x40, "IADD3 R1, R1, 1, RZ"),
        (0x50, "@!P1 BRA 0x10"),
        (0x60, "EXIT"),
    ]
    assert loops_of(code) == [
        {"global loads": 1, "integer": 1, "control": 1},
        {"shared atomics": 1, "control": 1},
    ]
