"""What becomes of a tile of logits, in plain PyTorch: shared by the reference of `divergence` and the backends."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOOR = -1e4  # logits below count as this: log p of a masked id is about -1e4, not -inf


def shaped(out: Tensor, bias: Tensor | None, scale: float, softcap: float, temperature: float) -> Tensor:
    """In place, of hidden @ weight.T."""
    if bias is not None:
        out += bias
    if scale != 1:
        out *= scale
    if softcap:
        out.div_(softcap).tanh_().mul_(softcap)
    if temperature != 1:
        out /= temperature
    return out.clamp_(min=FLOOR)


def local_ids(ids: Tensor, here: slice) -> tuple[Tensor, Tensor]:
    """Which ids lie in a tile, and where; those outside at an end of it."""
    return (ids >= here.start) & (ids < here.stop), (ids - here.start).clamp(0, here.stop - here.start - 1)


def without(x: Tensor, inside: Tensor, local: Tensor) -> Tensor:
    """A tile's logits with -inf at ids, in place."""
    return x.scatter_add_(1, local, torch.zeros_like(local, dtype=x.dtype).masked_fill_(inside, -math.inf))
