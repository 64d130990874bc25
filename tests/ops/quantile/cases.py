"""The inputs on which every backend of `quantile` must equal the reference."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tests.ops.conformance import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    Allocator,
    Case,
    Family,
    Kernel,
    assert_equal,
    make_pair,
)


def make_mask(n: int, seed: int = 0) -> torch.Tensor:
    """Random bits; those beyond n are set, and must not count."""
    bits = np.ones((n + 7) // 8 * 8, np.uint8)
    bits[:n] = np.random.default_rng(seed).random(n) < 0.3
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def ranks(n: int) -> list[int]:
    return sorted({k for k in (1, 2, n // 100, n // 20, n // 10, n // 5, n // 2, n - 1, n) if 1 <= k <= n})


def hostile_arrays(n: int) -> Iterator[tuple[str, np.ndarray]]:
    """Data for which a sampled bracket misses the quantile, or holds too many values."""
    rng = np.random.default_rng(0)
    ramp = np.arange(n, dtype=np.float64)
    yield "equal", np.full(n, -0.5)
    yield "zeros", np.where(rng.random(n) < 0.5, 0.0, -0.0)
    yield "ascending", ramp
    yield "descending", -ramp[::-1]
    yield "few values", rng.integers(0, 4, n).astype(np.float64)
    yield "almost all zero", np.where(ramp % 1000 == 0, ramp, 0.0)
    yield "one value among many ties", np.where(rng.random(n) < 0.199, 1.0, rng.random(n) + 1)
    yield "sorted with large steps", np.where(ramp < n // 5 + 3, ramp * 1e-300, ramp)
    yield "infinite", np.where(ramp % 3 == 0, np.inf, -ramp)
    yield "not a number", np.where(ramp % 2 == 0, np.nan, np.where(rng.random(n) < 0.5, -np.nan, ramp))
    yield "subnormal", rng.integers(0, 100, n) * 1e-45
    yield "every scale", np.exp(rng.uniform(-100, 80, n)) * rng.choice([-1, 1], n)


def call_quantile(
    kernel: Kernel, allocator: Allocator, values: torch.Tensor, k: list[int], mask: torch.Tensor | None
) -> list[torch.Tensor]:
    """Thresholds and counts of all ranks with a mask and without one, and of one rank, from the top and the bottom."""
    outputs = []
    for largest in (True, False):
        outputs += kernel("quantile")(values, k, largest, mask)
        if mask is not None:
            outputs += kernel("quantile")(values, k, largest, None)
            outputs += kernel("quantile")(values, [values.numel() // 2 + 1], largest, None)
    return outputs


def case(name: str, values: Any, k: list[int], masked: bool = True) -> Case:
    def make_inputs() -> list[Any]:
        tensor = values()
        return [tensor, k, make_mask(tensor.numel()) if masked else None]

    return Case(name, make_inputs, call_quantile)


def cases(n: int) -> Iterator[Case]:
    for dtype in DTYPES:
        yield case(f"{dtype} {n}", lambda dtype=dtype: make_pair(n, dtype, seed=n)[0], ranks(n))


def with_factor(n: int, dtype: torch.dtype, factor: float) -> torch.Tensor:
    """Values of which every third is multiplied."""
    values = make_pair(n, dtype)[0]
    values[::3] *= factor
    return values


def special_cases() -> Iterator[Case]:
    for dtype in (BF16, FP32, FP64):
        for name, values in hostile_arrays(3001):
            yield case(f"{dtype} {name}", lambda v=values, d=dtype: torch.from_numpy(v.copy()).to(d), [7, 600, 3001])
    for dtype in DTYPES:
        yield case(f"{dtype} empty, no rank", functools.partial(torch.zeros, 0, dtype=dtype), [], masked=False)
        yield case(f"{dtype} empty, one rank", functools.partial(torch.zeros, 0, dtype=dtype), [1], masked=False)
        yield case(
            f"{dtype} all NaN", functools.partial(torch.full, (40,), -math.nan, dtype=dtype), [2, 40], masked=False
        )
    for dtype in (BF16, FP16):
        every = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.int16)).view(dtype)
        yield case(f"{dtype} every bit pattern", lambda v=every: v, [1, 300, 40_000, 63_000], masked=False)
    for dtype in (BF16, FP32):
        yield case(f"{dtype} large", functools.partial(with_factor, 3000, dtype, 1000), [40, 1200, 2500])
        yield case(f"{dtype} many zeros", functools.partial(with_factor, 5001, dtype, 0), [40, 2000, 4900])


def check_repeated(kernel: Kernel, expected_by: Kernel, device: torch.device, tile: int, times: int) -> None:
    values, k = make_pair(tile + 3)[0], [tile // 10, tile // 2]
    expected = expected_by("quantile")(values, k, True, None)
    outputs = kernel("quantile")(values.to(device).repeat(times), [times * rank for rank in k], True, None)
    assert_equal(outputs, [expected[0], times * expected[1]], [])


FAMILY = Family("quantile", ("quantile",), cases, special_cases, check_repeated, bytes_per_coordinate=4)
