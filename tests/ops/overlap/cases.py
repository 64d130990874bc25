"""The inputs on which every backend of `overlap` must equal the reference."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from opdkernels.backends.layout import BINS
from opdkernels.ops.overlap import DEFAULT_THRESHOLD_BITS
from opdkernels.ops.overlap.layout import NUM_COUNTS
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


def make_runs(
    n: int, dtypes: Sequence[torch.dtype] = (BF16,) * 3, *, seed: int = 0, hostile: bool = True
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base of the first dtype, a run of each other dtype; the first and the third run change the same coordinates."""
    base = make_pair(n, FP64, seed=seed, hostile=hostile)[0]
    runs = []
    for r in range(len(dtypes) - 1):
        before, after = make_pair(n, FP64, seed=seed, hostile=False)
        update = (after - before) * torch.from_numpy(np.random.default_rng([seed, r]).normal(0, 2, n))
        run = base + update.roll(r % 2)
        if hostile and n:
            run[r::211] = math.nan
            run[r + 1 :: 223] = math.inf
            run[r + 2 :: 227] = 3.3e38
            run[r + 3 :: 229] = -0.0
        runs.append(run.to(dtypes[r + 1]))
    return base.to(dtypes[0]), runs


def call_overlap(
    kernel: Kernel,
    allocator: Allocator,
    base: torch.Tensor,
    runs: list[torch.Tensor],
    threshold_bits: int = DEFAULT_THRESHOLD_BITS,
    split: int = 0,
) -> list[torch.Tensor]:
    """Joint counts; where `split` is not 0, of the coordinates before it, then added to those of the rest."""
    shapes = (BINS,), (len(runs), BINS), (len(runs), len(runs)), (len(runs) + 1,), (NUM_COUNTS,)
    outputs = [allocator.zeros(*shape) for shape in shapes]
    for part in (slice(0, split), slice(split, None)) if split else (slice(None),):
        kernel("overlap_")(base[part], [run[part] for run in runs], threshold_bits, *outputs)
    return outputs


def runs_case(n: int, dtypes: Sequence[torch.dtype], hostile: bool = True) -> Case:
    name = f"{', '.join(map(str, dtypes)) if len(dtypes) <= 3 else f'{len(dtypes) - 1} runs of {dtypes[1]}'} {n}"
    return Case(
        name if hostile else f"{name} finite",
        lambda: list(make_runs(n, dtypes, seed=n, hostile=hostile)),
        call_overlap,
    )


def cases(n: int) -> Iterator[Case]:
    for dtypes in ((BF16, BF16, BF16), (FP32, FP32, BF16), (BF16, FP64, FP16, BF16, FP32, BF16)):
        yield runs_case(n, dtypes)


def dtype_cases(n: int, hostile: bool = True) -> Iterator[Case]:
    """Every pair of dtypes."""
    for base, run in itertools.product(DTYPES, DTYPES):
        yield runs_case(n, (base, run, base), hostile)


def many_runs(n: int) -> Iterator[Case]:
    for count in (3, 4, 5, 9, 16):
        yield runs_case(n, (BF16,) * (count + 1))


def large(n: int = 3000) -> list[Any]:
    """Magnitudes beyond the tables in shared memory."""
    base, runs = make_runs(n)
    base[::3] *= 1000
    return [base, runs]


def zeros(count: int) -> list[Any]:
    """A base of zeros, of which every run changes some."""
    base = torch.zeros(3000, dtype=BF16)
    return [base, [base.index_fill(0, torch.arange(r, 3000, 3 + r), 0.5) for r in range(count)]]


def neighbours(count: int, threshold_bits: int) -> list[Any]:
    """Differences at, next to and halfway between bf16 neighbours: kernels compare before rounding."""
    base = torch.tensor([1.0, 256.0], dtype=BF16).repeat(512)
    steps = torch.arange(512).repeat_interleave(2)
    runs = [base + steps * 2.0**-7, base - steps * 1.0, base * (1 + steps * 2.0**-9)]
    return [base, runs[:count], threshold_bits]


def neighbour_cases(count: int, thresholds: Iterable[int]) -> Iterator[Case]:
    for threshold_bits in thresholds:
        name = f"threshold {threshold_bits:#06x} of {count} runs"
        yield Case(name, functools.partial(neighbours, count, threshold_bits), call_overlap)


def bf16_patterns(count: int) -> list[Any]:
    """Every bf16 bit pattern against permutations of them."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(BF16)
    seeds = range(count)
    return [every, [every[torch.randperm(65536, generator=torch.Generator().manual_seed(seed))] for seed in seeds]]


def special_cases() -> Iterator[Case]:
    for n in (0, 1, 31, 1023, 1025):
        yield from dtype_cases(n)
    yield from many_runs(20_001)
    for count in (2, 5):
        yield runs_case(5001, (BF16, FP32, *(BF16,) * (count - 1)))
    yield Case("large", large, call_overlap)
    for count in (2, 5):
        yield Case(f"zeros of {count} runs", functools.partial(zeros, count), call_overlap)
    yield from neighbour_cases(3, (0, 1, 0x3B80, 0x3B81, *range(0x3F7E, 0x3F84), 0x42FF, 0x7F7F))
    for count in (2, 3):
        yield Case(f"bf16 patterns {count}", functools.partial(bf16_patterns, count), call_overlap)
    yield Case("added to counts", lambda: [*make_runs(2000), DEFAULT_THRESHOLD_BITS, 700], call_overlap)


def check_repeated(kernel: Kernel, expected_by: Kernel, device: torch.device, tile: int, times: int) -> None:
    base, runs = make_runs(tile + 3)
    expected = call_overlap(expected_by, Allocator(), base, runs)
    base, *runs = (side.to(device).repeat(times) for side in (base, *runs))
    assert_equal(call_overlap(kernel, Allocator(device), base, runs), [times * output for output in expected], [])


FAMILY = Family("overlap", ("overlap_",), cases, special_cases, check_repeated, bytes_per_coordinate=8)
