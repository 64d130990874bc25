"""Optimizers that train and keep state for the active coordinates of a mask only, and adapters for trainers."""

from opdkernels.optim.adamw import MaskedAdamW
from opdkernels.optim.adapters import optimizer_cls_and_kwargs
from opdkernels.optim.bind_masks import in_model_order
from opdkernels.optim.gradients import gather_active_grads, zero_frozen_grads
from opdkernels.optim.parameters import MaskedParameters
from opdkernels.optim.sgd import MaskedSGD

__all__ = [
    "MaskedAdamW",
    "MaskedParameters",
    "MaskedSGD",
    "gather_active_grads",
    "in_model_order",
    "optimizer_cls_and_kwargs",
    "zero_frozen_grads",
]
