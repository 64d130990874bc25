"""`quantile`: the exact threshold of the top or bottom 5 to 20 % of a matrix, against torch.topk."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import paired
from opdkernels.ops.quantile import quantiles

ROWS, COLUMNS = 896, 4864
FRACTIONS = (0.05, 0.1, 0.2)


@pytest.mark.parametrize("largest", [True, False], ids=["top", "bottom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_threshold_and_overlap_against_topk(benchmark, row, one_thread, dtype, largest):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(ROWS * COLUMNS, generator=generator).to(dtype)
    mask = torch.randint(0, 256, (values.numel() // 8,), dtype=torch.uint8, generator=generator)
    ranks = [int(fraction * values.numel()) for fraction in FRACTIONS]
    bits = (mask[:, None] >> torch.arange(8)).flatten() & 1

    def topk():
        results = []
        for rank in ranks:
            best = torch.topk(values.abs(), rank, largest=largest)
            results.append((best.values[-1].item(), int(bits[best.indices].sum())))
        return results

    seconds = paired({"quantile": lambda: quantiles(values, ranks, largest=largest, mask=mask), "topk": topk}, rounds=3)
    results = benchmark.pedantic(lambda: quantiles(values, ranks, largest=largest, mask=mask), rounds=5)
    for ours, (threshold, inside) in zip(results, topk(), strict=True):
        assert ours.threshold == threshold
        assert ours.lower <= inside <= ours.upper
    row(
        quantile_s=seconds["quantile"],
        over_topk=seconds["topk"] / seconds["quantile"],
        values_per_s=len(ranks) * values.numel() / seconds["quantile"],
    )
