"""`patch` in CUDA C++: the launches of csrc/patch/cuda.cu, and the prefix sums between them."""

from __future__ import annotations

import torch

from opdkernels.backends.cuda import launch
from opdkernels.ops.patch.gpu_common import PATCH_BLOCK, blocks_of, first_unfit, position_bytes, starts_of, status_of

THREADS = 512  # a block, of coordinates too
QUEUE_THREADS = 256  # a block of `compress`
CHUNKS = PATCH_BLOCK // launch.QUEUE_SIZE  # of a block, whose changes are counted each
SUMS_BYTES = 64 * PATCH_BLOCK // 1024  # of shared memory: a block's units of the digest, a byte a coordinate
DECODED_BYTES = PATCH_BLOCK // 8 + 8  # a block's change bits, and two numbers


def empty_bits(blocks: int, device: torch.device) -> torch.Tensor:
    return torch.empty(blocks * PATCH_BLOCK // 8, dtype=torch.uint8, device=device)


def patch_gather_(
    base: torch.Tensor,
    trained: torch.Tensor,
    difference: bool,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    digests: torch.Tensor,
) -> None:
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


def decoded(
    counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first bad block, or their number where lengths do not fit, or VALID, int64 [1]; change bits; their number of each chunk."""
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
    return status_of(decoded(counts, positions, numel, stored)[0])


def patch_scatter_(
    base: torch.Tensor,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    difference: bool,
    out: torch.Tensor,
    digests: torch.Tensor,
) -> torch.Tensor:
    n, width, device = base.numel(), base.itemsize, base.device
    bad, mask, chunk_counts = decoded(counts, positions, n, values.numel())
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
    n, width, device, blocks = values.numel(), values.itemsize, values.device, blocks_of(values.numel())
    digests = torch.empty(blocks, 2, dtype=torch.int64, device=device)
    if n:
        launch.run("patch_digest", blocks, THREADS, width * SUMS_BYTES, device, values, digests, n, width)
    return digests
