"""The inputs on which every backend of `gram` must be exact to the rounding of sums, whose order backends choose."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tests.ops.conformance import BF16, DTYPES, FP32, FP64, Allocator, Case, Family, Kernel, make_pair

COLUMNS = 37
MAX_EXACT = 100_000  # elements of a matrix of which products in long double take seconds


def make_matrices(
    shape: Sequence[int], base: torch.dtype = BF16, trained: torch.dtype | None = None, seed: int = 0
) -> list[torch.Tensor]:
    return [side.reshape(shape) for side in make_pair(math.prod(shape), base, trained, seed=seed, hostile=False)]


def transposed(sides: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same matrices, stored by columns."""
    return [side.T.contiguous().T for side in sides]


def bf16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).view(np.float32)


def base_and_delta(base: torch.Tensor, trained: torch.Tensor, visible: bool) -> tuple[np.ndarray, np.ndarray]:
    wide = np.float64 if torch.float64 in (base.dtype, trained.dtype) and not visible else np.float32
    w, v = base.double().numpy().astype(wide), trained.double().numpy().astype(wide)
    if not visible:
        return w, v - w
    return bf16(w), bf16(bf16(v) - bf16(w))


def products(w: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.stack([w.T @ w, w.T @ d, d.T @ d])


@functools.lru_cache(maxsize=16)
def exact(base: torch.Tensor, trained: torch.Tensor, visible: bool) -> tuple[np.ndarray, np.ndarray]:
    """The products in long double, and those of absolute values, which bound the rounding; [3, n, n] each."""
    w, d = (side.astype(np.longdouble) for side in base_and_delta(base, trained, visible))
    return products(w, d), products(abs(w), abs(d))


def rounding_limits(sizes: np.ndarray, rows: int, block: int) -> np.ndarray:
    """Error bound [3, n, n] of sums in any order of products whose absolute values add up to `sizes`."""
    relative = np.full((3, 1, 1), 2.0**-52 * (rows + 2))
    if block:  # W^T delta is summed in fp32 within a block
        relative[1] += 2.0**-23 * (min(block, rows) + 1)
    return relative * sizes


def assert_within(difference: np.ndarray, limits: np.ndarray) -> None:
    """Below the diagonal of a symmetric matrix nothing is written."""
    for k in range(3):
        compared = difference[k] if k == 1 else np.triu(difference[k])
        assert (compared <= limits[k]).all(), f"matrix {k} is off beyond its rounding"


def assert_close(
    output: torch.Tensor, base: torch.Tensor, trained: torch.Tensor, *, visible: bool = False, block: int = 0
) -> None:
    """Exact to rounding."""
    result, sizes = exact(base, trained, visible)
    assert_within(abs(output.cpu().numpy() - result), rounding_limits(sizes, len(base), block))


def assert_exact(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], inputs: list[Any]) -> None:
    base, trained, visible, block = inputs
    assert_close(outputs[0], base, trained, visible=visible, block=block)


def assert_near(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], inputs: list[Any]) -> None:
    """For large matrices: within the rounding of both sides."""
    base, trained, visible, block = inputs
    w, d = (abs(side).astype(np.float64) for side in base_and_delta(base, trained, visible))
    difference = (outputs[0].cpu() - expected[0]).abs().numpy()
    assert_within(difference, 2 * rounding_limits(products(w, d), len(base), block))


def assert_same_finite(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], inputs: list[Any]) -> None:
    """NaN and infinity spread to the same elements."""
    for k, (a, b) in enumerate(zip(outputs[0].cpu(), expected[0], strict=True)):
        a, b = (a, b) if k == 1 else (a.triu(), b.triu())
        assert torch.equal(a.isfinite(), b.isfinite()), f"matrix {k} is finite elsewhere"


def call_gram(
    kernel: Kernel, allocator: Allocator, base: torch.Tensor, trained: torch.Tensor, visible: bool, block: int
) -> list[torch.Tensor]:
    into = allocator.zeros(3, base.shape[1], base.shape[1], dtype=FP64)
    kernel("gram_")(base, trained, 7, visible, block, into)
    return [into]


