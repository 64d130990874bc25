"""Validation of the options of masked optimizers."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch

from opdkernels.ops.step.layout import PRECISIONS

WEIGHT_DECAY_TARGETS = ("zero", "init")


def is_number(value: Any) -> bool:
    """Whether a value is a real number of Python or NumPy, and not NaN."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def is_scalar_tensor(value: Any) -> bool:
    """Whether a value is a real tensor of one element."""
    return isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex()


def validate_flags(options: dict[str, Any]) -> None:
    """Raise for combinations of constructor arguments that torch.optim refuses, with its types of errors.

    foreach has no effect here, but code that is refused by torch.optim should not pass unnoticed.
    """
    if options["foreach"] and options["fused"]:
        raise RuntimeError("fused=True and foreach=True exclude each other; leave both out")
    betas = options.get("betas", ())
    tensors = [isinstance(beta, torch.Tensor) for beta in betas]
    if len(set(tensors)) > 1:
        raise ValueError(f"betas are {betas!r}; give two floats or two tensors")
    if options["foreach"] and betas and (any(tensors) or isinstance(options["lr"], torch.Tensor)):
        raise ValueError("lr and betas as tensors are not supported with foreach=True; leave foreach out")


def validate_options(options: dict[str, Any]) -> None:
    """Raise ValueError for an option that is out of range, TypeError for a flag that is not supported."""
    for name in ("lr", "eps", "weight_decay", "momentum", "dampening"):
        value = options.get(name, 0.0)
        if name == "lr" and is_scalar_tensor(value):
            value = float(value)
        if not is_number(value) or not 0 <= value < math.inf:
            hint = "; write 1.0e-6, with a point, in YAML" if isinstance(value, str) else ""
            raise ValueError(f"{name} is {options[name]!r}; give a finite number that is not negative{hint}")
    betas = options.get("betas", (0.0, 0.0))
    if (
        not isinstance(betas, (tuple, list))
        or len(betas) != 2
        or not all((is_number(b) or is_scalar_tensor(b)) and 0 <= float(b) < 1 for b in betas)
    ):
        raise ValueError(f"betas is {betas!r}; give two numbers in [0, 1)")
    for name, choices in (("precision", PRECISIONS), ("weight_decay_target", WEIGHT_DECAY_TARGETS)):
        if options[name] not in choices:
            raise ValueError(f"{name} is {options[name]!r}; choose one of {', '.join(choices)}")
    seed = options["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed is {seed!r}; give an integer of 64 bits")
    for flag in ("amsgrad", "maximize", "nesterov", "fused", "foreach", "capturable", "differentiable"):
        value = options.get(flag)
        if isinstance(value, (str, bytes)):  # which is true, also "false"
            raise ValueError(f"{flag} is {value!r}; give True or False, without quotes")
    if options.get("nesterov") and not (options["momentum"] > 0 and options["dampening"] == 0):
        raise ValueError("nesterov needs momentum and no dampening")
    for flag in ("capturable", "differentiable"):
        if options.get(flag):
            raise TypeError(f"masked optimizers do not support {flag}=True; leave it out")
