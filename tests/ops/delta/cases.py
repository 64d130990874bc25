"""The inputs on which every backend of `delta` must equal the reference."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from opdkernels.backends.layout import BINS, SUM_LIMBS
from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, THRESHOLDS, from_limbs, to_limbs
from opdkernels.ops.delta.layout import HIST_BASE_OVER, NUM_COUNTS, NUM_SUMS
from tests.ops.conformance import (
    BF16,
    BYTES,
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

PAIRS = ((BF16, BF16), (FP32, FP32), (FP64, FP64), (FP16, FP16), (BF16, FP32))


def empty_tally(allocator: Allocator, num_thresholds: int = len(DEFAULT_THRESHOLD_BITS)) -> list[torch.Tensor]:
    """Tables, counts, sums and maximum, to which the operator adds."""
    shapes = (HIST_BASE_OVER + num_thresholds, BINS), (NUM_COUNTS,), (NUM_SUMS, SUM_LIMBS)
    return [*(allocator.zeros(*shape) for shape in shapes), allocator.zeros(1, dtype=FP64)]


def call_delta(
    kernel: Kernel,
    allocator: Allocator,
    base: torch.Tensor,
    trained: torch.Tensor,
    threshold_bits: Sequence[int] = DEFAULT_THRESHOLD_BITS,
    thresholds: Sequence[float] = THRESHOLDS,
    split: int | None = None,
) -> list[torch.Tensor]:
    """Tables, counts, sums, maximum and change bits.

    With `split`, counts the coordinates before it, then adds the rest, without change bits.
    """
    outputs = empty_tally(allocator, len(threshold_bits))
    if split is not None:
        for part in (slice(0, split), slice(split, None)) if split else (slice(None),):
            kernel("delta_")(base[part], trained[part], list(threshold_bits), list(thresholds), *outputs, None)
        return outputs
    mask = allocator.alloc([(base.numel() + 7) // 8], BYTES).fill_(255)
    kernel("delta_")(base, trained, list(threshold_bits), list(thresholds), *outputs, mask)
    return [*outputs, mask]


def call_many(
    kernel: Kernel,
    allocator: Allocator,
    base: Sequence[torch.Tensor],
    trained: Sequence[torch.Tensor],
    capacity: int = 4 * BINS,
) -> list[torch.Tensor]:
    """The outputs of `delta_many_` for the pairs that fit."""
    pairs, rows = len(base), HIST_BASE_OVER + len(DEFAULT_THRESHOLD_BITS)
    num_bins, bin_bits = allocator.zeros(pairs), allocator.zeros(capacity)
    tables, counts = allocator.zeros(rows, capacity).fill_(7), allocator.zeros(pairs, NUM_COUNTS).fill_(7)
    sums = allocator.zeros(pairs, NUM_SUMS, SUM_LIMBS).fill_(7)
    maximum = allocator.zeros(pairs, dtype=FP64).fill_(7)
    outputs = num_bins, bin_bits, tables, counts, sums, maximum
    kernel("delta_many_")(base, trained, list(DEFAULT_THRESHOLD_BITS), list(THRESHOLDS), *outputs)
    fit = int((num_bins >= 0).sum())
    used = int(num_bins[:fit].sum())
    return [num_bins, bin_bits[:used], tables[:, :used].contiguous(), counts[:fit], sums[:fit], maximum[:fit]]


def many_pairs(sizes: Sequence[int]) -> list[list[torch.Tensor]]:
    """Pairs of all dtypes in turn."""
    pairs = [make_pair(n, *PAIRS[i % len(PAIRS)], seed=i) for i, n in enumerate(sizes)]
    return [[base for base, _ in pairs], [trained for _, trained in pairs]]


def case(name: str, make: Callable[[], Sequence[torch.Tensor]], *options: Any) -> Case:
    return Case(name, lambda: [*make(), *options], call_delta)


def pair_case(n: int, base: torch.dtype, trained: torch.dtype) -> Case:
    return case(f"{base}, {trained} {n}", functools.partial(make_pair, n, base, trained, seed=n))


def cases(n: int) -> Iterator[Case]:
    for base, trained in PAIRS:
        yield pair_case(n, base, trained)


def bf16_patterns(seed: int) -> list[torch.Tensor]:
    """Every bf16 bit pattern against a permutation of them."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(BF16)
    return [every, every[torch.randperm(65536, generator=torch.Generator().manual_seed(seed))]]


