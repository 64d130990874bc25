"""What the backends for GPUs share outside their kernels: slices, thresholds as integers, cuts by digits, joint counts added up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

SLICE = 1 << 30  # elements a launch: 32-bit counters of one cannot overflow


def slices(n: int) -> Iterator[tuple[int, int]]:
    """Start and size of the ranges of n elements that are launched one by one."""
    return ((start, min(SLICE, n - start)) for start in range(0, n, SLICE))


def on_device(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """int64 on a device, on its current stream; the host does not wait for what is there."""
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)


def address(argument: torch.Tensor | int | None) -> int:
    """What a kernel takes of an argument: a tensor's address, a number, zero for what is not there."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return 0 if argument is None else int(argument)


def mask_from(mask: torch.Tensor | None, start: int) -> torch.Tensor | None:
    """The bits of a slice, where there is a mask: eight to a byte."""
    return None if mask is None else mask.narrow(0, start // 8, mask.numel() - start // 8)
