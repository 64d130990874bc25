"""What the GPU backends share on the host: slices of large tensors and arguments of kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

SLICE = 1 << 30  # elements per launch: its 32-bit counters cannot overflow


def slices(n: int) -> Iterator[tuple[int, int]]:
    """Start and size of each range of n elements that gets a separate launch."""
    return ((start, min(SLICE, n - start)) for start in range(0, n, SLICE))


def on_device(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """An int64 tensor on a device, copied on its current stream without synchronisation."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def address(argument: torch.Tensor | int | None) -> int:
    """A kernel argument as an integer: the address of a tensor, a number, 0 for None."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return 0 if argument is None else int(argument)


def mask_from(mask: torch.Tensor | None, start: int) -> torch.Tensor | None:
    """The packed mask from coordinate `start` on, a multiple of 8; None without a mask."""
    return None if mask is None else mask.narrow(0, start // 8, mask.numel() - start // 8)
