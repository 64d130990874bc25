"""What is computed: one file a kernel family. Each holds the schema, the fake kernel, the reference and the public function."""

from __future__ import annotations

from collections.abc import Callable

import torch

from opdkernels.backends import select

LIBRARY = torch.library.Library("opdkernels", "DEF")


def register(schema: str, reference: Callable, fake: Callable) -> None:
    """Declare an operator: the reference serves every device that has no kernel of its own."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(", 1)[0]
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"opdkernels::{name}", fake, lib=LIBRARY)
    for key, kernel in select.kernels(name).items():
        LIBRARY.impl(name, kernel, key)


def localise(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of a DTensor that lives here, detached and contiguous; any other tensor likewise."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach().contiguous()
