"""What the kernels are compared with: the same results, or as many of them as is usual, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opdkernels.backends.layout import BINS
from opdkernels.ops.delta import THRESHOLDS, base_and_delta, bf16_bits
from opdkernels.ops.divergence import Divergence, divergence

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-5, (0.9, 0.999), 1e-8, 0.01  # of the optimizer steps


def eager_counts(w: Tensor, v: Tensor) -> list[Tensor]:
    """Sums, the maximum, unchanged coordinates, and two counts per threshold; no histogram."""
    w, v = w.float(), v.float()
    d = (v - w).abs()
    results = [w.square().sum(), v.square().sum(), d.square().sum(), d.sum(), d.max(), (d == 0).sum()]
    for threshold in THRESHOLDS:
        results += [(d < threshold).sum(), (d <= threshold).sum()]
    return results


def eager_tables(w: Tensor, v: Tensor) -> list[Tensor]:
    """Three histograms, from which every metric of the visible view follows: |W|, |delta|, |W| of the changed."""
    visible, magnitude = bf16_bits(v - w) & 0x7FFF, bf16_bits(w) & 0x7FFF
    return [torch.bincount(bits, minlength=BINS) for bits in (magnitude, visible, magnitude[visible > 0])]


def eager_overlap(w: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    """Changed in both runs, in each, and histograms of |W|: of all coordinates and of those that each run changed."""
    x, y = ((run - w).abs() > 1e-5 for run in (a, b))
    magnitude = bf16_bits(w) & 0x7FFF
    return [
        (x & y).sum(),
        x.sum(),
        y.sum(),
        *(torch.bincount(bits, minlength=BINS) for bits in (magnitude, magnitude[x], magnitude[y])),
    ]


def thresholds_by_topk(magnitudes: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """The threshold of each rank, from the largest values; on a CPU a bit faster than a `kthvalue` per rank."""
    largest = magnitudes.topk(max(ranks)).values
    return [largest[rank - 1] for rank in ranks]


def thresholds_by_sort(magnitudes: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """The threshold of each rank, from one sort, for GPUs."""
    ordered = magnitudes.sort(descending=True).values
    return [ordered[rank - 1] for rank in ranks]


def eager_quantile(values: Tensor, ranks: Sequence[int], flags: Tensor) -> list[Tensor]:
    """The threshold of each rank, and the number of values above it inside a mask."""
    magnitudes = values.abs()
    find = thresholds_by_topk if values.device.type == "cpu" else thresholds_by_sort
    return [result for t in find(magnitudes, ranks) for result in (t, ((magnitudes > t) & flags).sum())]


def eager_gather(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the changed coordinates and their values."""
    changed = (w != v).nonzero().flatten()
    return changed.int(), v[changed]


def eager_scatter(w: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """A copy of the base with the values of the changed coordinates."""
    return w.clone().index_copy_(0, indices, values)


def fused_step(param: Tensor, grad: Tensor, active: Tensor) -> Callable[[], None]:
    """A function that makes torch's fused AdamW step of all coordinates, then restores the frozen ones.

    The step is in fp32: of a bf16 weight there is an fp32 master, which is rounded to the weight after the step.
    """
    master = torch.nn.Parameter(param.detach().float().clone())
    optimizer = torch.optim.AdamW(
        [master], lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )

    @torch.no_grad()
    def step() -> None:
        before = master.detach().clone()
        master.grad = grad.float()
        optimizer.step()
        master.copy_(torch.where(active, master, before))
        param.copy_(master)

    return step


def formula_step(param: Tensor, grad: Tensor, active: Tensor, m: Tensor, v: Tensor) -> None:
    """The formula of the first AdamW step for all coordinates, in passes that a compiler can fuse; then frozen weights
    are restored."""
    g = grad.float()
    m.lerp_(g, 1 - BETAS[0])
    v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
    update = LEARNING_RATE / (1 - BETAS[0]) * m / (v.sqrt() / math.sqrt(1 - BETAS[1]) + EPS)
    new = param.float() * (1 - LEARNING_RATE * WEIGHT_DECAY) - update
    param.copy_(torch.where(active, new.to(param.dtype), param))


def eager_gram(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three Gram matrices as fp64 products."""
    a, b = (side.double() for side in base_and_delta(w, v, False))
    return a.T @ a, a.T @ b, b.T @ b


def eager_divergence(
    student: Sequence[Tensor], teacher: Sequence[Tensor], spec: Divergence, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The student's gradients of the definition in fp32, from full logits, which are products in a dtype.

    `student` and `teacher` are hidden states and the weight of the head.
    """
    student = [tensor.detach().requires_grad_() for tensor in student]
    logits, teacher_logits = (hidden.to(dtype) @ weight.to(dtype).T for hidden, weight in (student, teacher))
    return torch.autograd.grad(divergence(logits, teacher_logits, spec).sum(), student)
