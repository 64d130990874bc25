"""Which coordinates of a model are active: one mask per tensor, mask sets on disk, and ways to build them."""

from opdkernels.masks.build import (
    changed,
    largest,
    magnitude_matched,
    near_zero,
    principal,
    random_subset,
    safe,
    top_changed,
)
from opdkernels.masks.mapping import MappedMasks, map_masks
from opdkernels.masks.mask import Mask
from opdkernels.masks.mask_set import MaskSet

__all__ = [
    "MappedMasks",
    "Mask",
    "MaskSet",
    "changed",
    "largest",
    "magnitude_matched",
    "map_masks",
    "near_zero",
    "principal",
    "random_subset",
    "safe",
    "top_changed",
]
