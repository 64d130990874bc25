"""The hyperparameters that masked optimizers take, and what is said of others."""

from __future__ import annotations

import math
from typing import Any

import torch

from opdkernels.ops.step import PRECISIONS

WEIGHT_DECAY_TARGETS = ("zero", "init")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def refuse_options(options: dict[str, Any]) -> None:
    """Raises ValueError for a hyperparameter that is no number or out of its range, TypeError for a flag that masked optimizers do
    not have."""
    for name in ("lr", "eps", "weight_decay", "momentum", "dampening"):
        value = options.get(name, 0.0)
        if name == "lr" and isinstance(value, torch.Tensor) and value.numel() == 1:
            value = float(value)
        if not is_number(value) or not 0 <= value < math.inf:
            hint = "; write 1.0e-6, with a point, in YAML" if isinstance(value, str) else ""
            raise ValueError(f"{name} is {options[name]!r}; give a finite number from 0 on{hint}")
    betas = options.get("betas", (0.0, 0.0))
    if (
        not isinstance(betas, (tuple, list))
        or len(betas) != 2
        or not all((is_number(b) or isinstance(b, torch.Tensor)) and 0 <= float(b) < 1 for b in betas)
    ):
        raise ValueError(f"betas is {betas!r}; give two numbers in [0, 1)")
    for name, choices in (("precision", PRECISIONS), ("weight_decay_target", WEIGHT_DECAY_TARGETS)):
        if options[name] not in choices:
            raise ValueError(f"{name} is {options[name]!r}; choose one of {', '.join(choices)}")
    if (
        isinstance(options["seed"], bool)
        or not isinstance(options["seed"], int)
        or not -(1 << 63) <= options["seed"] < 1 << 63
    ):
        raise ValueError(f"seed is {options['seed']!r}; give an integer of 64 bits")
    if options.get("nesterov") and not (options["momentum"] > 0 and options["dampening"] == 0):
        raise ValueError("nesterov needs momentum and no dampening")
    for flag in ("capturable", "differentiable"):
        if options.get(flag):
            raise TypeError(f"{flag}=True is not offered by masked optimizers; leave it out")
