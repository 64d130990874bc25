"""The inputs on which every backend of `divergence` must match the reference, to the rounding of sums and products."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from opdkernels.ops.divergence import tiles
from tests.ops.conformance import BF16, FP16, FP32, INT64, Allocator, Case, Family, Kernel

KIND_CODES = {
    "forward_kl": tiles.FORWARD,
    "reverse_kl": tiles.REVERSE,
    "jsd": tiles.JSD,
    "total_variation": tiles.VARIATION,
    "at ids": tiles.AT_IDS,
}
WIDTHS = 64, 128


def call_divergence(
    kernel: Kernel,
    allocator: Allocator,
    student: list[torch.Tensor],
    teacher: list[torch.Tensor],
    ids: torch.Tensor,
    kind: str,
    softcap: float,
) -> list[torch.Tensor]:
    """Forward and backward: moments, both sides' logits at ids, top ids, gradients of hidden states, weight, bias."""
    vocab, code, beta = len(student[1]), KIND_CODES[kind], 0.3
    student_params, teacher_params = [0.8, softcap, 1.3], [1.1, softcap, 1.3]
    params, tail_k = (student_params, teacher_params), min(1, ids.shape[1])
    moments, logits_at_ids, tails, _ = kernel("divergence_scan")(student, teacher, ids, tail_k, vocab, *params, True)
    center = moments[5] - moments[1] + moments[3]
    shift = torch.zeros_like(center)
    if kind in ("jsd", "total_variation"):
        _, shift, center = kernel("divergence_means")(student, teacher, moments, vocab, *params, beta, code)
    scalars = torch.stack([*moments[:4], shift, center, torch.ones_like(center)])
    tails = tails.clamp(min=tiles.FLOOR)
    if kind == "at ids":  # and their tail
        scalars = torch.cat([scalars, (tails[0] - moments[0] - moments[1])[None], torch.ones_like(center)[None]])
    top = kernel("divergence_top")(teacher, vocab, min(3, vocab), teacher_params)
    grads = kernel("divergence_backward")(
        student,
        teacher,
        scalars,
        ids,
        torch.ones_like(logits_at_ids[0]),
        vocab,
        *params,
        beta,
        code,
        [True, True, True],
    )
    at_ids = torch.cat([logits_at_ids, tails[..., None]], 2) if tail_k else logits_at_ids
    return [moments, at_ids, top, *grads]


def assert_near(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], inputs: list[Any]) -> None:
    """Sums to their rounding in fp32; gradients too, in half precision to that of bf16; top ids but for near ties."""
    half = inputs[0][0].dtype != FP32
    for i, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        a, b = a.cpu().double(), b.double()
        assert a.isfinite().all(), f"output {i} is not finite"
        if i == 2:
            assert (a.sort(1).values != b.sort(1).values).sum() <= a.numel() // 100, "the top ids differ"
        elif i < 2:
            assert ((a - b).abs() <= 1e-4 * (1 + b.abs())).all(), f"output {i} is off"
        else:
            assert (a - b).norm() <= (2.0**-7 if half else 1e-4) * b.norm() + 1e-5, f"gradient {i - 3} is off"


def make_sides(num_tokens: int, vocab: int, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """Hidden states, head weight and bias of a student, then of a wider teacher."""
    generator = torch.Generator().manual_seed(vocab)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return [
        [
            normal(num_tokens, width).to(dtype),
            (3 * normal(vocab, width) / width**0.5).to(dtype),
            normal(vocab).to(dtype),
        ]
        for width in WIDTHS
    ]


def make_inputs(n: int, dtype: torch.dtype, kind: str, softcap: float) -> list[Any]:
    """n logits in all."""
    vocab = max(1, min(n, 1025))
    ids = torch.randint(vocab, (n // vocab, 2), generator=torch.Generator().manual_seed(n))
    return [*make_sides(n // vocab, vocab, dtype), ids, kind, softcap]


def cases(n: int) -> Iterator[Case]:
    for dtype, kind, softcap in (
        (BF16, "reverse_kl", 0.0),
        (BF16, "at ids", 20.0),
        (FP16, "jsd", 20.0),
        (FP32, "forward_kl", 0.0),
        (FP32, "total_variation", 0.0),
    ):
        make = functools.partial(make_inputs, n, dtype, kind, softcap)
        yield Case(f"{dtype} {kind} {n}", make, call_divergence, assert_near)


def check_repeated(kernel: Kernel, expected_by: Kernel, device: torch.device, tile: int, times: int) -> None:
    """With a vocabulary that repeats every id, hidden states keep their gradient, and the copies share the head's."""
    sides = make_sides(32, tile // WIDTHS[1], BF16)
    ids, options = torch.zeros(32, 0, dtype=INT64), ("forward_kl", 0.0)
    expected = call_divergence(expected_by, Allocator(), *sides, ids, *options)
    repeated = [
        [hidden.to(device), weight.to(device).repeat(times, 1), bias.to(device).repeat(times)]
        for hidden, weight, bias in sides
    ]
    outputs = call_divergence(kernel, Allocator(device), *repeated, ids.to(device), *options)
    moments = expected[0].clone()
    moments[[tiles.STUDENT_LOG, tiles.TEACHER_LOG]] += math.log(times)
    assert bool(((outputs[0].cpu() - moments).abs() <= 1e-3 * (1 + moments.abs())).all()), "moments are off"
    for i, copies in ((3, 1), (4, times)):
        for gradient in outputs[i].chunk(copies):
            difference = gradient.cpu().double() * copies - expected[i].double()
            assert difference.norm() <= 2.0**-6 * expected[i].double().norm(), f"gradient {i - 3} is off"


FAMILY = Family(
    "divergence",
    ("divergence_scan", "divergence_means", "divergence_backward", "divergence_top"),
    cases,
    tuple,
    check_repeated,
    bytes_per_coordinate=8,
)
