"""Measure what post-training changed in a model's weights, and train only that, at the speed of memory.

Importing this loads nothing: torch comes with the first function used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opdkernels.errors import InputError, UsageError
from opdkernels.version import __version__

if TYPE_CHECKING:
    from opdkernels import patch
    from opdkernels.analysis.overlap import Overlaps
    from opdkernels.analysis.result import Analysis, load
    from opdkernels.analysis.trajectory import Trajectory
    from opdkernels.api import analyze, overlap, trajectory

WHERE = {
    "analyze": "opdkernels.api",
    "overlap": "opdkernels.api",
    "trajectory": "opdkernels.api",
    "Overlaps": "opdkernels.analysis.overlap",
    "Trajectory": "opdkernels.analysis.trajectory",
    "Analysis": "opdkernels.analysis.result",
    "load": "opdkernels.analysis.result",
}
__all__ = [
    "Analysis",
    "InputError",
    "Overlaps",
    "Trajectory",
    "UsageError",
    "__version__",
    "analyze",
    "load",
    "overlap",
    "patch",
    "trajectory",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "patch":
        return import_module("opdkernels.patch")
    if name in WHERE:
        return getattr(import_module(WHERE[name]), name)
    raise AttributeError(f"module 'opdkernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
