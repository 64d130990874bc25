"""Launches of the Triton launchers, recorded on tensors without data, and compiled for GPUs that the machine lacks."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opdkernels.backends.triton import launch
from tests.backends import summary

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = os.path.join(
    os.path.dirname(triton.__file__), "backends", "nvidia", "bin"
)  # Triton's wheel brings NVIDIA's disassembler
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    num_warps: int
    maxnreg: int | None
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def launches(monkeypatch, call: Callable[[], Any]) -> list[Launch]:
    """What a launcher starts, called where tensors on "cuda" have shapes, dtypes and strides only."""
    recorded = []

    def record(kernel, grid, *arguments, num_warps=8, maxnreg=None, **constants):
        recorded.append(Launch(kernel, grid, arguments, num_warps, maxnreg, constants))

    monkeypatch.setattr(launch, "run", record)
    monkeypatch.setattr(launch, "num_sms", lambda device: 132)
    with monkeypatch.context() as patched, FakeTensorMode():
        patched.setattr(torch.Tensor, "copy_", lambda self, other: self)  # needs the device
        call()
    return recorded


def signature_of(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        assert argument.device.type == "cuda"
        return POINTERS[argument.dtype]
    if isinstance(argument, (tuple, list)):
        return tuple(signature_of(a) for a in argument)
    if isinstance(argument, float):
        return "fp32"
    return "constexpr" if argument is None else "i64" if argument >= 2**31 else "i32"


def aligned(signature: Any, path: tuple[int, ...]) -> dict:
    """Pointers to what the allocator returns: multiples of 16."""
    if isinstance(signature, tuple):
        return {k: v for i, s in enumerate(signature) for k, v in aligned(s, (*path, i)).items()}
    return {path: [["tt.divisibility", 16]]} if signature.startswith("*") else {}


@dataclass
class Compiled:
    """Machine code of one launch for one GPU."""

    registers: int
    spills: int  # bytes of local memory moved, or instructions that move it
    wide_loads: int  # 16-byte loads from global memory
    asm: dict[str, Any]
    sass: str


def run_tool(name: str, *arguments: str) -> str:
    return subprocess.run([os.path.join(TOOLS, name), *arguments], capture_output=True, text=True, check=True).stdout


def compiled(one: Launch, target: str) -> Compiled:
    code = machine_code(one, target)
    family = one.kernel.fn.__module__.rsplit(".", 1)[-1].replace("numeric", "delta")  # whose sums it carries
    summary.COMPILED.append(
        summary.CompiledKernel(family, "Triton", target, code.registers, code.spills, code.wide_loads)
    )
    return code


def machine_code(one: Launch, target: str) -> Compiled:
    names = one.kernel.arg_names
    signature = {name: signature_of(argument) for name, argument in zip(names, one.arguments, strict=False)}
    constants = {**{n: None for n, s in signature.items() if s == "constexpr"}, **one.constants}
    signature = {name: signature.get(name, "constexpr") for name in names}
    attributes = {k: v for i, name in enumerate(names) for k, v in aligned(signature[name], (i,)).items()}
    gpu = TARGETS[target]
    options = launch.compile_options(one.num_warps, one.maxnreg, amd=gpu.backend == "hip")
    asm = triton.compile(ASTSource(one.kernel, signature, constants, attributes), target=gpu, options=options).asm
    if gpu.backend == "hip":
        code = asm["amdgcn"]

        def number(field):
            return int(re.search(rf"\.{field}:\s+(\d+)", code).group(1))

        spills = number("vgpr_spill_count") + number("private_segment_fixed_size")
        return Compiled(number("vgpr_count"), spills, len(re.findall(r"global_load_dwordx4", code)), asm, code)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, sass = run_tool("cuobjdump", "-res-usage", file.name), run_tool("nvdisasm", file.name)
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    return Compiled(
        registers, len(re.findall(r"\b(?:STL|LDL)\b", sass)), len(re.findall(r"\bLDG\.E\.128", sass)), asm, sass
    )


def assert_fits(code: Compiled, registers: int) -> None:
    assert code.spills == 0, f"{code.spills} spills"
    assert code.registers <= registers, f"{code.registers} registers"


def assert_rounds_as_the_reference(code: Compiled) -> None:
    """No product is fused with a sum, nothing is reordered, subnormals are kept."""
    assert not re.search(r"llvm\.(?:fma|fmuladd)|\b(?:fast|contract|reassoc)\b", code.asm["llir"])
    assert ".ftz" not in code.asm.get("ptx", "")


def assert_64_bit_offsets(code: Compiled, element: str) -> None:
    """Addresses of elements are a pointer and 64 bits."""
    offsets = re.findall(
        rf"tt\.addptr .*: tensor<(?:\d+x)+!tt\.ptr<{element}>>, tensor<(?:\d+x)+i(\d+)>", code.asm["ttir"]
    )
    assert offsets
    assert set(offsets) == {"64"}


def assert_each_byte_is_read_once(code: Compiled, one: Launch, tile_bytes: int) -> None:
    """A tile's loads are 16 bytes wide, and as many as its bytes need. (AMD's wide loads are of other things too.)"""
    loads, needed = code.wide_loads, tile_bytes // (16 * 32 * one.num_warps)
    assert loads == needed if "ptx" in code.asm else loads >= needed
