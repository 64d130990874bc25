"""Matrix products of bf16 models on CPUs without bf16 instructions: computed in fp32, stored in bf16.

Without AVX512-BF16 or AMX, torch's bf16 products take several times as long as converting the operands to fp32 and
rounding the fp32 result. Both sum in fp32 and round once to bf16; the order of the sums differs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from opdkernels.errors import UsageError, printable

VARIABLE = "OPDKERNELS_CPU_PRODUCTS"
CHOICES = ("auto", "bfloat16", "float32")
EMULATED = 3.0  # times that a bf16 product takes longer than one in fp32 where it is emulated; measured: 4 to 25
MIN_ROWS = 8  # of the input of a linear layer, from which the conversion of its weight pays
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)

PRODUCTS = {
    F.linear,
    F.scaled_dot_product_attention,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    torch.einsum,
    *(getattr(owner, name) for owner in (torch, torch.Tensor) for name in ("matmul", "mm", "bmm", "addmm", "baddbmm")),
    torch.Tensor.__matmul__,
    torch.Tensor.__rmatmul__,
}


def cpu_products(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which bf16 products of tensors on the CPU are computed in fp32 where that is faster.

    Args:
        device: Device of the models; the context does nothing for another one than the CPU.

    Raises:
        UsageError: The environment variable OPDKERNELS_CPU_PRODUCTS is none of auto, bfloat16 and float32.

    Examples:
        >>> with cpu_products(torch.device("cpu")):
        ...     (torch.ones(2, 3).bfloat16() @ torch.ones(3).bfloat16()).dtype
        torch.bfloat16
    """
    return ProductsInFp32() if computes_in_fp32(device) else contextlib.nullcontext()


def computes_in_fp32(device: torch.device) -> bool:
    """Whether bf16 products on a device are computed in fp32; raises as `cpu_products`."""
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise UsageError(f"{VARIABLE} is {printable(choice)}; set it to one of {', '.join(CHOICES)}")
    return device.type == "cpu" and (choice == "float32" or (choice == "auto" and bf16_is_emulated()))


@functools.cache
def bf16_is_emulated() -> bool:
    """Whether a product of bf16 matrices takes more than EMULATED times as long on this CPU as one of fp32 matrices."""
    operands = {dtype: torch.ones(256, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(operands, float("inf"))
    for _ in range(6):  # the first product of each dtype also loads the kernel
        for dtype, operand in operands.items():
            start = time.perf_counter()
            torch.mm(operand, operand)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.bfloat16] > EMULATED * seconds[torch.float32]


class ProductsInFp32(TorchFunctionMode):
    """Computes products whose tensors are all bf16 on the CPU in fp32, and rounds the result to bf16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or not is_bf16_on_cpu((args, kwargs)):
            return func(*args, **kwargs)
        if func is F.linear:
            return linear(*args, **kwargs)
        args, kwargs = tree_map(to_fp32, (args, kwargs))
        return func(*args, **kwargs).bfloat16()


def is_bf16_on_cpu(arguments: Any) -> bool:
    """Whether all floating-point tensors in nested arguments are plain bf16 tensors on the CPU, and there is one."""
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    return bool(floating) and all(
        type(tensor) in PLAIN_TYPES and tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"
        for tensor in floating
    )


def to_fp32(value: Any) -> Any:
    """A bf16 tensor in fp32, any other value as it is."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` of bf16 tensors, in fp32 if the input has MIN_ROWS rows or more."""
    if input.numel() < MIN_ROWS * weight.shape[-1]:
        return F.linear(input, weight, bias)
    return LinearInFp32.apply(input, weight, bias)


class LinearInFp32(torch.autograd.Function):
    """A linear layer in fp32 that keeps its bf16 operands for the backward pass, not copies in fp32."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        return F.linear(input.float(), weight.float(), None if bias is None else bias.float()).bfloat16()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad = grads[0].float()
        rows = grad.reshape(-1, grad.shape[-1])
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            (grad @ weight.float()).bfloat16() if needs_input else None,
            (rows.T @ input.reshape(-1, input.shape[-1]).float()).bfloat16() if needs_weight else None,
            rows.sum(0).bfloat16() if needs_bias else None,
        )
