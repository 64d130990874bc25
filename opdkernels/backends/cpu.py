"""The compiled CPU kernels, `opdkernels.native`: whether they can be used, and how tensors are passed to them."""

from __future__ import annotations

import ctypes
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

PTR, INT = ctypes.c_void_p, ctypes.c_int64  # types of arguments for `declare`


def load_kernels() -> tuple[Any, str]:
    """The module and "", or None and the reason why it cannot be imported."""
    try:
        return importlib.import_module("opdkernels.native"), ""
    except ImportError as error:
        return None, str(error)


native, UNAVAILABLE_REASON = load_kernels()


def declare(name: str, *types: Any) -> Callable[..., None]:
    """`opdkernels.native.declare`; without compiled kernels, a function that raises."""
    if native is not None:
        return native.declare(name, *types)

    def missing(*arguments: object) -> None:
        raise RuntimeError(f"{name} needs the compiled kernels ({UNAVAILABLE_REASON})")

    return missing


def int64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """The values as a C array."""
    return (ctypes.c_int64 * len(values))(*values)


def doubles(values: Sequence[float]) -> ctypes.Array[ctypes.c_double]:
    """The values as a C array."""
    return (ctypes.c_double * len(values))(*values)


def is_enabled() -> bool:
    """Whether OPDKERNELS_BACKEND allows the compiled kernels."""
    return os.environ.get("OPDKERNELS_BACKEND", "cpu") != "reference"


def unavailable_reason() -> str:
    """Why the compiled kernels cannot be used; empty if they can. Warns once if they are missing."""
    if not is_enabled():
        return "OPDKERNELS_BACKEND=reference"
    if native is None:
        warnings.warn(
            "opdkernels runs on its plain PyTorch reference, tens of times slower: no compiled kernels "
            f"({UNAVAILABLE_REASON}). Install g++ and reinstall opdkernels; `opdkernels doctor` explains.",
            RuntimeWarning,
            stacklevel=2,
        )
        warnings.filterwarnings("ignore", message="opdkernels runs on its plain PyTorch reference")
    return UNAVAILABLE_REASON


def address(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's data; 0 for None and for an empty tensor."""
    return tensor.data_ptr() if tensor is not None and tensor.numel() else 0


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose address is a multiple of the size of an element: itself, or a copy. Tensors from
    `torch.frombuffer` and of mapped files need not be."""
    return tensor.clone() if address(tensor) % tensor.element_size() else tensor
