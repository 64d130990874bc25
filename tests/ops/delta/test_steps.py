"""`delta` on the CPU for many coordinates, which csrc/delta/steps.inl counts by the bf16 steps from w to v."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, THRESHOLDS
from tests.ops.conformance import BF16, FP16, FP32, Case, check_case, dispatched, make_pair
from tests.ops.delta.cases import case

BF16_SIZE, WIDE_SIZE = (1 << 18) + 1000, (1 << 15) + 700  # from which they are counted so, in one thread
BLOCK = 1024  # coordinates of a block of a wider pair


def numbers(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def update(n: int, dtype: torch.dtype, trained: torch.dtype, scale: float = 1.0) -> list[torch.Tensor]:
    """As training leaves it: a fifth of the coordinates changes in bf16."""
    base = (scale * 0.02 * numbers(n, 0)).to(dtype)
    return [base, (base.float() + scale * 1e-5 * numbers(n, 1)).to(trained)]


def every_step(first: int, last: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Every finite bf16 number, and numbers that are first to last steps away."""
    bits = torch.arange(65536, dtype=torch.int32)
    bits = bits[(bits & 0x7FFF) < 0x7F00]
    base = bits.repeat(last - first + 1)
    trained = torch.cat([bits + step for step in range(first, last + 1)])
    finite = ((trained & 0x7FFF) < 0x7F00) & (trained >= 0) & (trained < 65536)
    return [side[finite].to(torch.int16).view(BF16).to(dtype) for side in (base, trained)]


def range_of_binades(binades: int) -> list[torch.Tensor]:
    """Blocks whose values span so many binades, of all phases."""
    base = torch.ldexp(1 + numbers(WIDE_SIZE, 2).abs() % 1, torch.arange(WIDE_SIZE) % binades - 20)
    return [base, base + 1e-3 * base * numbers(WIDE_SIZE, 3)]


def around_thresholds() -> list[torch.Tensor]:
    """Differences that are neighbours of the thresholds and of the ends of their bins."""
    nearest = torch.tensor(THRESHOLDS, dtype=torch.float32).view(torch.int32)
    bits = torch.cat([nearest + i for i in range(-3, 4)] + [(nearest & ~0xFFFF) + i for i in (-1, 0, 0xFFFF, 0x10000)])
    delta = bits.view(torch.float32).repeat(WIDE_SIZE // len(bits) + 1)[:WIDE_SIZE]
    return [torch.zeros(WIDE_SIZE), delta * torch.where(torch.arange(WIDE_SIZE) % 2 == 0, 1.0, -1.0)]


def any_upper_byte(second_byte: int) -> list[torch.Tensor]:
    """Differences whose second byte is given, with each first byte that blocks of zeros and such numbers can have."""
    first_bytes = torch.arange(0x10, 0x40, dtype=torch.int32)
    blocks = (first_bytes << 24 | second_byte << 16 | 1).view(torch.float32).repeat_interleave(BLOCK)
    return [torch.zeros(len(blocks)), blocks]


def signs_of_zero(dtype: torch.dtype, n: int) -> list[torch.Tensor]:
    """+0 and -0 in all combinations among other values."""
    base, trained = update(n, dtype, dtype)
    zeros = torch.tensor([[0.0, 0.0], [0.0, -0.0], [-0.0, 0.0], [-0.0, -0.0]]).to(dtype)
    for i, (w, v) in enumerate(zeros):
        base[i::37], trained[i::37] = w, v
    return [base, trained]


def constant(value: float, n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.full((n,), value, dtype=dtype), torch.full((n,), value, dtype=dtype)]


def one_value_of(value: float, dtype: torch.dtype, n: int) -> list[torch.Tensor]:
    """One value on each side that its block cannot be counted with."""
    base, trained = update(n, dtype, dtype)
    base[5000] = trained[9000] = value
    return [base, trained]


def other_numbers(dtype: torch.dtype, n: int) -> list[torch.Tensor]:
    return [(0.02 * numbers(n, seed)).to(dtype) for seed in (4, 5)]


def cases() -> Iterator[Case]:
    def named(name: str, make: Callable, *arguments: object) -> Case:
        return case(f"{name} {' '.join(map(str, arguments))}", functools.partial(make, *arguments))

    sizes = {BF16: BF16_SIZE, FP16: WIDE_SIZE, FP32: WIDE_SIZE}
    for base, trained in itertools.product(sizes, sizes):
        n = BF16_SIZE if base == trained == BF16 else WIDE_SIZE
        yield named("update", update, n, base, trained)
        yield named("hostile", make_pair, n, base, trained)
    for dtype, n in sizes.items():
        yield named("other numbers", other_numbers, dtype, n)
        yield named("signs of zero", signs_of_zero, dtype, n)
        for value in (0.0, -0.0, 0.5):
            yield named("constant", constant, value, n, dtype)
        for value in (float("nan"), float("inf"), 6e4 if dtype == FP16 else 3e38, 1e-7 if dtype == FP16 else 1e-39):
            yield named("one value of", one_value_of, value, dtype, n)
    for dtype in (BF16, FP32):
        for first, last in ((-8, -4), (-3, 3), (4, 8)):
            yield named("every step", every_step, first, last, dtype)
        for exponent in (-120, -100, -60, 60, 100, 127):
            yield named("scale", update, sizes[dtype], dtype, dtype, 2.0**exponent)
    for binades in (20, 21, 22, 23, 24):
        yield named("binades", range_of_binades, binades)
    yield named("around thresholds", around_thresholds)
    for second_byte in (0x00, 0x27, 0xFF):
        yield named("second byte", any_upper_byte, second_byte)
    pair = functools.partial(update, WIDE_SIZE, FP32, FP32)
    for limits in (
        (2.0**-17, 1e-6, 1e-5, 1e-4, 1e-3),
        (1e-5, 1.1e-5, 1.2e-5, 1e-3, 1e-2),
        (0.0, 1e-6, 1e-5, 1e-4, 1e-3),
    ):
        yield case(f"thresholds {limits}", pair, DEFAULT_THRESHOLD_BITS, limits)
    for bits in ((0,), (0, 0x3728), (0x3000, 0x3100, 0x3200, 0x3300)):
        yield case(f"fp32 over {bits}", pair, bits)
        yield case(f"bf16 over {bits}", functools.partial(update, BF16_SIZE, BF16, BF16), bits)


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_matches_reference(isa, threads, case):
    check_case(case, dispatched)


@pytest.mark.parametrize("case", [c for c in cases() if c.name.startswith("update")], ids=str)
def test_misaligned(isa, case):
    check_case(case, dispatched, offsets=(1, 3))


def test_calls_of_different_dtypes_do_not_affect_each_other(isa):
    chosen = [c for c in cases() if c.name.startswith(("update", "signs", "constant"))]
    for first, second in itertools.pairwise([*chosen, *reversed(chosen)]):
        check_case(first, dispatched)
        check_case(second, dispatched)
