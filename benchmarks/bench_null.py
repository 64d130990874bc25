"""`null`: the nulls of many small tensors and of large ones, against the reference in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.harness import paired
from opdkernels.metrics.coordinates import TOP_FRACTIONS
from opdkernels.ops import OPERATORS
from opdkernels.ops.delta.many import SparseTally, delta_many
from opdkernels.ops.null import run
from opdkernels.spectral.exact import RATIOS

SHAPES = {"256 of 64 x 64": (256, 64 * 64), "16 of 896 x 4864": (16, 896 * 4864)}


def tallies(count: int, numel: int) -> list[SparseTally]:
    generator = torch.Generator().manual_seed(0)
    base = [0.02 * torch.randn(numel, generator=generator) for _ in range(count)]
    trained = [w + 2e-5 * torch.randn(numel, generator=generator) for w in base]
    return delta_many([w.bfloat16() for w in base], [v.bfloat16() for v in trained])


@pytest.mark.parametrize("shape", SHAPES)
def test_null_against_the_reference(benchmark, row, one_thread, shape, monkeypatch):
    counted = tallies(*SHAPES[shape])
    tables = [[getattr(tally, name) for tally in counted] for name in ("bin_bits", "hist_base", "hist_delta")]

    def fit() -> np.ndarray:
        return run(*tables, ["grid"] * len(counted), RATIOS, TOP_FRACTIONS, (), keep=False)[0].fits

    def reference() -> np.ndarray:
        with monkeypatch.context() as patched:
            patched.setattr(torch.ops.opdkernels, "null_", OPERATORS["null_"].reference)
            return fit()

    np.testing.assert_allclose(fit(), reference(), rtol=1e-6, atol=1e-9)
    seconds = paired({"null": fit, "reference": reference}, rounds=3)
    benchmark.pedantic(fit, rounds=5)
    row(
        null_s=seconds["null"],
        ms_per_tensor=1e3 * seconds["null"] / len(counted),
        over_reference=seconds["reference"] / seconds["null"],
    )