def call_by_rows(
    kernel: Kernel, allocator: Allocator, base: torch.Tensor, trained: torch.Tensor, visible: bool, block: int
) -> list[torch.Tensor]:
    """Adds the Gram matrices of the later rows to those of the first 128."""
    into = allocator.zeros(3, base.shape[1], base.shape[1], dtype=FP64)
    for rows in (slice(0, 128), slice(128, None)):
        kernel("gram_")(base[rows], trained[rows], 7, visible, block, into)
    return [into]


def case(name: str, sides: Sequence[torch.Tensor], visible: bool, block: int) -> Case:
    compare = assert_exact if sides[0].numel() <= MAX_EXACT else assert_near
    view = "visible" if visible else "stored"
    return Case(f"{name} {view} block {block}", lambda: [*sides, visible, block], call_gram, compare)


def cases(n: int) -> Iterator[Case]:
    side = math.isqrt(n)
    for dtype, shape in itertools.product((BF16, FP32), ((n // COLUMNS, min(n, COLUMNS)), (side, min(side, 512)))):
        sides = make_matrices(shape, dtype, seed=n)
        for visible, block in ((False, 0), (False, 64), (True, 64)):
            yield case(f"{dtype} {list(shape)}", sides, visible, block)
        yield case(f"{dtype} {list(shape)} transposed", transposed(sides), False, 0)
    hostile = [side[: n // COLUMNS * COLUMNS].view(-1, COLUMNS) for side in make_pair(n, FP32, seed=n)]
    yield Case(f"not finite {n}", lambda: [*hostile, False, 0], call_gram, assert_same_finite)


def shape_cases(shapes: Sequence[tuple[int, int]], blocks: Sequence[int]) -> Iterator[Case]:
    for shape, visible, block in itertools.product(shapes, (False, True), blocks):
        yield case(f"{list(shape)}", make_matrices(shape), visible, block)


def special_cases() -> Iterator[Case]:
    for a, b in itertools.product(DTYPES, DTYPES):
        sides = make_matrices((300, 37), a, b)
        for visible, block in ((False, 0), (False, 50), (True, 0), (True, 50)):
            if not block or visible or FP64 not in (a, b):
                yield case(f"{a}, {b}", sides, visible, block)
    for block in (1, 100, 256):
        yield case("two blocks and 5 rows", make_matrices((2 * block + 5, 33), FP32), False, block)
    for shape in ((0, 5), (5, 0), (0, 0)):
        yield case(f"empty {list(shape)}", make_matrices(shape), False, 0)
    for scale in (1e-40, 1e-30, 1e30, 3.4e38):
        base = torch.full((4, 2), scale)
        for factor in (0.5, 2.0) if scale < 1e38 else (0.5,):
            yield case(f"of {scale} and {factor} times that", [base, factor * base], False, 0)
    yield Case("added to matrices", lambda: [*make_matrices((200, 23)), False, 0], call_by_rows, assert_exact)
    base, trained = make_matrices((40, 5), FP32)
    base[3, 1], trained[7, 2] = float("nan"), float("inf")
    for block in (0, 16):
        inputs = [base, trained, False, block]
        yield Case(f"one NaN, one infinity, block {block}", lambda i=inputs: i, call_gram, assert_same_finite)


def check_repeated(kernel: Kernel, expected_by: Kernel, device: torch.device, tile: int, times: int) -> None:
    sides = make_matrices((tile // 64, 64))
    (once,) = call_gram(expected_by, Allocator(), *sides, False, 0)
    (output,) = call_gram(kernel, Allocator(device), *(side.to(device).repeat(times, 1) for side in sides), False, 0)
    for k, (a, b) in enumerate(zip(output.cpu(), times * once, strict=True)):
        a, b = (a, b) if k == 1 else (a.triu(), b.triu())
        assert (a - b).norm() <= 1e-9 * b.norm(), f"matrix {k} is off"


FAMILY = Family("gram", ("gram_",), cases, special_cases, check_repeated, bytes_per_coordinate=6)
