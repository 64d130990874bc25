"""Launches of the Triton launchers, recorded on tensors without data, and compiled for GPUs that the machine lacks."""

from __future__ import annotations

import functools
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
        patched.setattr(torch.Tensor, "copy_", lambda self, other: self)  # a copy would need the device
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

    asm: dict[str, Any]

    @property
    def is_amd(self) -> bool:
        return "amdgcn" in self.asm

    @functools.cached_property
    def sass(self) -> str:
        """Instructions. Disassembling takes longer than most compilations, so it is done only where it is looked at."""
        return self.asm["amdgcn"] if self.is_amd else run_tool("nvdisasm", self.asm["cubin"])

    @functools.cached_property
    def usage(self) -> dict[str, int]:
        """Resources by the names that AMD's metadata and cuobjdump give them."""
        if self.is_amd:
            return {name: int(size) for name, size in re.findall(r"\.(\w+):\s+(\d+)\s*$", self.sass, re.M)}
        text = run_tool("cuobjdump", self.asm["cubin"], "-res-usage")
        return {name: int(size) for name, size in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}

    @property
    def registers(self) -> int:
        return self.usage["vgpr_count" if self.is_amd else "REG"]

    @property
    def spills(self) -> int:
        """Bytes of local memory that are moved, or instructions that move it; 0 without a stack."""
        if self.is_amd:
            return self.usage["vgpr_spill_count"] + self.usage["private_segment_fixed_size"]
        uses_memory = self.usage["STACK"] or self.usage["LOCAL"]
        return len(re.findall(r"\b(?:STL|LDL)\b", self.sass)) if uses_memory else 0

    @property
    def wide_loads(self) -> int:
        """16-byte loads from global memory."""
        return len(re.findall(r"global_load_dwordx4" if self.is_amd else r"\bLDG\.E\.128", self.sass))


def run_tool(name: str, cubin: bytes, *options: str) -> str:
    """What one of NVIDIA's tools prints about machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.path.join(TOOLS, name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compiled(one: Launch, target: str) -> Compiled:
    code = machine_code(one, target)
    package, module = one.kernel.fn.__module__.rsplit(".", 1)
    # backends/triton/numeric.py carries the sums of delta
    family = package.rsplit(".", 1)[-1] if module == "triton" else "delta"
    assembly = code.asm["amdgcn" if code.is_amd else "ptx"]
    has_wide_loads = bool(re.search(r"global_load_dwordx4|\bld\.global[\w.:]*\.(?:v4\.\w32|v2\.\w64)\b", assembly))
    summary.COMPILED.append(
        summary.CompiledKernel(family, "Triton", target, code.registers, code.spills, int(has_wide_loads))
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
    return Compiled(asm)


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
