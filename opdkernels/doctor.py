"""`opdkernels doctor`: which backend serves on this machine, and why the others do not."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from opdkernels.backends import cpu, cuda, devices, dispatch, triton
from opdkernels.errors import printable
from opdkernels.ops import all_operators
from opdkernels.version import __version__


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cuda_kernels() -> str:
    """Who serves tensors on a GPU, and why those before it in the order do not."""
    if dispatch.forced_backend() == dispatch.REFERENCE:
        return "not used: OPDKERNELS_BACKEND=reference asks for the reference"
    passed_over = [
        f"not {name}: {why}"
        for name, why in (("CUDA C++", cuda.unavailable_reason()), ("Triton", triton.unavailable_reason()))
        if why
    ]
    if dispatch.forced_backend() == "triton" and not triton.unavailable_reason():
        return "Triton serves tensors on a GPU: OPDKERNELS_BACKEND=triton"
    if not cuda.unavailable_reason():
        origin = "built at install" if cuda.launch.kernel_source() == "built" else "compiled by NVRTC at the first call"
        who = f"CUDA C++, {origin}, serves tensors on a GPU, Triton what it lacks"
    else:
        who = "the plain PyTorch reference serves" if triton.unavailable_reason() else "Triton serves tensors on a GPU"
    return "; ".join([who, *passed_over])


def gpus() -> list[str]:
    """Name and compute capability of each GPU that torch can use."""
    found = (
        [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    return [f"{one.name} ({one.major}.{one.minor})" for one in found]


def examine() -> dict[str, Any]:
    """Facts of the machine and the build, as plain data."""
    module = cpu._C
    forced = os.environ.get("OPDKERNELS_BACKEND")
    if module is None:
        why = f"not used: {cpu.UNAVAILABLE_REASON}; install g++ and reinstall opdkernels"
    elif not cpu.is_enabled():
        why = f"built, but OPDKERNELS_BACKEND={forced} asks for the reference"
    else:
        why = "built and used"
    operators = all_operators()
    cpu_operators = sorted(
        n for n, operator in operators.items() if dispatch.select_backend(operator.family, "cpu") == "cpu"
    )
    return {
        "opdkernels": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_kernels": why,
        "cpu_operators": cpu_operators,
        "built_with": f"GCC {module.compiler}" if module is not None else None,
        "openmp": module.openmp if module is not None else None,
        "instruction_sets": module.available_isas() if module is not None else [],
        "instruction_set_used": module.current_isa() if module is not None else None,
        "compiler_here": shutil.which("g++") or shutil.which("c++"),
        "cuda_library": cuda.launch.library_cuda_major(),
        "cuda_library_is_stale": cuda.launch.library_is_stale(),
        "cupy": cuda.launch.cupy_cuda_major(),
        "nvcc_here": shutil.which("nvcc"),
        "triton": installed("triton"),
        "cuda_built_into_torch": torch.version.cuda,
        "cuda_devices": gpus(),
        "cuda_devices_why_none": ""
        if torch.cuda.is_available() or not torch.version.cuda
        else devices.cuda_unavailable_reason(),
        "cuda_kernels": cuda_kernels(),
        "cuda_operators": {name: dispatch.select_backend(operators[name].family, "cuda") for name in sorted(operators)},
        "huggingface_hub": installed("huggingface_hub"),
        "safetensors": installed("safetensors"),
        "pandas": importlib.util.find_spec("pandas") is not None,
    }


def format_text(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    sets = ", ".join(found["instruction_sets"]) or "none"
    library = f"for CUDA {found['cuda_library']}" if found["cuda_library"] else "no"
    gpu = (
        printable(", ".join(found["cuda_devices"]))
        or f"no devices{': ' + found['cuda_devices_why_none'] if found['cuda_devices_why_none'] else ''}"
    )
    if found["cuda_library_is_stale"]:
        library += ", passed over: library built from other sources; rebuild (reinstall opdkernels)"
    cupy = f"CuPy for CUDA {found['cupy']}" if found["cupy"] else "no CuPy"
    return [
        f"opdkernels {found['opdkernels']}, Python {found['python']}, torch {found['torch']}, {found['machine']}, {found['threads']} threads",
        f"CPU kernels      {found['cpu_kernels']}",
        f"  operators      {', '.join(found['cpu_operators']) or 'all by the reference'}",
        f"  built with     {found['built_with'] or '-'}, OpenMP {'on' if found['openmp'] else 'off: one thread'}",
        f"  instructions   {found['instruction_set_used'] or '-'} used; this machine and build offer {sets} (OPDKERNELS_ISA chooses)",
        f"  compiler here  {found['compiler_here'] or 'none: a reinstall from source would run on the reference'}",
        f"CUDA             {gpu}; torch is built {'for CUDA ' + found['cuda_built_into_torch'] if found['cuda_built_into_torch'] else 'without CUDA'}",
        f"  kernels        {found['cuda_kernels']}",
        f"  operators      {', '.join(f'{name} by {backend}' for name, backend in found['cuda_operators'].items())}",
        f"  built          {library}; {cupy}; nvcc {found['nvcc_here'] or 'is not here'}",
        f"  triton         {found['triton'] or 'not installed'}",
        f"Hub ids          {'huggingface_hub ' + found['huggingface_hub'] if found['huggingface_hub'] else 'not read: pip install opdkernels[hub]'}",
    ]
