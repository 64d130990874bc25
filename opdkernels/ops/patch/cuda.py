"""`patch` in CUDA C++: the launches of csrc/patch/cuda.cu, and the prefix sums between them."""

from __future__ import annotations

import torch

from opdkernels.backends.cuda import launch
from opdkernels.ops.patch.gpu_common import first_unfit, position_bytes, starts_of, status_of
from opdkernels.ops.patch.layout import BLOCK, HASH_UNIT, blocks_of

THREADS = 512  # per block, which processes one block of coordinates
QUEUE_THREADS = 256  # per block of `compress`
CHUNKS = BLOCK // launch.QUEUE_SIZE  # per block; changes are counted per chunk
SUMS_BYTES = 64 * BLOCK // HASH_UNIT  # of shared memory per byte of a coordinate: eight words per unit of a block
DECODED_BYTES = BLOCK // 8 + 8  # of shared memory: the change bits of a block, and two 32-bit numbers


def empty_bits(blocks: int, device: torch.device) -> torch.Tensor:
    """Returns uninitialized memory for change bits, uint8 [blocks * BLOCK / 8]."""
    return torch.empty(blocks * BLOCK // 8, dtype=torch.uint8, device=device)


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
    mask, chunk_counts = empty_bits(blocks, device), torch.zeros(blocks, CHUNKS, dtype=torch.int32, device=device)
    launch.run(
        f"patch_compare_{width}",
        blocks,
        THREADS,
        2 * width * SUMS_BYTES,
        device,
        base,
        trained,
        mask,
        chunk_counts,
        digests,
        n,
    )
    torch.sum(chunk_counts, 1, dtype=torch.int32, out=counts)
    launch.run(
        f"patch_compress_{width}",
        launch.num_queue_blocks(device, -(-n // launch.QUEUE_SIZE), QUEUE_THREADS),
        QUEUE_THREADS,
        launch.queue_bytes(QUEUE_THREADS),
        device,
        base,
        trained,
        mask,
        starts_of(chunk_counts.flatten()),
        counts,
        starts_of(position_bytes(counts, n)),
        positions,
        values,
        n,
        difference,
    )


def decode_positions(
    counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Validates and decodes the positions.

    Returns:
        int64 [1]: the first invalid block, the number of blocks if a length is wrong, or VALID.
        uint8 [blocks * BLOCK / 8]: the change bits.
        int32 [blocks * CHUNKS]: the number of change bits per chunk.
    """
    blocks, device = blocks_of(numel), counts.device
    fits = first_unfit(counts, positions, numel, stored)
    bad, mask = fits.clone(), empty_bits(blocks, device)
    chunk_counts = torch.zeros(blocks * CHUNKS, dtype=torch.int32, device=device)
    if blocks:
        starts = starts_of(position_bytes(counts, numel))
        launch.run(
            "patch_decode",
            blocks,
            THREADS,
            DECODED_BYTES,
            device,
            counts,
            starts,
            positions,
            fits,
            mask,
            chunk_counts,
            bad,
            numel,
        )
    return bad, mask, chunk_counts


def patch_check(counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int) -> torch.Tensor:
    """The operator, for contiguous tensors on one device."""
    return status_of(decode_positions(counts, positions, numel, stored)[0])


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
    bad, mask, chunk_counts = decode_positions(counts, positions, n, values.numel())
    if n:
        launch.run(
            f"patch_restore_{width}",
            blocks_of(n),
            THREADS,
            width * SUMS_BYTES,
            device,
            base,
            mask,
            starts_of(chunk_counts),
            values,
            bad,
            out,
            digests,
            n,
            difference,
        )
    return status_of(bad)


def patch_digest(values: torch.Tensor) -> torch.Tensor:
    """The operator, for contiguous integers on one device."""
    n, width, device, blocks = values.numel(), values.itemsize, values.device, blocks_of(values.numel())
    digests = torch.empty(blocks, 2, dtype=torch.int64, device=device)
    if n:
        launch.run("patch_digest", blocks, THREADS, width * SUMS_BYTES, device, values, digests, n, width)
    return digests
