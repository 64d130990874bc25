"""`divergence`: forward and backward from hidden states, Qwen2.5-0.5B sizes, against full logits.

Peak memory is measured in one process per implementation, beyond the memory held before; times are paired in
one process.
Errors are those of the gradients against fp64, on fewer tokens. Liger
reports 4 to 23 % for its fused JSD (its issue 1432).
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import data
from benchmarks.harness import paired
from opdkernels.ops.divergence import Divergence, LMHead, divergence, linear_divergence

TOKENS = 1024
BUDGET_BYTES = 300e6


def make(tokens: int = TOKENS, vocabulary: int = data.VOCABULARY, seed: int = 0) -> list[torch.Tensor]:
    """Hidden states and head of a student, then of a teacher close to it, bf16; the student's require gradients."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, data.HIDDEN, generator=generator)
    weight = torch.empty(vocabulary, data.HIDDEN, dtype=torch.bfloat16)
    other = torch.empty_like(weight)
    for rows in range(0, vocabulary, 4096):  # a head in fp32 would be a larger peak than the measured one
        part = torch.randn(min(4096, vocabulary - rows), data.HIDDEN, generator=generator) * 0.1
        weight[rows : rows + 4096] = part
        other[rows : rows + 4096] = part + 0.02 * torch.randn(part.shape, generator=generator)
    teacher = hidden + 0.2 * torch.randn(hidden.shape, generator=generator)
    return [hidden.bfloat16().requires_grad_(), weight.requires_grad_(), teacher.bfloat16(), other]


def tiled(hidden, weight, teacher, other, spec):
    return linear_divergence(hidden, LMHead(weight), teacher, LMHead(other), spec)


def full(hidden, weight, teacher, other, spec, dtype=torch.float32):
    """Plain PyTorch: all logits, from products in a dtype."""
    with torch.no_grad():
        target = teacher.to(dtype) @ other.to(dtype).T
    return divergence(hidden.to(dtype) @ weight.to(dtype).T, target, spec).mean()


IMPLEMENTATIONS = {"tiled": tiled, "full": full}


def step(name: str, inputs: list[torch.Tensor], spec: Divergence) -> None:
    IMPLEMENTATIONS[name](*inputs, spec).backward()
    inputs[0].grad = inputs[1].grad = None


def gradients(inputs: list[torch.Tensor], loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, inputs[:2]))


def peak_bytes(name: str, kind: str) -> int:
    """Peak memory of forward and backward beyond inputs and gradients, measured in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_divergence", name, kind],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    return json.loads(done.stdout)


def high_water_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def measure(name: str, kind: str) -> int:
    inputs = make()
    step(name, make(8, 64), Divergence(kind))  # torch loads libraries at the first step
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator keeps would not count
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water_bytes()
    step(name, inputs, Divergence(kind))
    return high_water_bytes() - before - inputs[0].nbytes - inputs[1].nbytes


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_divergence_against_full_logits(benchmark, row, kind):
    inputs, spec = make(), Divergence(kind)
    seconds = paired({name: lambda name=name: step(name, inputs, spec) for name in IMPLEMENTATIONS}, rounds=2)
    benchmark.pedantic(lambda: step("tiled", inputs, spec), rounds=1)
    peaks = {name: peak_bytes(name, kind) for name in IMPLEMENTATIONS}
    assert abs(tiled(*inputs, spec).item() - full(*inputs, spec).item()) <= 1e-5
    assert 0 < peaks["tiled"] < BUDGET_BYTES
    row(
        full_s=seconds["full"],
        over_full_logits=seconds["full"] / seconds["tiled"],
        extra_bytes=peaks["tiled"],
        full_logits_bytes=peaks["full"],
    )


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_error_of_the_gradients(benchmark, row, kind):
    inputs, spec = make(tokens=128, vocabulary=16384), Divergence(kind)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    exact = gradients(wide, full(*wide, spec, torch.float64))
    gradients_by = {
        "tiled": benchmark.pedantic(lambda: gradients(inputs, tiled(*inputs, spec)), rounds=1),
        "fp32_logits": gradients(inputs, full(*inputs, spec)),
        "bf16_logits": gradients(inputs, full(*inputs, spec, torch.bfloat16)),
    }
    errors = {
        name: max(float((a.double() - b).norm() / b.norm()) for a, b in zip(grads, exact, strict=True))
        for name, grads in gradients_by.items()
    }
    assert errors["tiled"] <= 2 * errors["fp32_logits"]
    row(**{f"error_of_{name}": error for name, error in errors.items()})


if __name__ == "__main__":
    print(measure(*sys.argv[1:]))
