"""What the Triton and the CUDA launchers of `patch` share: block sizes, prefix sums, validation of lengths."""

from __future__ import annotations

import torch

PATCH_BLOCK = 1 << 16
VALID = 1 << 62  # the first bad block where there is none


def blocks_of(numel: int) -> int:
    return -(-numel // PATCH_BLOCK)


def starts_of(lengths: torch.Tensor) -> torch.Tensor:
    """Where each begins and the last ends, int64 [one more]."""
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=starts.narrow(0, 1, len(lengths)))
    return starts


def block_sizes(numel: int, device: torch.device) -> torch.Tensor:
    return (numel - torch.arange(blocks_of(numel), device=device) * PATCH_BLOCK).clamp(max=PATCH_BLOCK)


def position_bytes(counts: torch.Tensor, numel: int) -> torch.Tensor:
    """Bytes of the positions of every block, int64."""
    return torch.minimum(2 * counts.long(), (block_sizes(numel, counts.device) + 7) // 8)


def first_unfit(counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int) -> torch.Tensor:
    """The first block that counts what it cannot have, or their number where lengths do not fit, or VALID, int64 [1]."""
    blocks, device = blocks_of(numel), counts.device
    impossible = torch.where(
        (counts < 0) | (counts > block_sizes(numel, device)), torch.arange(blocks, device=device), VALID
    )
    unfit = (position_bytes(counts, numel).sum() != positions.numel()) | (counts.sum() != stored)
    return torch.cat([impossible, torch.where(unfit, blocks, VALID).view(1)]).amin(0, keepdim=True)


def status_of(bad: torch.Tensor) -> torch.Tensor:
    """What the operators of `patch` return."""
    return torch.where(bad == VALID, -1, bad)
