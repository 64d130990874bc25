"""The backends that can run operators on a device here, and the one that the package selects."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from opdkernels.backends import cpu, dispatch, triton
from opdkernels.backends.cuda import launch
from opdkernels.backends.cuda.sources import inline_includes
from tests.ops.conformance import OPERATORS, Family, Kernel, backend_kernel, dispatched, load_families, reference

FAMILIES = load_families()


class Inconclusive(Exception):
    """A check that cannot be decided on this machine, and why."""


@dataclass(frozen=True)
class Backend:
    """`kernel` returns the implementation of an operator; `serves` says whether there is one."""

    name: str
    kernel: Kernel
    serves: Callable[[str], bool]

    def serves_all(self, family: Family) -> bool:
        return all(self.serves(operator) for operator in family.operators)


def serves(backend: str) -> Callable[[str], bool]:
    return lambda operator: dispatch.has_kernels(OPERATORS[operator].family, backend)


def launched_by(kernels: Any) -> Kernel:
    """CUDA C++ kernels from one source: the installed library, or NVRTC."""

    def kernel(operator: str) -> Callable:
        def call(*arguments: Any) -> Any:
            with patch.object(launch, "kernels", lambda: kernels):
                return backend_kernel("cuda")(operator)(*arguments)

        return call

    return kernel


def compiled_from(source: Path, device: torch.device) -> launch.NvrtcKernels:
    """The kernels of a CUDA source that is not of a family, compiled by NVRTC."""
    if device.type != "cuda":
        raise Inconclusive("it is compiled for GPUs")
    torch_major = int((torch.version.cuda or "0").split(".")[0])
    if launch.cupy_cuda_major() != torch_major:
        raise Inconclusive(f"CuPy for CUDA {torch_major}, which compiles it, is not installed")
    return launch.NvrtcKernels(lambda family: inline_includes(source))


def cpu_kernel(operator: str) -> Callable:
    """The CPU kernel of an operator; the reference for `divergence`, which spends its time in torch's products."""
    return backend_kernel("cpu")(operator) if serves("cpu")(operator) else reference(operator)


REFERENCE = Backend("reference", reference, OPERATORS.__contains__)
CPU = Backend("CPU", cpu_kernel, OPERATORS.__contains__) if cpu.native is not None else REFERENCE
PACKAGE = Backend("package", dispatched, OPERATORS.__contains__)
TRITON = Backend("Triton", backend_kernel("triton"), serves("triton"))


def available_backends(device: torch.device) -> tuple[list[Backend], list[str]]:
    """The backends of a device in the order of the tables, and why others are unavailable."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda":
        others = [TRITON] if interpreted else []
        return [CPU, *others, *([REFERENCE] if CPU is not REFERENCE else []), PACKAGE], []
    backends, missing = [], []
    major = int((torch.version.cuda or "0").split(".")[0])
    origins: Iterable[tuple[str, int | None, Callable[[], Any]]] = (
        (
            "CUDA library",
            None if launch.library_is_stale() else launch.library_cuda_major(),
            lambda: launch.LibraryKernels(launch.LIBRARY),
        ),
        ("NVRTC", launch.cupy_cuda_major(), launch.NvrtcKernels),
    )
    for name, cuda_major, make in origins:
        if major and cuda_major == major:
            try:
                backends.append(Backend(name, launched_by(make()), serves("cuda")))
            except Exception as error:
                missing.append(f"{name}: {error}")
        else:
            built_for = "not installed" if cuda_major is None else f"for CUDA {cuda_major}"
            missing.append(f"{name}: {built_for}, torch is for CUDA {major or 'none'}")
    if triton.unavailable_reason():
        missing.append(triton.unavailable_reason())
    else:
        backends.append(TRITON)
    return [*backends, REFERENCE, PACKAGE], missing
