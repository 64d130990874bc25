"""Optimizers that train the active coordinates of a mask alone, with state for these alone, and what plugs them into trainers."""

from opdkernels.optim.adapters import optimizer_cls_and_kwargs
from opdkernels.optim.binding import in_model_order
from opdkernels.optim.gradients import compact_gradients, mask_gradients
from opdkernels.optim.masked import MaskedAdamW, MaskedSGD
from opdkernels.optim.parameters import MaskedParameters

__all__ = [
    "MaskedAdamW",
    "MaskedParameters",
    "MaskedSGD",
    "compact_gradients",
    "in_model_order",
    "mask_gradients",
    "optimizer_cls_and_kwargs",
]
