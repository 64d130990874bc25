"""Machine code for GPUs that the machine lacks: of the installed library, and of NVRTC from the same sources."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from opdkernels.backends.cuda import launch
from opdkernels.backends.cuda.sources import family_source, is_built_from_sources
from tests.backends import summary
from tests.backends.cuda.fibers import ROOT, build_dir

TARGETS = ("sm_80", "sm_90", "sm_100")
NVCC = shutil.which("nvcc")
WIDE_LOAD = r"\bLDG\.E\.(?:\w+\.)*128\b"
SPILL = r"\b(?:STL|LDL)\b"
FMA = r"\b[FDH]FMA\b"  # HFMA2 only moves constants
# PTX that an assembler may fuse, that flushes subnormals, or that is not correctly rounded.
UNROUNDED = r"\b(?:add|sub|mul)\.f(?:32|64)\b|\.ftz\b|\.approx\b"


def tools() -> Path | None:
    """NVIDIA's disassembler and its companion: the toolkit may lack them, Triton's wheel brings them."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(spec.origin).parent / "backends" / "nvidia" / "bin"] if spec and spec.origin else []
    on_path = shutil.which("nvdisasm")
    folders += [Path(on_path).parent] if on_path else []
    return next((f for f in folders if (f / "nvdisasm").is_file() and (f / "cuobjdump").is_file()), None)


def nvrtc() -> ctypes.CDLL | None:
    """NVRTC of a wheel, which needs its built-in functions loaded, or of the system."""
    for place in sys.path:
        for library in Path(place or ".").glob("nvidia/**/libnvrtc.so.*"):
            if "alt" in library.name:
                continue
            for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(library))
    try:
        return ctypes.CDLL("libnvrtc.so")
    except OSError:
        return None


@functools.cache
def library() -> Path:
    """The installed library, or a new build if the sources have changed since."""
    if is_built_from_sources(launch.LIBRARY):
        return launch.LIBRARY
    path = build_dir() / "_cuda.so"
    build = "import sys; sys.path.insert(0, '.'); import setup; setup.build_cuda(sys.argv[1], sys.argv[2])"
    subprocess.run([sys.executable, "-c", build, str(NVCC), str(path)], cwd=ROOT, check=True)
    return path


@dataclass(frozen=True)
class Code:
    """A kernel for one GPU."""

    registers: int
    stack_bytes: int
    sass: str

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))


def run_tool(name: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    place = tools()
    assert place
    return subprocess.run(
        [str(place / name), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout


def kernels_of(cubin: Path) -> dict[str, Code]:
    usage = run_tool("cuobjdump", "-res-usage", cubin)
    usages = dict(re.findall(r"Function (\w+):\s+(REG:.*)", usage))
    parts = re.split(r"^\.text\.(\w+):$", run_tool("nvdisasm", cubin), flags=re.MULTILINE)
    sass = dict(zip(parts[1::2], parts[2::2], strict=True))

    def number(line, field):
        return int(re.search(rf"{field}:(\d+)", line).group(1))

    return {
        name: Code(number(line, "REG"), number(line, "STACK") + number(line, "LOCAL"), sass[name])
        for name, line in usages.items()
    }


@functools.cache
def built(target: str) -> dict[str, Code]:
    """Every kernel of the library for one GPU."""
    place = build_dir() / "elf"
    if not place.exists():
        place.mkdir()
        run_tool("cuobjdump", "-xelf", "all", library(), cwd=place)
    kernels: dict[str, Code] = {}
    for cubin in place.glob(f"*.{target}.cubin"):
        kernels |= kernels_of(cubin)
    record("nvcc", target, kernels)
    return kernels


def record(compiler: str, target: str, kernels: dict[str, Code]) -> None:
    for name, code in kernels.items():
        spills = code.count(SPILL)
        summary.COMPILED.append(
            summary.CompiledKernel(name.split("_")[0], compiler, target, code.registers, spills, code.count(WIDE_LOAD))
        )


@functools.cache
def ptx() -> dict[str, str]:
    """The PTX of every kernel of the library, by name."""
    text = run_tool("cuobjdump", "-ptx", library())
    parts = re.split(r"^\s*(?:\.visible )?\.entry (\w+)\(", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@functools.cache
def by_nvrtc(family: str, target: str) -> dict[str, Code]:
    library = nvrtc()
    assert library
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    library.nvrtcCreateProgram(ctypes.byref(program), family_source(family).encode(), b"kernel.cu", 0, None, None)
    options = [f"--gpu-architecture={target}".encode(), *(option.encode() for option in launch.OPTIONS)]
    status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, cubin)
    path = build_dir() / f"{family}-{target}.cubin"
    path.write_bytes(cubin.raw)
    kernels = kernels_of(path)
    record("NVRTC", target, kernels)
    return kernels
