"""What a device reaches at most, measured with torch: the limits that rates of kernels are compared with.

    read     bytes per second of the sum of an int64 array
    copy     bytes per second, read and written, of a copy of an array
    update   bytes per second, read and written, of an addition to an array in place
    product  operations per second of a product of square matrices, by dtype

Each is the fastest of some rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from opdkernels.benchmark.timing import paired

ROUNDS = 5
PRODUCT_DTYPES = {"fp64 product": torch.float64, "fp32 product": torch.float32, "bf16 product": torch.bfloat16}


def read_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes per second of reading an array of `num_bytes` bytes."""
    data = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)
    return data.nbytes / fastest_s(data.sum, device)


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes per second, read and written, of a copy of an array of `num_bytes` bytes."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest_s(lambda: target.copy_(source), device)


def update_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes per second, read and written, of an addition in place to an array of `num_bytes` bytes."""
    data = torch.ones(num_bytes // 4, device=device)
    return 2 * data.nbytes / fastest_s(lambda: data.add_(1), device)


def product_rate(device: torch.device, side: int, dtype: torch.dtype) -> float:
    """Operations per second of a product of matrices of `side` rows and columns."""
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / fastest_s(lambda: a @ a, device)


def fastest_s(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest round."""
    return min(paired({"call": call}, device, rounds=ROUNDS)["call"])


BANDWIDTHS = {"read": read_rate, "copy": copy_rate, "update": update_rate}


def unit_of(limit: str) -> str:
    """The unit of a limit's work: "bytes" or "operations"."""
    return "bytes" if limit in BANDWIDTHS else "operations"


def measure(limit: str, device: torch.device, num_bytes: int, side: int) -> float:
    """The rate of one limit.

    Args:
        limit: A name of the table above; products with their dtype, as "fp64 product".
        device: The device.
        num_bytes: Size of the array.
        side: Rows and columns of the matrices.

    Returns:
        Bytes or operations per second.
    """
    if limit in BANDWIDTHS:
        return BANDWIDTHS[limit](device, num_bytes)
    return product_rate(device, side, PRODUCT_DTYPES[limit])
