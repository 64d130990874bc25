"""Tensors of one call that lie on two devices: refused by every operator, with both named."""

from __future__ import annotations

import pytest
import torch

from opdkernels.ops import delta, divergence, gram, overlap, patch, quantile, step

HERE, THERE = torch.zeros(2, 2), torch.zeros(2, 2, device="meta")
PLACES, NONE = torch.arange(2), torch.zeros(0, dtype=torch.int64)
CALLS = {
    "delta": lambda: delta.delta(HERE, THERE),
    "overlap": lambda: overlap.overlap(HERE, [HERE, THERE]),
    "gram": lambda: gram.gram(HERE, THERE),
    "gather": lambda: patch.gather(HERE, THERE),
    "quantile": lambda: quantile.quantile(HERE, 1, mask=torch.zeros(1, dtype=torch.uint8, device="meta")),
    "take": lambda: step.masked_gather(HERE.view(-1), PLACES, NONE, torch.zeros(2, device="meta")),
    "divergence": lambda: divergence.linear_divergence(HERE, divergence.Head(HERE), HERE, divergence.Head(THERE)),
    "put": lambda: step.masked_scatter(HERE.view(-1), PLACES.to("meta"), NONE, torch.zeros(2)),
}


@pytest.mark.parametrize("call", CALLS)
def test_both_devices_are_named(call):
    with pytest.raises(ValueError, match=r"on cpu, .* on meta; move one of them"):
        CALLS[call]()


@pytest.mark.parametrize(
    "moved",
    ["grads", "masks", "block_counts", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "init_values", "step_groups"],
)
def test_whatever_a_step_takes_lies_beside_its_weights(moved):
    moments = {name: [torch.zeros(2)] for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "init_values")}
    held = {
        "grads": [torch.zeros(4)],
        "masks": [PLACES],
        "block_counts": [NONE],
        "step_groups": [torch.zeros(2, dtype=torch.uint8)],
        **moments,
    }
    held[moved] = [held[moved][0].to("meta")]
    with pytest.raises(ValueError, match=r"param 0 is on cpu, .* on meta; move one of them"):
        step.masked_adamw([torch.zeros(4)], scalars=step.adamw_scalars([1], 1e-3, (0.9, 0.99), 1e-8, 0.0), **held)
