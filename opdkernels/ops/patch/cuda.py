"""`patch` in CUDA C++: the launches of csrc/patch/cuda.cu."""

from __future__ import annotations

import torch

from opdkernels.backends.cuda import launch
from opdkernels.ops.patch.layout import BLOCK, HASH_UNIT, blocks_of

THREADS = 512  # per block, which processes one block of coordinates
QUEUE_THREADS = 256  # per block of `compress`
CHUNKS = BLOCK // launch.QUEUE_SIZE  # per block; changes are counted per chunk
SUMS_BYTES = 64 * BLOCK // HASH_UNIT  # of shared memory per byte of a coordinate: eight words per unit of a block
DECODED_BYTES = BLOCK // 8 + 16  # of shared memory: the change bits of a block, and three 32-bit numbers
PLAN_BYTES = 2 * 8 * THREADS // 32 + 8  # of shared memory: two sums per warp, and one number


def empty_bits(blocks: int, device: torch.device) -> torch.Tensor:
    """Returns uninitialized memory for change bits, uint8 [blocks * BLOCK / 8]."""
    return torch.empty(blocks * BLOCK // 8, dtype=torch.uint8, device=device)


def empty_counts(blocks: int, device: torch.device) -> torch.Tensor:
    """Returns uninitialized memory for changes per chunk, int32 [blocks, CHUNKS]."""
    return torch.empty(blocks, CHUNKS, dtype=torch.int32, device=device)


def plan(
    counts: torch.Tensor, numel: int, positions: int = 0, values: int = 0, bad: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes where the positions and the values of each block begin, int64 [blocks] each.

    Args:
        counts: int32 [blocks].
        numel: Number of coordinates.
        positions: Bytes of all positions.
        values: Number of all values.
        bad: int64 [2], set to the first block with an impossible count, to the number of blocks if the lengths do not
            match the counts, or to VALID.
    """
    blocks, device = blocks_of(numel), counts.device
    starts, value_starts = torch.empty(2, blocks, dtype=torch.int64, device=device)
    plan_arguments = counts, starts, value_starts, bad, numel, blocks, positions, values
    launch.run("patch_plan", 1, THREADS, PLAN_BYTES, device, *plan_arguments)
    return starts, value_starts


def patch_gather_(
    base: torch.Tensor,
    trained: torch.Tensor,
    difference: bool,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    digests: torch.Tensor,
) -> None:
    """The operator, for contiguous integers on one device."""
    n, width, device, blocks = base.numel(), base.itemsize, base.device, blocks_of(base.numel())
    if not n:
        return
    mask, chunk_counts = empty_bits(blocks, device), empty_counts(blocks, device)
    launch.run(
        f"patch_compare_{width}",
        blocks,
        THREADS,
        2 * width * SUMS_BYTES + 8,
        device,
        base,
        trained,
        mask,
        chunk_counts,
        counts,
        digests,
        n,
    )
    starts, value_starts = plan(counts, n)
    launch.run(
        f"patch_compress_{width}",
        launch.num_queue_blocks(device, -(-n // launch.QUEUE_SIZE), QUEUE_THREADS),
        QUEUE_THREADS,
        launch.queue_bytes(QUEUE_THREADS),
        device,
        base,
        trained,
        mask,
        chunk_counts,
        counts,
        starts,
        value_starts,
        positions,
        values,
        n,
        difference,
    )


def decode_positions(
    counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Validates and decodes the positions.

    Returns:
        int64 [1]: -1, or the first invalid block, or the number of blocks if a length is wrong.
        uint8 [blocks * BLOCK / 8]: the change bits.
        int32 [blocks, CHUNKS]: the number of change bits per chunk.
        int64 [blocks]: the first value of each block.
    """
    blocks, device = blocks_of(numel), counts.device
    bad = torch.empty(2, dtype=torch.int64, device=device)
    starts, value_starts = plan(counts, numel, positions.numel(), stored, bad)
    mask, chunk_counts = empty_bits(blocks, device), empty_counts(blocks, device)
    status = torch.empty(1, dtype=torch.int64, device=device)
    launch.run(
        "patch_decode",
        max(1, blocks),
        THREADS,
        DECODED_BYTES,
        device,
        counts,
        starts,
        positions,
        mask,
        chunk_counts,
        bad,
        status,
        launch.workspace("patch", device, 1),
        numel,
    )
    return status, mask, chunk_counts, value_starts


def patch_check(counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int) -> torch.Tensor:
    """The operator, for contiguous tensors on one device."""
    return decode_positions(counts, positions, numel, stored)[0]


def patch_scatter_(
    base: torch.Tensor,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    difference: bool,
    out: torch.Tensor,
    digests: torch.Tensor,
) -> torch.Tensor:
    """The operator, for contiguous integers on one device."""
    n, width, device = base.numel(), base.itemsize, base.device
    status, mask, chunk_counts, value_starts = decode_positions(counts, positions, n, values.numel())
    if n:
        launch.run(
            f"patch_restore_{width}",
            blocks_of(n),
            THREADS,
            width * SUMS_BYTES,
            device,
            base,
            mask,
            chunk_counts,
            value_starts,
            values,
            status,
            out,
            digests,
            n,
            difference,
        )
    return status


def patch_digest(values: torch.Tensor) -> torch.Tensor:
    """The operator, for contiguous integers on one device."""
    n, width, device, blocks = values.numel(), values.itemsize, values.device, blocks_of(values.numel())
    digests = torch.empty(blocks, 2, dtype=torch.int64, device=device)
    if n:
        launch.run("patch_digest", blocks, THREADS, width * SUMS_BYTES, device, values, digests, n, width)
    return digests
