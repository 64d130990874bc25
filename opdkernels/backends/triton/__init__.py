"""Triton kernels for GPUs (opdkernels/ops/<family>/triton.py). Triton is imported at the first call."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

MIN_VERSION = (3, 6)


def unavailable_reason() -> str:
    """Why Triton kernels cannot be used, and the remedy; empty if they can."""
    minimum = ".".join(map(str, MIN_VERSION))
    remedy = f"pip install 'triton>={minimum}'"
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return f"Triton is not installed: {remedy}"
    if tuple(int(number) for number in installed.split(".")[:2]) < MIN_VERSION:
        return f"Triton {installed} is older than {minimum}: {remedy}"
    return ""
