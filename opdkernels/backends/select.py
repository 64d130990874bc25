"""Which backend serves an operator on a device: the first that can, in this order; OPDKERNELS_BACKEND may name one.

Where none can, the plain PyTorch reference serves. A backend is a module of this folder that says which operators it `serves`,
and gives its `kernel` of each.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from opdkernels.backends import cpu, cuda, triton
from opdkernels.errors import UsageError

BACKENDS = {"cpu": cpu, "cuda": cuda, "triton": triton}
ORDER = {
    "cpu": ("cpu",),
    "cuda": ("cuda", "triton"),
}  # AMD's devices are "cuda" to torch too; CUDA C++ was 1.2 to 11 times as fast as Triton on an H200
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
REFERENCE = "reference"


def forced() -> str | None:
    """The backend that OPDKERNELS_BACKEND names, if any."""
    name = os.environ.get("OPDKERNELS_BACKEND")
    if name and name not in (*BACKENDS, REFERENCE):
        raise UsageError(
            f"OPDKERNELS_BACKEND is {name}; choose one of {', '.join((*BACKENDS, REFERENCE))}, or unset it"
        )
    return name or None


def chosen(operator: str, device: str) -> str:
    """Name of the backend that serves an operator on a kind of device. One that is named but cannot serve it is passed over."""
    name = forced()
    if name == REFERENCE:
        return REFERENCE
    order = sorted(ORDER[device], key=lambda backend: backend != name)
    return next((backend for backend in order if BACKENDS[backend].serves(operator)), REFERENCE)


def kernels(operator: str) -> dict[str, Callable]:
    """Kernels by dispatch key, of the devices that have one of their own."""
    found = {key: chosen(operator, device) for device, key in DISPATCH_KEYS.items()}
    return {key: BACKENDS[name].kernel(operator) for key, name in found.items() if name != REFERENCE}
