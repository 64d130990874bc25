"""Checks that no two parameters of an optimizer are the same tensor or share memory: a step would move them twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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
    by_storage: defaultdict[tuple[torch.device, int], list[Named]] = defaultdict(list)
    for name, tensor in named:
        if not tensor.numel() or tensor.device.type == "meta" or is_traceable_wrapper_subclass(tensor):
            continue
        if torch._debug_has_internal_overlap(tensor) == 1:
            raise ValueError(
                f"elements of {name} share memory, as after expand(); give a parameter with its own memory"
            )
        by_storage[tensor.device, tensor.untyped_storage().data_ptr()].append((name, tensor))
    for (_, address), sharing in by_storage.items():
        if not address or len(sharing) == 1:
            continue
        sharing.sort(key=lambda item: byte_range(item[1])[0])
        for i, (name, tensor) in enumerate(sharing):
            end = byte_range(tensor)[1]
            for other_name, other in sharing[i + 1 :]:
                if byte_range(other)[0] >= end:
                    break
                if overlap(tensor, other):
                    raise ValueError(
                        f"{name} and {other_name} share memory; give a tied weight once, under one of its names"
                    )


def byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the first byte after it."""
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + last + 1) * tensor.element_size()


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one storage, whose byte ranges overlap, have an element in common.

    Interleaved views, such as the columns of a matrix, have none.
    """
    if (a.is_contiguous() and b.is_contiguous()) or a.element_size() != b.element_size():
        return True
    first = min(a.storage_offset(), b.storage_offset())
    last = max(byte_range(tensor)[1] for tensor in (a, b)) // a.element_size()
    used = torch.zeros(last - first, dtype=torch.bool)
    views = [used.as_strided(t.shape, t.stride(), t.storage_offset() - first) for t in (a, b)]
    views[0].fill_(True)
    return bool(views[1].any())
