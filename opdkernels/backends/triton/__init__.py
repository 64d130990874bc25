"""Triton kernels, for GPUs: one file a family. Triton is loaded with the first call, not with the package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

LEAST = (3, 6)


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
