"""Measure what post-training changed in a model's weights, and train only that.

Importing this package imports nothing else: a public name imports its module when it is first used.

>>> import opdkernels
>>> sorted(opdkernels.masks.__all__)[:3]
['MappedMasks', 'Mask', 'MaskSet']
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from opdkernels.errors import InputError, UsageError
from opdkernels.version import __version__

if TYPE_CHECKING:
    from opdkernels import masks, optim, patch, sync
    from opdkernels.analysis.headers import inspect
    from opdkernels.analysis.overlap import Overlaps
    from opdkernels.analysis.result import Analysis, load
    from opdkernels.analysis.trajectory import Trajectory
    from opdkernels.api import analyze, bench, experiment, lineage, overlap, trajectory, write_report
    from opdkernels.distillation.api import distill
    from opdkernels.distillation.options import DistillOptions
    from opdkernels.hub import push_to_hub
    from opdkernels.masks import Mask, MaskSet
    from opdkernels.ops.divergence import Divergence, linear_divergence
    from opdkernels.optim import MaskedAdamW, MaskedSGD
    from opdkernels.tracking import UpdateTracker

_LAZY: dict[str, tuple[str, str | None]] = {
    "Analysis": ("opdkernels.analysis.result", "Analysis"),
    "DistillOptions": ("opdkernels.distillation.options", "DistillOptions"),
    "Divergence": ("opdkernels.ops.divergence", "Divergence"),
    "Mask": ("opdkernels.masks", "Mask"),
    "MaskSet": ("opdkernels.masks", "MaskSet"),
    "MaskedAdamW": ("opdkernels.optim", "MaskedAdamW"),
    "MaskedSGD": ("opdkernels.optim", "MaskedSGD"),
    "Overlaps": ("opdkernels.analysis.overlap", "Overlaps"),
    "Trajectory": ("opdkernels.analysis.trajectory", "Trajectory"),
    "UpdateTracker": ("opdkernels.tracking", "UpdateTracker"),
    "analyze": ("opdkernels.api", "analyze"),
    "bench": ("opdkernels.api", "bench"),
    "distill": ("opdkernels.distillation.api", "distill"),
    "experiment": ("opdkernels.api", "experiment"),
    "inspect": ("opdkernels.analysis.headers", "inspect"),
    "lineage": ("opdkernels.api", "lineage"),
    "linear_divergence": ("opdkernels.ops.divergence", "linear_divergence"),
    "load": ("opdkernels.analysis.result", "load"),
    "masks": ("opdkernels.masks", None),
    "optim": ("opdkernels.optim", None),
    "overlap": ("opdkernels.api", "overlap"),
    "patch": ("opdkernels.patch", None),
    "push_to_hub": ("opdkernels.hub", "push_to_hub"),
    "sync": ("opdkernels.sync", None),
    "trajectory": ("opdkernels.api", "trajectory"),
    "write_report": ("opdkernels.api", "write_report"),
}
"""Module of each public name, and the attribute there; None for the module itself."""

__all__ = [
    "Analysis",
    "DistillOptions",
    "Divergence",
    "InputError",
    "Mask",
    "MaskSet",
    "MaskedAdamW",
    "MaskedSGD",
    "Overlaps",
    "Trajectory",
    "UpdateTracker",
    "UsageError",
    "__version__",
    "analyze",
    "bench",
    "distill",
    "experiment",
    "inspect",
    "lineage",
    "linear_divergence",
    "load",
    "masks",
    "optim",
    "overlap",
    "patch",
    "push_to_hub",
    "sync",
    "trajectory",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'opdkernels' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute) if attribute else import_module(module)


def __dir__() -> list[str]:
    return __all__
