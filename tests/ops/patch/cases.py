"""The inputs on which every backend of `patch` must equal the reference, and the changes that each must reject."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from opdkernels.ops.patch import BITS, Changes, bits, position_bytes
from opdkernels.ops.patch.layout import BLOCK, blocks_of
from tests.ops.conformance import BF16, BYTES, Allocator, Case, Family, Kernel, assert_equal, reference, run_case

INT16, INT32 = torch.int16, torch.int32
BAD_OFFSETS = {(5, 5): "repeated", (7, 3): "unsorted", (5, 999): "beyond", (5, 65535): "far beyond", (5, 998): "last"}


def make_bits(
    n: int, dtype: torch.dtype, density: float, seed: int = 0, every_byte: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Any bit patterns, NaN payloads included; about a fraction `density` is changed, in one byte or in every byte."""
    rng = np.random.default_rng([seed, n])
    width = dtype.itemsize
    w = rng.integers(0, 256, (n, width), np.uint8)
    v = w.copy()
    changed = rng.random(n) < density
    if every_byte:
        v[changed] ^= rng.integers(1, 256, (int(changed.sum()), width), np.uint8)
    else:
        v[changed, rng.integers(0, width)] ^= rng.integers(1, 256, int(changed.sum()), np.uint8)
    if dtype == torch.bool:
        w, v = w & 1, v & 1
    base, trained = (torch.from_numpy(side.ravel()).view(dtype) for side in (w, v))
    return base, trained


def gather(
    kernel: Kernel, allocator: Allocator, w: torch.Tensor, v: torch.Tensor, difference: bool = False
) -> list[torch.Tensor]:
    """Counts, positions and values of what changed, and digests of both sides."""
    n, blocks = w.numel(), blocks_of(w.numel())
    counts, positions = allocator.zeros(blocks, dtype=INT32), allocator.zeros((n + 7) // 8, dtype=BYTES)
    values, digests = allocator.zeros(n, dtype=w.dtype), allocator.zeros(2, blocks, 2)
    kernel("patch_gather_")(w, v, difference, counts, positions, values, digests)
    lengths = [position_bytes(count, min(BLOCK, n - block * BLOCK)) for block, count in enumerate(counts.tolist())]
    return [counts, positions[: sum(lengths)], values[: int(counts.sum())], digests]


def scatter(
    kernel: Kernel,
    allocator: Allocator,
    w: torch.Tensor,
    changes: list[torch.Tensor],
    difference: bool = False,
    in_place: bool = False,
) -> list[torch.Tensor]:
    """Status, the trained side, and its digests."""
    out = w if in_place else allocator.zeros(w.numel(), dtype=w.dtype)
    digests = allocator.zeros(blocks_of(w.numel()), 2)
    return [kernel("patch_scatter_")(w, *changes, difference, out, digests), out, digests]


def call_patch(
    kernel: Kernel, allocator: Allocator, w: torch.Tensor, v: torch.Tensor, difference: bool, in_place: bool = False
) -> list[torch.Tensor]:
    """Gathers, checks and scatters; digests of both sides, of the restored side and of the base again."""
    *changes, digests = gather(kernel, allocator, w, v, difference)
    counts, positions, values = changes
    status = kernel("patch_check")(counts, positions, w.numel(), values.numel())
    digest = kernel("patch_digest")(w)
    return [*changes, digests, status, digest, *scatter(kernel, allocator, w, changes, difference, in_place)]


def call_unchecked(
    kernel: Kernel, allocator: Allocator, w: torch.Tensor, counts: torch.Tensor, *changes: torch.Tensor
) -> list[torch.Tensor]:
    """The first invalid block, by the check and by the scatter, and what the scatter writes."""
    positions, values = changes
    status, out, _ = scatter(kernel, allocator, w, [counts, positions, values])
    return [kernel("patch_check")(counts, positions, w.numel(), values.numel()), status, out]


def assert_same_rejection(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], inputs: list[Any]) -> None:
    """The CPU kernel may write valid blocks of changes that it rejects."""
    compared = 3 if int(expected[0]) < 0 else 2
    assert_equal(outputs[:compared], expected[:compared], inputs)


def assert_rejection_writes_nothing(kernel: Kernel, case: Case) -> None:
    status, _, out = run_case(case, kernel)
    assert int(status) < 0 or not out.any(), case.name


def cases(n: int) -> Iterator[Case]:
    for dtype, (density, difference) in itertools.product(BITS.values(), ((0.17, False), (0.01, True))):
        yield Case(
            f"{dtype} {n} changed {density}",
            lambda d=dtype, p=density, x=difference: [*make_bits(n, d, p, every_byte=x), x],
            call_patch,
        )


