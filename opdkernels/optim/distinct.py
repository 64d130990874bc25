"""Checks that no two parameters of an optimizer are the same tensor or share memory: a step would move them twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from opdkernels.ops.arguments import sharing_memory

Named = tuple[str, torch.Tensor]  # name for messages, and a parameter or its local part


def named_params(groups: Iterable[dict[str, Any]]) -> list[Named]:
    """The parameters of groups with their names or, where they have none, their positions."""
    named: list[Named] = []
    for group in groups:
        params = group["params"]
        items = [params] if isinstance(params, torch.Tensor) else list(params)
        names = group.get("param_names") or [None] * len(items)
        for item, group_name in zip(items, names, strict=True):
            name, param = item if isinstance(item, tuple) and len(item) == 2 else (group_name, item)
            named.append((f"parameter {len(named)}" if name is None else str(name), param))
    return named


def validate_distinct(named: Sequence[Named]) -> None:
    """Raise ValueError that names both where a parameter is given twice."""
    seen: dict[int, str] = {}
    for name, param in named:
        if id(param) in seen:
            raise ValueError(
                f"{seen[id(param)]} and {name} are the same parameter; give a tied weight once, under one of its names "
                "(named_parameters() does so)"
            )
        seen[id(param)] = name


def validate_memory(named: Sequence[Named]) -> None:
    """Raise ValueError that names both where two tensors share memory, or elements of one do."""
    shared = sharing_memory(item for item in named if not is_traceable_wrapper_subclass(item[1]))
    if shared is None:
        return
    name, other = shared
    if other is None:
        raise ValueError(f"elements of {name} share memory, as after expand(); give a parameter with its own memory")
    raise ValueError(f"{name} and {other} share memory; give a tied weight once, under one of its names")
