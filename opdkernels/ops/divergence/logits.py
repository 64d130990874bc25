"""Logits of one tile of the vocabulary, in plain PyTorch: shared by the reference of `divergence` and the backends."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = -1e4  # smaller logits count as this: log p of a masked id is about -1e4, not -inf


class LogitParams(NamedTuple):
    """How logits follow from z = hidden @ weight.T + bias: softcap(scale * z) / temperature, with softcap(x) =
    c tanh(x / c). Operators take it as `float[]`."""

    scale: float = 1.0
    softcap: float = 0.0  # 0: none
    temperature: float = 1.0


def shape_logits(products: Tensor, bias: Tensor | None, params: LogitParams) -> Tensor:
    """Turns products hidden @ weight.T into logits over temperature, in place; at least FLOOR, NaN stays."""
    if bias is not None:
        products += bias
    if params.scale != 1:
        products *= params.scale
    if params.softcap:
        products.div_(params.softcap).tanh_().mul_(params.softcap)
    if params.temperature != 1:
        products /= params.temperature
    return products.clamp_(min=FLOOR)


def local_ids(ids: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Whether each id is in a tile, and its column there, clamped to the tile."""
    return (ids >= tile.start) & (ids < tile.stop), (ids - tile.start).clamp(0, tile.stop - tile.start - 1)


def mask_ids(logits: Tensor, in_tile: Tensor, columns: Tensor) -> Tensor:
    """Sets a tile's logits to -inf at ids, in place."""
    return logits.scatter_add_(
        1, columns, torch.zeros_like(columns, dtype=logits.dtype).masked_fill_(in_tile, -math.inf)
    )
