"""Which coordinates of a model are active: one mask a tensor, sets of them on disk, and ways to make them."""

from opdkernels.masks.build import changed, largest, most_changed, near_zero, principal, random, random_like, safe
from opdkernels.masks.mask import Mask
from opdkernels.masks.mask_set import MaskSet

__all__ = [
    "Mask",
    "MaskSet",
    "changed",
    "largest",
    "most_changed",
    "near_zero",
    "principal",
    "random",
    "random_like",
    "safe",
]
