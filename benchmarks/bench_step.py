"""`step`: one step of MaskedAdamW over 105 M parameters at 20 % density, against eager and fused PyTorch."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from benchmarks.harness import anonymous_bytes, paired, update_bandwidth
from opdkernels.analysis.spectra_schedule import trim_heap
from opdkernels.masks import Mask, MaskSet
from opdkernels.ops.step import adamw_scalars, masked_adamw
from opdkernels.optim import MaskedAdamW

SHAPE, TENSORS, DENSITY = (4864, 896), 24, 0.2
HYPER = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def eager_step(params, grads, masks, optimizer) -> None:
    """Masks the gradients, steps, restores frozen weights: momentum and weight decay would change them."""
    with torch.no_grad():
        kept = [p.detach().clone() for p in params]
        for p, g, mask in zip(params, grads, masks, strict=True):
            p.grad = g * mask
        optimizer.step()
        for p, old, mask in zip(params, kept, masks, strict=True):
            p.copy_(torch.where(mask, p, old))


def live_bytes() -> int:
    """Anonymous memory of this process, after freed memory is returned to the system."""
    gc.collect()
    trim_heap()
    return anonymous_bytes(os.getpid())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_adamw_against_eager_and_fused(benchmark, row, dtype):
    generator = torch.Generator().manual_seed(0)
    source = [(0.02 * torch.randn(SHAPE, generator=generator)).to(dtype) for _ in range(TENSORS)]
    grads = [(1e-3 * torch.randn(SHAPE, generator=generator)).to(dtype) for _ in range(TENSORS)]
    bools = [torch.rand(SHAPE, generator=generator) < DENSITY for _ in range(TENSORS)]
    ours, eager_params, fused_params = ([torch.nn.Parameter(p.clone()) for p in source] for _ in range(3))
    for params in (ours, fused_params):
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    warm = torch.nn.Parameter(torch.ones(8))
    warm.grad = torch.ones(8)
    MaskedAdamW(
        [warm], masks=[torch.ones(8, dtype=torch.bool)]
    ).step()  # torch loads libraries at the first step of an optimizer
    before = live_bytes()
    masked = MaskedAdamW(
        [(f"{i}", p) for i, p in enumerate(ours)],
        masks=MaskSet({f"{i}": Mask.from_bool(b) for i, b in enumerate(bools)}),
        **HYPER,
    )
    masked.step()
    held = live_bytes() - before

    eager = torch.optim.AdamW(eager_params, **HYPER, foreach=True)
    fused = torch.optim.AdamW(fused_params, **HYPER, fused=True)
    seconds = paired(
        {"ours": masked.step, "eager": lambda: eager_step(eager_params, grads, bools, eager), "fused": fused.step},
        rounds=7,
    )
    benchmark.pedantic(masked.step, rounds=5)
    for p, old, active in zip(ours, source, bools, strict=True):
        assert torch.equal(p[~active], old[~active])
        assert not torch.equal(p[active], old[active])
    numel, item = sum(p.numel() for p in source), source[0].itemsize
    active = sum(int(b.sum()) for b in bools)
    extra = 2 if dtype == torch.bfloat16 else 0
    # Weights read and written, gradients read, by full cache lines; moments and residuals read and written; the mask.
    moved = numel * 3 * item + active * 2 * (8 + extra) + numel / 8
    row(
        step_s=seconds["ours"],
        over_eager=seconds["eager"] / seconds["ours"],
        over_fused=seconds["fused"] / seconds["ours"],
        state_bytes_a_parameter=held / numel,
        bytes_per_s=moved / seconds["ours"],
        fraction_of_update=moved / seconds["ours"] / update_bandwidth(torch.get_num_threads()),
    )


def test_bits_against_places(benchmark, row):
    """A step of 67 M fp32 parameters with a bitmap and with indices, at densities where both take similar memory."""
    generator = torch.Generator().manual_seed(0)
    param, grad = (torch.randn(1 << 26, generator=generator) for _ in range(2))
    scalars = adamw_scalars([1], **HYPER)
    chance = torch.rand(1 << 26, generator=generator)
    none = torch.zeros(0, dtype=torch.int64)
    ratios = {}
    for percent in (0.1, 0.5, 1, 2, 3, 5, 10, 20):
        mask = Mask.from_bool(chance < percent / 100)
        m, v = torch.zeros(mask.num_active), torch.zeros(mask.num_active)

        def step(payload, block_counts, m=m, v=v):
            masked_adamw([param], [grad], [payload], [block_counts], [m], [v], scalars)

        seconds = paired(
            {
                "bits": lambda mask=mask, step=step: step(mask.bitmap, mask.block_counts),
                "places": lambda mask=mask, step=step: step(mask.indices, none),
            },
            rounds=5,
        )
        ratios[f"places over bits at {percent} %"] = seconds["places"] / seconds["bits"]
    benchmark.pedantic(lambda: step(mask.bitmap, mask.block_counts), rounds=3)
    row(**ratios)
