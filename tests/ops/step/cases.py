"""The inputs on which every backend of `step` must equal the reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from opdkernels.ops import step
from tests.ops.conformance import BF16, FP32, INT64, Allocator, Case, Kernel, assert_equal, pack_bits

INF, NAN = float("inf"), float("nan")
EXTREMES = (0.0, -0.0, 1e-45, 1e-40, 3e-39, 1.2e-38, 1e-30, 1.0, 1e19, 3e38, -3.39e38, INF, -INF, NAN)


def mask_tensors(flags: torch.Tensor, index_dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """A mask and its block counts: a bitmap and the active coordinates before each block, or indices of a dtype."""
    if index_dtype:
        return [flags.nonzero().flatten().to(index_dtype), torch.zeros(0, dtype=INT64)]
    padded = flags.new_zeros((len(flags) + step.BLOCK - 1) // step.BLOCK * step.BLOCK)
    padded[: len(flags)] = flags
    return [pack_bits(flags), torch.cat([torch.zeros(1, dtype=INT64), padded.view(-1, step.BLOCK).sum(1).cumsum(0)])]


def run_step(
    kernel: Kernel,
    allocator: Allocator,
    state: list[list[torch.Tensor]],
    scalars: list[torch.Tensor],
    precision: str,
    options: dict[str, Any],
) -> list[torch.Tensor]:
    """Two steps of AdamW, or SGD; then what is active is taken, added and put back."""
    params, grads, masks, offsets, first, second, most, extras = state
    many = range(len(params))
    for t in (1, 2):
        mine = scalars[t - 1]
        factors = [allocator.put(torch.tensor([factor])) for factor in (3.0, 0.7)] + [None]
        common = (mine, list(many), [7 * i for i in many], list(many), *factors)
        moments = (first, second, most) if second else (first,)
        last = (
            (False, step.PRECISIONS.index(precision), 11)
            if second
            else (False, True, step.PRECISIONS.index(precision), 11)
        )
        kernel("masked_adamw_" if second else "masked_sgd_")(
            params, grads, masks, offsets, *moments, extras, [], [], *common, *last
        )
    for param, mask, offset, into in zip(params, masks, offsets, first, strict=True):
        kernel("masked_take_")(param, mask, offset, into, options["add"])
        kernel("masked_put_")(param, mask, offset, into)
    return [one for held in (params, first, second, most, extras) for one in held]


def state_of(
    sizes: Sequence[int],
    dtype: torch.dtype,
    grad: torch.dtype,
    precision: str,
    places: torch.Tensor | None,
    adamw: bool,
    density: float = 0.2,
) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(sum(sizes))
    params, grads = (
        [(scale * torch.randn(n, generator=generator)).to(kind) for n in sizes]
        for scale, kind in ((0.02, dtype), (1e-3, grad))
    )
    for one, every in itertools.product((*params, *grads), range(len(EXTREMES))):
        one[every :: 199 + every] = EXTREMES[every]
    masks, offsets = zip(
        *(mask_tensors(torch.rand(n, generator=generator) < density, places) for n in sizes), strict=True
    )
    active = [int(offset[-1]) if len(offset) else len(mask) for mask, offset in zip(masks, offsets, strict=True)]

    def zeros(kind=FP32):
        return [torch.zeros(k, dtype=kind) for k in active]

    extra = step.EXTRA_DTYPES.get(precision) if dtype == BF16 else None
    return [
        params,
        grads,
        list(masks),
        list(offsets),
        zeros(),
        *([zeros(), zeros()] if adamw else [[], []]),
        zeros(extra) if extra else [],
    ]


def rows_of_scalars(count: int, adamw: bool) -> list[torch.Tensor]:
    return [
        step.adamw_scalars([t] * count, 1e-3, (0.9, 0.999), 1e-8, 0.01)
        if adamw
        else step.sgd_scalars([t] * count, 1e-2, 0.9, 0.1, 0.01)
        for t in (1, 2)
    ]


def step_cases(n: int) -> Iterator[Case]:
    sizes = (n, 31, 0, 2048)
    for adamw, dtype, precision in itertools.product((True, False), (FP32, BF16), step.PRECISIONS):
        if dtype == FP32 and precision != "nearest":
            continue
        for places in (None, torch.zeros(0, dtype=torch.int32)):
            state = state_of(
                sizes, dtype, BF16 if precision in ("nearest", "kahan") else FP32, precision, places, adamw
            )
            label = f"{'AdamW' if adamw else 'SGD'} {dtype} {precision} by {'bits' if places is None else 'places'}"
            yield fixed(
                label, [state, rows_of_scalars(len(sizes), adamw), precision, {"add": adamw}], run_step, assert_equal
            )


def repeated_step(kernel: Kernel, expected: Kernel, device: torch.device, tile: int, times: int) -> None:
    n = tile // step.BLOCK * step.BLOCK
    state = state_of((n,), BF16, BF16, "nearest", None, True, density=0.05)
    inputs = Allocator(device).put(rows_of_scalars(1, True)), "nearest", {"add": False}
    big = [[one.to(device).repeat(times) for one in held] for held in state]
    (once,) = state[3]
    big[3] = [
        torch.cat([torch.zeros(1, dtype=INT64), (once[1:] + once[-1] * torch.arange(times).unsqueeze(1)).flatten()]).to(
            device
        )
    ]
    found = run_step(kernel, Allocator(device), big, *inputs)
    for i, (many, one) in enumerate(
        zip(found, run_step(expected, Allocator("cpu"), state, rows_of_scalars(1, True), *inputs[1:]), strict=True)
    ):
        parts, one = (
            side.view(torch.int16 if side.itemsize == 2 else torch.int32)
            for side in (many.view(times, -1), one.to(device))
        )
        assert bool((parts == parts[:1]).all()), f"output {i} is not the same in every part"
        assert_equal([many[: len(one)]], [one.cpu().view(many.dtype)], [])
