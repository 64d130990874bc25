"""The compiled CPU extension `opdkernels._C`: whether it can be used, and how tensors are passed to it."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import torch


def load_extension() -> tuple[Any, str]:
    """The extension module, or None and why it cannot be imported."""
    try:
        return importlib.import_module("opdkernels._C"), ""
    except ModuleNotFoundError:  # no compiler at installation, or a build for another Python
        return None, "none was built at install"
    except ImportError as error:
        return None, str(error)


_C, WHY_NOT = load_extension()
DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}


def wanted() -> bool:
    """Whether OPDKERNELS_BACKEND allows the compiled kernels."""
    return os.environ.get("OPDKERNELS_BACKEND", "cpu") != "reference"


def why_not() -> str:
    """Why the compiled kernels cannot be used; empty if they can. Warns once if they could have been built."""
    if not wanted():
        return "OPDKERNELS_BACKEND=reference"
    if _C is None:
        warnings.warn(
            f"opdkernels runs on its plain PyTorch reference, tens of times slower: no compiled kernels ({WHY_NOT}). "
            "Install g++ and reinstall opdkernels; `opdkernels doctor` explains.",
            RuntimeWarning,
            stacklevel=2,
        )
        warnings.filterwarnings("ignore", message="opdkernels runs on its plain PyTorch reference")
    return WHY_NOT


def address(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's data; 0 for None and for an empty tensor."""
    return tensor.data_ptr() if tensor is not None and tensor.numel() else 0
