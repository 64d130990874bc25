"""How Triton kernels are started: on the tensors' device and its current stream, many programs that each take their share."""

from __future__ import annotations

from typing import Any

import torch

PROGRAMS_PER_PROCESSOR = 4  # two to four programs of eight warps run at once
PROCESSORS_INTERPRETED = 1  # without a GPU the programs run one after another


def processors(device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type != "cuda":
        return PROCESSORS_INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(device: torch.device, tiles: int) -> int:
    """Programs that share the tiles: no more than there are, and no more than the device runs at once."""
    return max(1, min(tiles, processors(device) * PROGRAMS_PER_PROCESSOR))


def options(warps: int, registers: int | None, *, amd: bool) -> dict[str, Any]:
    """How a kernel is compiled: products and sums are never fused, each rounds as on the CPU.

    A warp has 32 threads, AMD's 64. AMD's compiler takes no bound of registers.
    """
    chosen: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    if amd:
        chosen["num_warps"] = max(1, warps // 2)
    elif registers is not None:
        chosen["maxnreg"] = registers
    return chosen


def run(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 8, registers: int | None = None, **constants: Any
) -> None:
    """Start a kernel on the device of its first tensor, with at most so many registers a thread."""
    tensor = next(a for a in arguments if isinstance(a, torch.Tensor))
    with torch.cuda.device_of(tensor):
        kernel[grid](*arguments, **options(warps, registers, amd=torch.version.hip is not None), **constants)
