from __future__ import annotations

import pytest
import torch

from opdkernels.distillation.optimizers import build_optimizer
from opdkernels.errors import InputError
from opdkernels.masks.mask_set import from_bools
from tests.distillation.conftest import model


@pytest.mark.parametrize("names", [["lm_head.weight"], []])
def test_masks_without_active_coordinates_are_refused(options, tmp_path, names):
    from_bools({name: torch.zeros(15, 32, dtype=torch.bool) for name in names}).save(tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"m\.safetensors has no active coordinate.*give masks that have some"):
        build_optimizer(options(masks=str(tmp_path / "m.safetensors")), model(0))
