"""Triton kernels, for GPUs: one file a family. Triton is loaded with the first call, not with the package."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

LEAST = (3, 6)
FAMILIES = {
    "delta_": "delta",
    "overlap_": "overlap",
    "quantile": "quantile",
    "gram_": "gram",
    "patch_gather_": "patch",
    "patch_scatter_": "patch",
    "patch_check": "patch",
    "patch_digest": "patch",
    "masked_adamw_": "step",
    "masked_sgd_": "step",
    "masked_take_": "step",
    "masked_put_": "step",
    "divergence_scan": "divergence",
    "divergence_means": "divergence",
    "divergence_backward": "divergence",
    "divergence_top": "divergence",
}


def why_not() -> str:
    """Why Triton kernels cannot serve here, and the remedy; empty where they can."""
    least = ".".join(map(str, LEAST))
    remedy = f"pip install 'triton>={least}'"
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return f"Triton is not installed: {remedy}"
    if tuple(int(part) for part in installed.split(".")[:2]) < LEAST:
        return f"Triton {installed} is older than {least}: {remedy}"
    return ""


def serves(operator: str) -> bool:
    return operator in FAMILIES and not why_not()


def kernel(operator: str) -> Callable:
    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"{__name__}.{FAMILIES[operator]}"), operator)(*arguments)

    return call
