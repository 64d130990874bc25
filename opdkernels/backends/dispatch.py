"""Which backend implements an operator on a device: the first available one, in a fixed order.

OPDKERNELS_BACKEND may name another.

A backend is a module of this package whose `unavailable_reason` says why it cannot be used. Its kernels of a family are
the functions of `opdkernels.ops.<family>.<backend>`, one per operator, with the operator's name; a family without that
module has no kernels for the backend. If no backend has a kernel, the plain PyTorch reference runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from opdkernels.backends import cpu, cuda, triton
from opdkernels.errors import UsageError

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton}
# By device type, in order of preference. torch calls AMD GPUs "cuda" too; there CUDA C++ is never available.
# On an H200, CUDA C++ took between 1/11 and 1/1.2 of Triton's time.
PRIORITY = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
REFERENCE = "reference"


def forced_backend() -> str | None:
    """The backend that OPDKERNELS_BACKEND names, if any."""
    name = os.environ.get("OPDKERNELS_BACKEND")
    if name and name not in (*BACKENDS, REFERENCE):
        raise UsageError(
            f"OPDKERNELS_BACKEND is {name}; choose one of {', '.join((*BACKENDS, REFERENCE))}, or unset it"
        )
    return name or None


def has_kernels(family: str, backend: str) -> bool:
    """Whether the package has kernels of this family for this backend, available here or not."""
    return find_spec(f"opdkernels.ops.{family}.{backend}") is not None


def select_backend(family: str, device: str) -> str:
    """The backend that runs a family's operators on a device type.

    A backend that OPDKERNELS_BACKEND names but that cannot be used is passed over.
    """
    forced = forced_backend()
    if forced == REFERENCE:
        return REFERENCE
    candidates = sorted(PRIORITY[device], key=lambda backend: backend != forced)
    usable = (name for name in candidates if has_kernels(family, name) and not BACKENDS[name].unavailable_reason())
    return next(usable, REFERENCE)


def load_kernel(family: str, backend: str, operator: str) -> Callable[..., Any]:
    """A backend's kernel of an operator; its module is imported at the first call."""

    def kernel(*arguments: Any) -> Any:
        return getattr(import_module(f"opdkernels.ops.{family}.{backend}"), operator)(*arguments)

    return kernel


def kernels(family: str, operator: str) -> dict[str, Callable[..., Any]]:
    """The kernels of an operator by dispatch key, for the devices where the reference does not run."""
    selected = {key: select_backend(family, device) for device, key in DISPATCH_KEYS.items()}
    return {key: load_kernel(family, name, operator) for key, name in selected.items() if name != REFERENCE}
