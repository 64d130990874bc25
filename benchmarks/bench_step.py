"""`step`: one masked AdamW step of 105 M parameters at 20 % density, against eager PyTorch and torch's dense fused step."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import paired
from opdkernels.masks import Mask
from opdkernels.ops.step import adamw_scalars, masked_adamw

SHAPE, TENSORS, DENSITY = (4864, 896), 24, 0.2
HYPER = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def eager_step(params, grads, masks, optimizer) -> None:
    """Mask the gradients, step, put back what is frozen: momentum and decay would move it."""
    with torch.no_grad():
        kept = [p.detach().clone() for p in params]
        for p, g, mask in zip(params, grads, masks, strict=True):
            p.grad = g * mask
        optimizer.step()
        for p, old, mask in zip(params, kept, masks, strict=True):
            p.copy_(torch.where(mask, p, old))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_adamw_against_eager_and_fused(benchmark, row, dtype):
    generator = torch.Generator().manual_seed(0)
    source = [(0.02 * torch.randn(SHAPE, generator=generator)).to(dtype) for _ in range(TENSORS)]
    grads = [(1e-3 * torch.randn(SHAPE, generator=generator)).to(dtype) for _ in range(TENSORS)]
    bools = [torch.rand(SHAPE, generator=generator) < DENSITY for _ in range(TENSORS)]
    masks = [Mask.from_bool(b) for b in bools]
    params = [p.clone() for p in source]
    bits, offsets = [m.bits for m in masks], [m.offsets for m in masks]
    m, v = ([torch.zeros(mask.nnz) for mask in masks] for _ in range(2))
    exact = dtype == torch.bfloat16
    extras = [torch.zeros(mask.nnz, dtype=torch.int16) for mask in masks] if exact else []
    held = sum(t.nbytes for t in (*bits, *offsets, *m, *v, *extras))
    scalars = adamw_scalars([1] * TENSORS, **HYPER)

    def ours():
        masked_adamw(params, grads, bits, offsets, m, v, scalars, extras=extras, precision="exact" if exact else "nearest")

    eager_params, fused_params = ([torch.nn.Parameter(p.clone()) for p in source] for _ in range(2))
    eager = torch.optim.AdamW(eager_params, **HYPER, foreach=True)
    fused = torch.optim.AdamW(fused_params, **HYPER, fused=True)
    for p, g in zip(fused_params, grads, strict=True):
        p.grad = g
    seconds = paired({"ours": ours, "eager": lambda: eager_step(eager_params, grads, bools, eager), "fused": fused.step}, rounds=5)
    benchmark.pedantic(ours, rounds=5)
    for p, old, active in zip(params, source, bools, strict=True):
        assert torch.equal(p[~active], old[~active])
    numel, item = sum(p.numel() for p in source), source[0].itemsize
    active = sum(mask.nnz for mask in masks)
    moved = numel * (3 * item) + held + active * 8 + sum(t.nbytes for t in extras)  # p twice, g once by lines, moments and extras twice
    row(step_s=seconds["ours"], over_eager=seconds["eager"] / seconds["ours"], over_fused=seconds["fused"] / seconds["ours"],
        state_bytes_a_parameter=held / numel, bytes_per_s=moved / seconds["ours"])  # fmt: skip
