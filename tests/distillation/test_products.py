"""Products of bf16 tensors on the CPU are computed in fp32 and rounded once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from opdkernels.distillation import products
from opdkernels.distillation.evaluation import evaluate_checkpoint
from opdkernels.distillation.loop import train
from opdkernels.distillation.products import LinearInFp32, ProductsInFp32, cpu_products
from opdkernels.errors import UsageError

HALF_UNIT = 2**-8  # relative rounding error of bf16


def normal(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).bfloat16().requires_grad_()


CALLS = {
    "linear": (F.linear, normal(3, 5, 64), normal(48, 64), normal(48)),
    "linear without bias": (F.linear, normal(16, 64), normal(48, 64)),
    "linear of few rows": (F.linear, normal(2, 64), normal(48, 64), normal(48)),
    "linear of a vector": (F.linear, normal(64), normal(48, 64)),
    "matmul": (torch.matmul, normal(2, 9, 64), normal(64, 7)),
    "operator": (lambda a, b: a @ b, normal(9, 64), normal(64, 7)),
    "bmm": (torch.bmm, normal(3, 9, 64), normal(3, 64, 7)),
    "addmm": (torch.addmm, normal(7), normal(9, 64), normal(64, 7)),
    "einsum": (lambda a, b: torch.einsum("bik,bjk->bij", a, b), normal(2, 9, 64), normal(2, 7, 64)),
    "conv2d": (F.conv2d, normal(2, 3, 8, 8), normal(4, 3, 3, 3), normal(4)),
}


@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_those_of_fp64_rounded(name):
    function, *arguments = CALLS[name]
    with ProductsInFp32():
        result = function(*arguments)
    wide = [argument.detach().double().requires_grad_() for argument in arguments]
    expected = function(*wide)
    assert result.dtype == torch.bfloat16
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = torch.autograd.grad(result, arguments, grad)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())
    for value, exact in zip((result, *grads), (expected, *expected_grads), strict=True):
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(
            value.double(), exact, rtol=1.01 * HALF_UNIT, atol=1e-4 * exact.detach().abs().max().item()
        )


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_that_of_fp32_rounded(causal):
    q, k, v = (normal(2, 3, n, 16) for n in (8, 8, 8))
    with ProductsInFp32():
        result = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal)
    assert torch.equal(result, expected.bfloat16())


def test_backward_keeps_no_copy_in_fp32():
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    x, weight = normal(16, 64), normal(48, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), ProductsInFp32():
        F.linear(x, weight)
    assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), weight.data_ptr()}


def test_frozen_operands_get_no_gradient():
    x, weight = normal(16, 64), normal(48, 64).detach()
    LinearInFp32.apply(x, weight, None).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
def test_other_dtypes_are_left_to_torch(dtypes):
    a, b = (normal(9, 9).detach().to(dtype) for dtype in dtypes)
    with ProductsInFp32():
        if dtypes[0] == dtypes[1]:
            assert (a @ b).dtype == dtypes[0]
        else:
            with pytest.raises(RuntimeError, match="dtype"):
                torch.mm(a, b)


@pytest.mark.parametrize(
    ("setting", "emulated", "in_fp32"),
    [("auto", True, True), ("auto", False, False), ("float32", False, True), ("bfloat16", True, False)],
)
def test_environment_variable_overrides_the_measurement(monkeypatch, setting, emulated, in_fp32):
    monkeypatch.setenv(products.VARIABLE, setting)
    monkeypatch.setattr(products, "bf16_is_emulated", lambda: emulated)
    assert isinstance(cpu_products(torch.device("cpu")), ProductsInFp32) == in_fp32
    assert not isinstance(cpu_products(torch.device("meta")), ProductsInFp32)


def test_unknown_setting_is_an_error(monkeypatch):
    monkeypatch.setenv(products.VARIABLE, "fp32")
    with pytest.raises(UsageError, match="OPDKERNELS_CPU_PRODUCTS is fp32; set it to one of auto, bfloat16, float32"):
        cpu_products(torch.device("cpu"))


@pytest.mark.parametrize(("seconds_in_bf16", "is_emulated"), [(1.0, False), (2.9, False), (3.1, True)])
def test_measurement_compares_both_dtypes(monkeypatch, seconds_in_bf16, is_emulated):
    now = 0.0

    def mm(a, b):
        nonlocal now
        now += seconds_in_bf16 if a.dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(products.torch, "mm", mm)
    monkeypatch.setattr(products.time, "perf_counter", lambda: now)
    assert products.bf16_is_emulated.__wrapped__() is is_emulated


@pytest.mark.parametrize("setting", ["float32", "bfloat16"])
def test_training_and_evaluation_follow_the_setting(options, tmp_path, monkeypatch, setting):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return F.linear(*arguments)

    monkeypatch.setattr(products, "linear", counted)
    monkeypatch.setenv(products.VARIABLE, setting)
    chosen = options(max_steps=1, num_eval_prompts=2, dtype="bfloat16")
    train(chosen, tmp_path)
    assert bool(calls) == (setting == "float32")
    calls.clear()
    evaluate_checkpoint(chosen, tmp_path / "checkpoint-1")
    assert bool(calls) == (setting == "float32")
