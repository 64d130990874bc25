"""`gram`: the three Gram matrices of an MLP matrix of Qwen2.5-0.5B and its update, against matrix products."""

from __future__ import annotations

import pytest
import torch

from benchmarks import data
from benchmarks.harness import paired
from opdkernels.ops.gram import gram, symmetric


def products(base: torch.Tensor, trained: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The three Gram matrices in eager PyTorch."""
    w = base.to(dtype)
    d = (trained.float() - base.float()).to(dtype)
    return torch.stack([w.T @ w, w.T @ d, d.T @ d])


@pytest.mark.parametrize("block", [0, 64])
@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
def test_gram_matrices_against_products(benchmark, row, one_thread, wide, block):
    generator = torch.Generator().manual_seed(0)
    base = data.weight((data.INTERMEDIATE, data.HIDDEN), generator)
    trained = data.updated(base, generator)
    if wide:
        base, trained = base.T.contiguous().T, trained.T.contiguous().T
    seconds = paired(
        {
            "gram": lambda: gram(base, trained, block=block),
            "fp64": lambda: products(base, trained, torch.float64),
            "fp32": lambda: products(base, trained, torch.float32),
        },
        rounds=5,
    )
    result, exact = (
        symmetric(benchmark.pedantic(lambda: gram(base, trained, block=block), rounds=5)),
        products(base, trained, torch.float64),
    )
    for ours, theirs in zip(result, exact, strict=True):
        assert (ours - theirs).norm() <= (1e-8 if block else 1e-14) * theirs.norm()
    flops = 2 * base.numel() * base.shape[1] * 2  # two triangles and a full matrix
    row(
        flops_per_s=flops / seconds["gram"],
        over_fp64_products=seconds["fp64"] / seconds["gram"],
        over_fp32_products=seconds["fp32"] / seconds["gram"],
    )
