"""Functions that the Triton and the CUDA launchers of `patch` share: prefix sums and validation of lengths."""

from __future__ import annotations

import torch

from opdkernels.ops.patch.layout import BLOCK, VALID, blocks_of


def starts_of(lengths: torch.Tensor) -> torch.Tensor:
    """Returns the exclusive prefix sums of int [n], int64 [n + 1]; the last element is the total."""
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=starts.narrow(0, 1, len(lengths)))
    return starts


def block_sizes(numel: int, device: torch.device) -> torch.Tensor:
    """Returns the number of coordinates per block, int64 [blocks]."""
    return (numel - torch.arange(blocks_of(numel), device=device) * BLOCK).clamp(max=BLOCK)


def position_bytes(counts: torch.Tensor, numel: int) -> torch.Tensor:
    """Returns the bytes of the positions per block, int64 [blocks], for counts, int32 [blocks]."""
    return torch.minimum(2 * counts.long(), (block_sizes(numel, counts.device) + 7) // 8)


def first_unfit(counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int) -> torch.Tensor:
    """Validates counts and lengths.

    Args:
        counts: int32 [blocks].
        positions: uint8 [bytes].
        numel: Number of coordinates.
        stored: Number of stored values.

    Returns:
        int64 [1]: the first block with an impossible count; else the number of blocks if the length of the positions
        or the number of values does not match the counts; else VALID.
    """
    blocks, device = blocks_of(numel), counts.device
    impossible = torch.where(
        (counts < 0) | (counts > block_sizes(numel, device)), torch.arange(blocks, device=device), VALID
    )
    unfit = (position_bytes(counts, numel).sum() != positions.numel()) | (counts.sum() != stored)
    return torch.cat([impossible, torch.where(unfit, blocks, VALID).view(1)]).amin(0, keepdim=True)


def status_of(bad: torch.Tensor) -> torch.Tensor:
    """Returns the status that the operators of `patch` return: -1 for VALID, else `bad`. Both are int64 [1]."""
    return torch.where(bad == VALID, -1, bad)
