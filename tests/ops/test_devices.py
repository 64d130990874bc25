"""Every operator rejects tensors on two devices, and names both."""

from __future__ import annotations

import pytest
import torch

from opdkernels.ops import delta, divergence, gram, overlap, patch, quantile, step

ON_CPU, ON_META = torch.zeros(2, 2), torch.zeros(2, 2, device="meta")
INDICES, NO_COUNTS = torch.arange(2), torch.zeros(0, dtype=torch.int64)
CALLS = {
    "delta": lambda: delta.delta(ON_CPU, ON_META),
    "overlap": lambda: overlap.overlap(ON_CPU, [ON_CPU, ON_META]),
    "gram": lambda: gram.gram(ON_CPU, ON_META),
    "patch_gather": lambda: patch.gather(ON_CPU, ON_META),
    "quantile": lambda: quantile.quantile(ON_CPU, 1, mask=torch.zeros(1, dtype=torch.uint8, device="meta")),
    "masked_gather": lambda: step.masked_gather(ON_CPU.view(-1), INDICES, NO_COUNTS, torch.zeros(2, device="meta")),
    "masked_scatter": lambda: step.masked_scatter(ON_CPU.view(-1), INDICES.to("meta"), NO_COUNTS, torch.zeros(2)),
    "divergence": lambda: divergence.linear_divergence(
        ON_CPU, divergence.LMHead(ON_CPU), ON_CPU, divergence.LMHead(ON_META)
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_error_names_both_devices(call):
    with pytest.raises(ValueError, match=r"on cpu, .* on meta; move one of them"):
        CALLS[call]()


@pytest.mark.parametrize(
    "moved",
    [
        "grads",
        "masks",
        "block_counts",
        "exp_avgs",
        "exp_avg_sqs",
        "max_exp_avg_sqs",
        "init_values",
        "step_groups",
        "changed",
    ],
)
def test_a_step_rejects_state_on_another_device(moved):
    moments = {name: [torch.zeros(2)] for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "init_values")}
    tensors = {
        "grads": [torch.zeros(4)],
        "masks": [INDICES],
        "block_counts": [NO_COUNTS],
        "step_groups": [torch.zeros(2, dtype=torch.uint8)],
        "changed": [torch.zeros(1, dtype=torch.uint8)],
        **moments,
    }
    tensors[moved] = [tensors[moved][0].to("meta")]
    with pytest.raises(ValueError, match=r"on cpu, .* on meta; move one of them"):
        step.masked_adamw([torch.zeros(4)], scalars=step.adamw_scalars([1], 1e-3, (0.9, 0.99), 1e-8, 0.0), **tensors)
