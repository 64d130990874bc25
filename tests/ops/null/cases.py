"""The inputs on which the kernel of `null` must agree with the reference."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from opdkernels.ops.null.layout import FIT_CHANGED_SD, FIT_SIZE, NUM_FITS, NUM_KINDS
from tests.ops.conformance import BF16, FP32, FP64, INT64, Allocator, Case, Family, Kernel, make_pair

BINS = 1 << 15
OPTIONS = ((0.01, 0.05, 0.1, 0.2), (0.001, 0.01, 0.05), (0, 0x3700, 0x3C00, BINS - 1))
RTOL = 1e-8  # orders of sums and libraries of functions differ; sizes are found to 2^-34
DEVIATIONS = {0: FIT_CHANGED_SD, 1: 1, 3: 1}  # columns of outputs
Tables = tuple[np.ndarray, np.ndarray, np.ndarray]  # bf16 bits of the bins, and coordinates of |W|, of |visible delta|


def histograms(base: torch.Tensor, trained: torch.Tensor) -> Tables:
    """The bins of a pair, without coordinates that are not finite in bf16."""
    w, v = base.bfloat16(), trained.bfloat16()
    delta = v - w
    finite = w.isfinite() & v.isfinite()
    counts = [
        np.bincount(x[finite].view(torch.int16).int().numpy() & 0x7FFF, minlength=BINS).astype(np.int64)
        for x in (w, delta)
    ]
    bits = np.flatnonzero(counts[0] + counts[1])
    return bits, counts[0][bits], counts[1][bits]


def dense(n: int, kind: str, size: float, scale: float, uniform: bool, seed: int = 0) -> tuple[Tables, bool]:
    """A dense update of one kind, or of a random mask, relative to the spread of the weights."""
    rng = np.random.default_rng(seed)
    w = rng.normal(0, scale, n)
    w = w if uniform else torch.from_numpy(w).bfloat16().double().numpy()
    z = rng.normal(0, 1, n)
    update = {"sign": np.sign(z), "normal": z, "heavy": z * np.exp(rng.normal(0, 1, n)), "mask": z * (z > 1)}[kind]
    return histograms(torch.from_numpy(w), torch.from_numpy(w + size * scale * update)), uniform


def inputs(tensors: Sequence[tuple[Tables, bool]], options: tuple = OPTIONS) -> list[Any]:
    joined = [torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *column])) for column in columns(tensors)]
    starts = torch.tensor([0, *itertools.accumulate(len(tables[0]) for tables, _ in tensors)])
    return [starts, *joined, torch.tensor([uniform for _, uniform in tensors], dtype=torch.bool), *options]


def columns(tensors: Sequence[tuple[Tables, bool]]) -> list[list[np.ndarray]]:
    return [[tables[i] for tables, _ in tensors] for i in range(3)]


def call_null(kernel: Kernel, allocator: Allocator, *flat: Any, keep: bool = True) -> list[torch.Tensor]:
    count, bins = len(flat[4]), len(flat[1])
    ratios, fractions, limits = (len(options) for options in flat[5:])
    outputs = [
        allocator.alloc((count, NUM_KINDS, NUM_FITS), FP64),
        allocator.alloc((count, NUM_KINDS, ratios, 2), FP64),
        allocator.alloc((count,), INT64),
        allocator.alloc((count, fractions, 2), FP64),
        allocator.alloc((count, limits), FP64),
    ]
    kept = [allocator.alloc((count, NUM_KINDS, BINS), FP64), allocator.alloc((NUM_KINDS, bins), FP64)] if keep else []
    kernel("null_")(*flat, *outputs, *(kept or (None, None)))
    return [*outputs, *kept]


def assert_near(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], flat: list[Any]) -> None:
    """Kinds are equal, numbers up to their rounding. Standard deviations, which are roots of differences, by their
    squares; expected counts up to a part of all coordinates, as differences of probabilities."""
    coordinates = max(int(flat[2].sum()), 1)
    for i, (output, reference) in enumerate(zip(outputs, expected, strict=True)):
        output, reference = output.cpu().clone(), reference.clone()
        if i in DEVIATIONS:
            output[..., DEVIATIONS[i]] **= 2
            reference[..., DEVIATIONS[i]] **= 2
        if i == 0:
            sizes = [tensor[..., FIT_SIZE] for tensor in (output, reference)]
            torch.testing.assert_close(*sizes, rtol=RTOL, atol=0, equal_nan=True)
        torch.testing.assert_close(
            output,
            reference,
            rtol=RTOL,
            atol=RTOL * (coordinates if i == 5 else 1),
            equal_nan=True,
            msg=lambda text, i=i: f"output {i}: {text}",
        )


def case(name: str, *flat: Any, keep: bool = True) -> Case:
    return Case(name, lambda: list(flat), functools.partial(call_null, keep=keep), assert_near)


def cases(n: int) -> Iterator[Case]:
    tensors = [
        dense(n, kind, size, 0.03, uniform)
        for kind in ("sign", "normal", "heavy", "mask")
        for size in (3e-4, 2e-3)
        for uniform in (False, True)
    ]
    yield case(f"dense and masked {n}", *inputs(tensors))
    hostile = [(histograms(*make_pair(n, dtype, seed=n)), dtype != BF16) for dtype in (BF16, FP32)]
    yield case(f"hostile {n}", *inputs(hostile))


def special_cases() -> Iterator[Case]:
    n = 20_000
    for uniform in (False, True):
        # Each alone: the reference has one window for the tensors of a call, and counts what is beyond it at its start.
        for exponent in (-128, -120, -60, 0, 60, 120):
            tensor = dense(n, "normal", 1e-3, 2.0**exponent, uniform)
            yield case(f"weights of 2^{exponent}, uniform {uniform}", *inputs([tensor]))
        for kind, size in itertools.product(("sign", "normal", "heavy"), (1e-8, 1e-5, 1, 1e6)):
            tensor = dense(n, kind, size, 1.0, uniform)
            yield case(f"{kind} update of {size}, uniform {uniform}", *inputs([tensor]))
        for w, d in itertools.product((0, 1, 0x80, 0x100, 0x3F80, 0x7F7F), (0, 1, 0x3C00, 0x7F7F, 0x7F80)):
            bits = np.array(sorted({w, d}))
            tables = bits, (bits == w).astype(np.int64), (bits == d).astype(np.int64)
            yield case(f"one weight {w:x}, change {d:x}, uniform {uniform}", *inputs([(tables, uniform)]))
    bits, base, delta = dense(n, "normal", 1e-3, 1.0, False)[0]  # real tallies have bins that neither side uses
    every = np.arange(BINS)
    counts = [np.zeros(BINS, np.int64) for _ in range(2)]
    counts[0][bits], counts[1][bits] = base, delta
    yield case("bins without coordinates", *inputs([((every, *counts), False)]))
    unchanged = histograms(torch.ones(100), torch.ones(100))
    empty = (np.zeros(0, np.int64),) * 3
    mixed = [(unchanged, False), (empty, False), (empty, True), dense(n, "normal", 1e-3, 1.0, True), (unchanged, True)]
    yield case("unchanged and empty", *inputs(mixed))
    yield case("no tensors", *inputs([]))
    yield case("no options", *inputs(mixed, ((), (), ())))
    yield case("no histograms wanted", *inputs(mixed), keep=False)
    yield case("all and nothing", *inputs(mixed, ((0.0, 1.0), (0.0, 1.0), (0, BINS - 1))))


def check_repeated(kernel: Kernel, expected_by: Kernel, device: torch.device, tile: int, times: int) -> None:
    """Counts of that many times the coordinates: the same sizes, and as many times the changes."""
    (bits, base, delta), uniform = dense(tile, "normal", 1e-3, 1.0, False)
    flat = inputs([((bits, times * base, times * delta), uniform)])
    outputs = call_null(kernel, Allocator(device), *Allocator(device).put(flat))
    assert_near(outputs, call_null(expected_by, Allocator(), *flat), flat)


FAMILY = Family("null", ("null_",), cases, special_cases, check_repeated, bytes_per_coordinate=0)