def mask_then_offsets(dtype: torch.dtype) -> list[Any]:
    """A block whose positions are stored as a mask, then one with offsets."""
    w, v = make_bits(BLOCK + 5000, dtype, 0.02)
    v[: BLOCK // 2] = ~w[: BLOCK // 2]
    return [w, v, True]


def three_blocks() -> list[Any]:
    """A block with a mask, one with offsets, and one of which a tile is unchanged."""
    w, v = make_bits(2 * BLOCK + 5000, INT16, 0.02)
    v[: BLOCK // 2] = ~w[: BLOCK // 2]
    v[2 * BLOCK :] = w[2 * BLOCK :]
    v[-3] ^= 5
    return [w, v, True]


def nan_payloads() -> list[Any]:
    """A NaN of another payload and a zero of another sign are changes; a NaN is equal to itself."""
    sides = [0x7FC0, 0x7FC0, 0, 0x8000, 0x3F80], [0x7FC0, 0x7FC1, 0x8000, 0x8000, 0x3F80]
    return [*(torch.tensor(side, dtype=INT32).to(INT16) for side in sides), False]


def last_changed(count: int) -> list[Any]:
    w = torch.zeros(BLOCK, dtype=INT16)
    v = w.clone()
    v[BLOCK - count :] = 1
    return [w, v, False]


def with_counts(changes: Changes, block: int, by: int) -> Changes:
    counts = changes.counts.clone()
    counts[block] += by
    return replace(changes, counts=counts)


def flip_bit(changes: Changes) -> Changes:
    positions = changes.positions.clone()
    positions[0] ^= 1
    return replace(changes, positions=positions)


MALFORMED: dict[str, Callable[[Changes], Changes]] = {  # what `gather` never returns
    "one more counted": lambda c: with_counts(c, 0, 1),
    "one fewer counted": lambda c: with_counts(c, 0, -1),
    "negative count": lambda c: with_counts(c, -1, -1_000_000),
    "more than the block has": lambda c: with_counts(c, 0, BLOCK),
    "positions cut off": lambda c: replace(c, positions=c.positions[:-1].clone()),
    "positions too long": lambda c: replace(c, positions=torch.cat([c.positions, c.positions[:1]])),
    "values cut off": lambda c: replace(c, values=c.values[:-1].clone()),
    "values too many": lambda c: replace(c, values=torch.cat([c.values, c.values[:1]])),
    "no positions": lambda c: replace(c, positions=c.positions[:0].clone()),
    "a bit flipped": flip_bit,
}


@functools.lru_cache(maxsize=8)
def gathered(n: int, dtype: torch.dtype, density: float) -> Changes:
    w, v = (bits(side) for side in make_bits(n, dtype, density))
    return Changes(*gather(reference, Allocator(), w, v)[:3])


def malformed(name: str, n: int, density: float) -> list[Any]:
    changes = MALFORMED[name](gathered(n, BF16, density))
    return [torch.zeros(n, dtype=INT16), changes.counts, changes.positions, changes.values]


def three_bad_blocks() -> list[Any]:
    changes = gathered(4 * BLOCK, BYTES, 0.3)
    positions = changes.positions.clone()
    for block in (3, 1, 2):
        positions[block * BLOCK // 8] ^= 1
    return [torch.zeros(4 * BLOCK, dtype=BYTES), changes.counts, positions, changes.values]


def one_block(name: str, numel: int, positions: torch.Tensor, count: int) -> Case:
    inputs = [torch.zeros(numel, dtype=INT16), torch.tensor([count], dtype=INT32), positions]
    return Case(name, lambda: [*inputs, torch.zeros(count, dtype=INT16)], call_unchecked, assert_same_rejection)


def malformed_cases() -> Iterator[Case]:
    for n, density, name in itertools.product((999, BLOCK + 1001), (0.01, 0.3), MALFORMED):
        yield Case(
            f"{name} {n} {density}",
            functools.partial(malformed, name, n, density),
            call_unchecked,
            assert_same_rejection,
        )
    for offsets, name in BAD_OFFSETS.items():
        coded = torch.tensor([byte for offset in offsets for byte in (offset & 255, offset >> 8)], dtype=BYTES)
        yield one_block(f"offsets {name}", 999, coded, 2)
    for last in (0b100000, 0b10000):
        yield one_block(f"mask of 13 bits ending in {last:#b}", 13, torch.tensor([1, last], dtype=BYTES), 2)
    for at in (None, 15, 16, 17):
        offsets = torch.arange(0, 40, dtype=INT16)
        if at:
            offsets[at] = offsets[at - 1]
        yield one_block(f"40 offsets, {at} repeated", 999, offsets.view(BYTES), 40)
    yield Case("three bad blocks", three_bad_blocks, call_unchecked, assert_same_rejection)


def special_cases() -> Iterator[Case]:
    for density in (0.0, 1 / 16, 1.0):
        yield Case(f"density {density}", lambda p=density: [*make_bits(2 * BLOCK + 77, INT16, p), False], call_patch)
    for dtype in BITS.values():
        yield Case(f"{dtype} mask, offsets", functools.partial(mask_then_offsets, dtype), call_patch)
    yield Case("mask, offsets, unchanged tile", three_blocks, call_patch)
    yield Case("NaN payloads, signed zeros", nan_payloads, call_patch)
    for count in (BLOCK // 16, BLOCK // 16 - 1):  # a mask is as short as offsets, and longer
        yield Case(f"last {count} changed", functools.partial(last_changed, count), call_patch)
    for difference in (False, True):
        yield Case(
            f"in place, difference {difference}",
            lambda x=difference: [*make_bits(BLOCK + 77, INT16, 0.17), x, True],
            call_patch,
        )
    yield from malformed_cases()


def check_repeated(kernel: Kernel, expected_by: Kernel, device: torch.device, tile: int, times: int) -> None:
    sides = make_bits(tile // BLOCK * BLOCK, INT16, 0.17, every_byte=True)
    expected = call_patch(expected_by, Allocator(), *sides, False)
    outputs = call_patch(kernel, Allocator(device), *(side.to(device).repeat(times) for side in sides), False)
    for i, (output, once) in enumerate(zip(outputs, expected, strict=True)):
        if i not in (4, 6):  # statuses
            dim = 1 if i == 3 else 0  # digests [2, blocks, 2]
            output, once = output.unflatten(dim, (times, -1)), once.unsqueeze(dim)
        assert bool((output == once.to(device)).all()), f"output {i} is not that of one tile"


FAMILY = Family(
    "patch",
    ("patch_gather_", "patch_scatter_", "patch_check", "patch_digest"),
    cases,
    special_cases,
    check_repeated,
    bytes_per_coordinate=14,
)