def large(dtype: torch.dtype) -> list[torch.Tensor]:
    """Magnitudes beyond the tables in shared memory."""
    base, trained = make_pair(3000, dtype)
    base[::3] *= 1000
    return [base, trained]


def normal(n: int, dtype: torch.dtype, scale: float) -> list[torch.Tensor]:
    return [scale * torch.randn(n, dtype=dtype, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]


def outliers(dtype: torch.dtype) -> list[torch.Tensor]:
    """Windows of a sum hold 128 bits; what is below them, here next to 1e30, is added separately."""
    base, trained = normal(60_000, dtype, 1e-20)
    base[[5, 30_000]] = 1e30
    trained[700] = -3e38
    return [base, trained]


def unchanged_zeros(count: int) -> list[torch.Tensor]:
    base, trained = make_pair(1800, hostile=False)
    base[:count] = trained[:count] = 0
    return [base, trained]


def special_cases() -> Iterator[Case]:
    for base, trained in itertools.product(DTYPES, DTYPES):
        if (base, trained) not in PAIRS:
            yield pair_case(1025, base, trained)
    for seed in range(3):
        yield case(f"bf16 patterns {seed}", functools.partial(bf16_patterns, seed))
    for threshold_bits in ((0,), (5,), (0, 0x3728), (0, 1, 2, 0x7F7F)):
        yield case(f"magnitudes over {threshold_bits}", functools.partial(make_pair, 2000), threshold_bits)
    # Exact in fp32 or not, in no order, subnormal, beyond fp32, not a magnitude at all.
    for dtype in (BF16, FP32, FP64):
        for limits in ((2.0**-7, 1e-40, 1e300, 0.0, 5e-324), (-1.0, float("nan"), float("inf"), -0.0, 1e-5)):
            yield case(
                f"{dtype} below {limits}", functools.partial(make_pair, 2000, dtype), DEFAULT_THRESHOLD_BITS, limits
            )
    for scale in (5e-324, 1e-310, 1e-290, 1e-150, 1e38):
        yield case(f"doubles of {scale}", functools.partial(normal, 1500, FP64, scale))
    for dtype in (FP32, FP64):
        yield case(f"{dtype} outliers", functools.partial(outliers, dtype))
    for dtype in (BF16, FP32):
        yield case(f"{dtype} large", functools.partial(large, dtype))
    for count in (0, 900):
        yield case(f"{count} unchanged zeros", functools.partial(unchanged_zeros, count))
    yield Case("many pairs", lambda: many_pairs((5, 0, 1000, 1, 300, 70, 64)), call_many)
    yield Case("many pairs that do not fit", lambda: [*many_pairs((5, 2000, 1000)), 3000], call_many)
    yield Case("no pairs", lambda: [[], []], call_many)
    yield case("added to counts", functools.partial(make_pair, 3000), DEFAULT_THRESHOLD_BITS, THRESHOLDS, 1000)


def check_repeated(kernel: Kernel, expected_by: Kernel, device: torch.device, tile: int, times: int) -> None:
    pair = make_pair(tile + 3)
    tables, counts, sums, maximum = call_delta(expected_by, Allocator(), *pair, split=0)
    sums = torch.tensor([to_limbs(times * from_limbs(row.tolist())) for row in sums])
    outputs = call_delta(kernel, Allocator(device), *(side.to(device).repeat(times) for side in pair), split=0)
    assert_equal(outputs, [times * tables, times * counts, sums, maximum], [])


FAMILY = Family("delta", ("delta_", "delta_many_"), cases, special_cases, check_repeated, bytes_per_coordinate=6)
