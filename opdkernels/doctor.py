"""`opdkernels doctor`: which backend runs on this machine, and why the others do not."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from opdkernels.backends import cpu, cuda, devices, dispatch, lapack, triton
from opdkernels.errors import printable
from opdkernels.ops import all_operators
from opdkernels.version import __version__

LAPACKS = {"openblas": "NumPy's OpenBLAS", "torch": "torch's LAPACK"}  # by `lapack.chosen_library`


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cuda_kernels() -> str:
    """Which backend runs for tensors on a GPU, and why those before it in the order do not."""
    if dispatch.forced_backend() == dispatch.REFERENCE:
        return "not used: OPDKERNELS_BACKEND=reference selects the reference"
    unavailable = [
        f"not {name}: {why}"
        for name, why in (("CUDA C++", cuda.unavailable_reason()), ("Triton", triton.unavailable_reason()))
        if why
    ]
    if dispatch.forced_backend() == "triton" and not triton.unavailable_reason():
        return "Triton runs for tensors on a GPU: OPDKERNELS_BACKEND=triton"
    if not cuda.unavailable_reason():
        origin = "built at install" if cuda.launch.kernel_source() == "built" else "compiled by NVRTC at the first call"
        active = f"CUDA C++, {origin}, runs for tensors on a GPU, and Triton for what it does not implement"
    else:
        active = "the plain PyTorch reference" if triton.unavailable_reason() else "Triton"
        active += " runs for tensors on a GPU"
    return "; ".join([active, *unavailable])


def gpus() -> list[str]:
    """Name and compute capability of each GPU that torch can use."""
    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{device.name} ({device.major}.{device.minor})" for device in devices]


def examine() -> dict[str, Any]:
    """The machine and the build, as a dictionary that JSON can represent."""
    module = cpu.native
    forced = os.environ.get("OPDKERNELS_BACKEND")
    if module is None:
        why = f"not used: {cpu.UNAVAILABLE_REASON}; install g++ and reinstall opdkernels"
    elif not cpu.is_enabled():
        why = f"built, but OPDKERNELS_BACKEND={forced} selects the reference"
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
        "lapack": lapack.chosen_library(),
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
        "cuda_operators": {
            name: dispatch.select_backend(operators[name].family, "cuda")
            for name in sorted(operators)
            if any(dispatch.has_kernels(operators[name].family, backend) for backend in dispatch.PRIORITY["cuda"])
        },
        "huggingface_hub": installed("huggingface_hub"),
        "safetensors": installed("safetensors"),
        "pandas": importlib.util.find_spec("pandas") is not None,
    }


def format_text(result: dict[str, Any]) -> list[str]:
    """The result of `examine` as lines of text."""
    instruction_sets = ", ".join(result["instruction_sets"]) or "none"
    library = f"for CUDA {result['cuda_library']}" if result["cuda_library"] else "no"
    if result["cuda_library_is_stale"]:
        library += ", ignored: library built from other sources; rebuild (reinstall opdkernels)"
    reason = f": {result['cuda_devices_why_none']}" if result["cuda_devices_why_none"] else ""
    gpu = printable(", ".join(result["cuda_devices"])) or f"no devices{reason}"
    torch_cuda = f"for CUDA {result['cuda_built_into_torch']}" if result["cuda_built_into_torch"] else "without CUDA"
    cupy = f"CuPy for CUDA {result['cupy']}" if result["cupy"] else "no CuPy"
    cuda_operators = ", ".join(f"{name} by {backend}" for name, backend in result["cuda_operators"].items())
    hub = result["huggingface_hub"]
    return [
        f"opdkernels {result['opdkernels']}, Python {result['python']}, torch {result['torch']}, {result['machine']}, "
        f"{result['threads']} threads",
        f"CPU kernels      {result['cpu_kernels']}",
        f"  operators      {', '.join(result['cpu_operators']) or 'all by the reference'}",
        f"  built with     {result['built_with'] or '-'}, OpenMP {'on' if result['openmp'] else 'off: one thread'}",
        f"  instructions   {result['instruction_set_used'] or '-'} in use; available here: {instruction_sets} "
        "(select one with OPDKERNELS_ISA)",
        f"  eigenvalues    by {LAPACKS[result['lapack']]} (select with OPDKERNELS_LAPACK)",
        f"  compiler       {result['compiler_here'] or 'none: a reinstall from source would use the reference'}",
        f"CUDA             {gpu}; torch is built {torch_cuda}",
        f"  kernels        {result['cuda_kernels']}",
        f"  operators      {cuda_operators}",
        f"  library        {library}; {cupy}; nvcc {result['nvcc_here'] or 'not found'}",
        f"  triton         {result['triton'] or 'not installed'}",
        f"Hub ids          {f'huggingface_hub {hub}' if hub else 'not available: pip install opdkernels[hub]'}",
    ]
