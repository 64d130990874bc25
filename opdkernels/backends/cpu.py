"""The compiled CPU extension `opdkernels._C`: whether it can be used, and how tensors are passed to it."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import torch


def load_extension() -> tuple[Any, str]:
    """The extension module and "", or None and the reason why it cannot be imported."""
    try:
        return importlib.import_module("opdkernels._C"), ""
    except ModuleNotFoundError:  # no compiler at install, or a build for another Python
        return None, "none was built at install"
    except ImportError as error:
        return None, str(error)


_C, UNAVAILABLE_REASON = load_extension()


def is_enabled() -> bool:
    """Whether OPDKERNELS_BACKEND allows the compiled kernels."""
    return os.environ.get("OPDKERNELS_BACKEND", "cpu") != "reference"


def unavailable_reason() -> str:
    """Why the compiled kernels cannot be used; empty if they can. Warns once if they are missing."""
    if not is_enabled():
        return "OPDKERNELS_BACKEND=reference"
    if _C is None:
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
