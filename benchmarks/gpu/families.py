"""What each kernel family is given and leaves: calls of its operators, whatever backend and device they are for.

Needs torch and NumPy alone, as the kernels do: a machine with a GPU may have nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from opdkernels.ops import step
from opdkernels.ops.divergence import tiles
from tests.ops.conformance import (
    BF16,
    FP16,
    FP32,
    INT64,
    Allocator,
    Case,
    Family,
    Kernel,
    assert_equal,
    load_families,
    pack_bits,
)


def fixed(name: str, inputs: list[Any], call: Callable, compare: Callable) -> Case:
    return Case(name, lambda: inputs, call, compare)


def none() -> tuple[()]:
    return ()


# step

EXTREMES = (
    0.0,
    -0.0,
    1e-45,
    1e-40,
    3e-39,
    1.2e-38,
    1e-30,
    1.0,
    1e19,
    3e38,
    -3.39e38,
    float("inf"),
    -float("inf"),
    float("nan"),
)


def mask_tensors(flags: torch.Tensor, places: torch.Tensor | None) -> list[torch.Tensor]:
    """A mask and what goes with it: bits and the counts before each block, or places of a dtype."""
    if places is not None:
        return [flags.nonzero().flatten().to(places.dtype), torch.zeros(0, dtype=INT64)]
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
        kernel("masked_gather_")(param, mask, offset, into, options["add"])
        kernel("masked_scatter_")(param, mask, offset, into)
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

    extra = step.RESIDUAL_DTYPES.get(precision) if dtype == BF16 else None
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


# divergence

KIND_CODES = {
    "forward_kl": tiles.FORWARD,
    "reverse_kl": tiles.REVERSE,
    "jsd": tiles.JSD,
    "total_variation": tiles.VARIATION,
    "at ids": tiles.AT_IDS,
}
WIDTHS = 64, 128


def run_divergence(
    kernel: Kernel,
    allocator: Allocator,
    student: list[torch.Tensor],
    teacher: list[torch.Tensor],
    ids: torch.Tensor,
    kind: str,
    softcap: float,
) -> list[torch.Tensor]:
    """Forward and backward: moments, both sides' logits at ids, and gradients of the student's hidden states, weight and bias."""
    vocab, code, numbers = len(student[1]), KIND_CODES[kind], [0.8, softcap, 1.1, softcap, 1.3, 0.3]
    moments, at, outside, _ = kernel("divergence_scan")(student, teacher, ids, 1, vocab, numbers, True)
    center = moments[5] - moments[1] + moments[3]
    if kind in ("jsd", "total_variation"):
        center = kernel("divergence_means")(student, teacher, moments, vocab, numbers, code)[1]
    scalars = torch.stack([*moments[:4], center, torch.ones_like(center)])
    outside = outside.clamp(min=tiles.FLOOR)
    if kind == "at ids":  # and what lies outside them
        scalars = torch.cat([scalars, (outside[0] - moments[0] - moments[1])[None], torch.ones_like(center)[None]])
    top = kernel("divergence_top")(teacher, vocab, min(3, vocab), numbers)
    grads = kernel("divergence_backward")(
        student, teacher, scalars, ids, torch.ones_like(at[0]), vocab, numbers, code, [True, True, True]
    )
    return [moments, torch.cat([at, outside[..., None]], 2), top, *grads]


def assert_near(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], inputs: list[Any]) -> None:
    """Sums to their rounding in fp32; gradients too, or to that of bf16 where everything is; the likeliest ids but for near ties."""
    half = inputs[0][0].dtype != FP32
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        a, b = a.cpu().double(), b.double()
        assert a.isfinite().all(), f"output {i} is not finite"
        if i == 2:
            assert (a.sort(1).values != b.sort(1).values).sum() <= a.numel() // 100, "the likeliest ids differ"
        elif i < 2:
            assert ((a - b).abs() <= 1e-4 * (1 + b.abs())).all(), f"output {i} is off"
        else:
            assert (a - b).norm() <= (2.0**-7 if half else 1e-4) * b.norm() + 1e-5, f"gradient {i - 3} is off"


def sides_of(tokens: int, vocab: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(vocab)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    return [
        [random(tokens, w).to(dtype), (3 * random(vocab, w) / w**0.5).to(dtype), random(vocab).to(dtype)]
        for w in WIDTHS
    ]


def divergence_cases(n: int) -> Iterator[Case]:
    vocab = max(1, min(n, 1025))
    tokens = n // vocab
    ids = torch.randint(vocab, (tokens, 2), generator=torch.Generator().manual_seed(n))
    for dtype, kind, softcap in (
        (BF16, "reverse_kl", 0.0),
        (BF16, "at ids", 20.0),
        (FP16, "jsd", 20.0),
        (FP32, "forward_kl", 0.0),
        (FP32, "total_variation", 0.0),
    ):
        yield fixed(
            f"{dtype} {kind}", [*sides_of(tokens, vocab, dtype), ids, kind, softcap], run_divergence, assert_near
        )


def repeated_divergence(kernel: Kernel, expected: Kernel, device: torch.device, tile: int, times: int) -> None:
    """Of a vocabulary that holds every id so many times, hidden states have the same gradient, and each copy its share of the head's."""
    student, teacher = sides_of(32, tile // WIDTHS[1], BF16)
    ids, options = torch.zeros(32, 0, dtype=INT64), ("forward_kl", 0.0)
    once = run_divergence(expected, Allocator("cpu"), student, teacher, ids, *options)
    big = [
        [
            one.to(device) if i == 0 else one.to(device).repeat(times, *[1] * (one.ndim - 1))
            for i, one in enumerate(side)
        ]
        for side in (student, teacher)
    ]
    found = run_divergence(kernel, Allocator(device), *big, ids.to(device), *options)
    grown = once[0].clone()
    grown[[tiles.STUDENT_LOG, tiles.TEACHER_LOG]] += math.log(times)
    assert bool(((found[0].cpu() - grown).abs() <= 1e-3 * (1 + grown.abs())).all()), "moments are off"
    for i, share in ((3, 1), (4, times)):
        for part in found[i].chunk(share):
            assert (part.cpu().double() * share - once[i].double()).norm() <= 2.0**-6 * once[i].double().norm(), (
                f"gradient {i - 3} is off"
            )


FAMILIES = load_families() | {
    one.name: one
    for one in (
        Family(
            "divergence",
            ("divergence_scan", "divergence_means", "divergence_backward", "divergence_top"),
            divergence_cases,
            none,
            repeated_divergence,
            8,
        ),
        Family(
            "step",
            ("masked_adamw_", "masked_sgd_", "masked_gather_", "masked_scatter_"),
            step_cases,
            none,
            repeated_step,
            8,
        ),
    )
}
