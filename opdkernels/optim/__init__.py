"""Optimizers that train the active coordinates of a mask alone, with state for these alone, and what plugs them into trainers."""

from opdkernels.optim.adapters import optimizer_cls_and_kwargs
from opdkernels.optim.binding import in_model_order
from opdkernels.optim.gradients import gather_active_grads, zero_frozen_grads
from opdkernels.optim.masked import MaskedAdamW, MaskedSGD
from opdkernels.optim.parameters import MaskedParameters

__all__ = [
    "MaskedAdamW",
    "MaskedParameters",
    "MaskedSGD",
    "gather_active_grads",
    "in_model_order",
    "optimizer_cls_and_kwargs",
    "zero_frozen_grads",
]
