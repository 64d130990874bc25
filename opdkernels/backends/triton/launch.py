"""How Triton kernels are launched: on the tensors' device and its current stream, with persistent programs."""

from __future__ import annotations

from typing import Any

import torch

PROGRAMS_PER_SM = 4  # two to four programs of eight warps run at once
INTERPRETED_SMS = 1  # without a GPU the programs run one after another


def num_sms(device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_programs(device: torch.device, tiles: int) -> int:
    """Programs of a persistent kernel: no more than there are tiles, and no more than the device runs at once."""
    return max(1, min(tiles, num_sms(device) * PROGRAMS_PER_SM))


def compile_options(num_warps: int, maxnreg: int | None, *, amd: bool) -> dict[str, Any]:
    """Triton's compile options. No fused multiply-add: every product and sum is rounded as on the CPU.

    Args:
        num_warps: Warps of 32 threads. AMD's have 64, so half as many are used there.
        maxnreg: Registers per thread at most, or None. AMD's compiler has no such option.
        amd: Whether the target is an AMD GPU.
    """
    options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": False}
    if amd:
        options["num_warps"] = max(1, num_warps // 2)
    elif maxnreg is not None:
        options["maxnreg"] = maxnreg
    return options


def run(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 8,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """Launch a kernel on the device of its first tensor.

    Args:
        kernel: A `triton.jit` function.
        grid: Number of programs per axis.
        arguments: Positional arguments of the kernel.
        num_warps: Warps per program.
        maxnreg: Registers per thread at most.
        constants: Its `tl.constexpr` parameters.
    """
    tensor = next(a for a in arguments if isinstance(a, torch.Tensor))
    with torch.cuda.device_of(tensor):
        kernel[grid](*arguments, **compile_options(num_warps, maxnreg, amd=torch.version.hip is not None), **constants)
