"""The inputs on which every backend of `step` must equal the reference."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch

from opdkernels.ops import step
from tests.ops.conformance import BF16, FP32, INT64, Allocator, Case, Family, Kernel, assert_equal, pack_bits

INF, NAN = float("inf"), float("nan")
EXTREMES = (0.0, -0.0, 1e-45, 1e-40, 3e-39, 1.2e-38, 1e-30, 1.0, 1e19, 3e38, -3.39e38, INF, -INF, NAN)


def mask_tensors(flags: torch.Tensor, index_dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """A mask and its block counts: a bitmap and the active coordinates before each block, or indices of a dtype."""
    if index_dtype:
        return [flags.nonzero().flatten().to(index_dtype), torch.zeros(0, dtype=INT64)]
    padded = flags.new_zeros((len(flags) + step.BLOCK - 1) // step.BLOCK * step.BLOCK)
    padded[: len(flags)] = flags
    return [pack_bits(flags), torch.cat([torch.zeros(1, dtype=INT64), padded.view(-1, step.BLOCK).sum(1).cumsum(0)])]


def call_step(
    kernel: Kernel,
    allocator: Allocator,
    state: list[list[torch.Tensor]],
    scalars: list[torch.Tensor],
    factors: list[torch.Tensor],
    precision: str,
    add: bool,
) -> list[torch.Tensor]:
    """Two steps of AdamW, or of SGD where there is no second moment; then active weights are gathered and scattered."""
    params, grads, masks, offsets, first, second, largest, residuals = state
    ids = list(range(len(params)))
    for rows in scalars:
        common = (residuals, [], [], rows, ids, [7 * i for i in ids], ids, *factors, None, False)
        code = step.PRECISIONS.index(precision)
        if second:
            kernel("masked_adamw_")(params, grads, masks, offsets, first, second, largest, *common, code, 11)
        else:
            kernel("masked_sgd_")(params, grads, masks, offsets, first, *common, True, code, 11)
    for param, mask, offset, values in zip(params, masks, offsets, first, strict=True):
        kernel("masked_gather_")(param, mask, offset, values, add)
        kernel("masked_scatter_")(param, mask, offset, values)
    return [tensor for tensors in (params, first, second, largest, residuals) for tensor in tensors]


def make_state(
    sizes: Sequence[int],
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    precision: str,
    index_dtype: torch.dtype | None,
    adamw: bool,
    density: float = 0.2,
) -> list[list[torch.Tensor]]:
    """Parameters and gradients with extremes among them, masks, and a state of zeros."""
    generator = torch.Generator().manual_seed(sum(sizes))
    params, grads = (
        [(scale * torch.randn(n, generator=generator)).to(kind) for n in sizes]
        for scale, kind in ((0.02, dtype), (1e-3, grad_dtype))
    )
    for tensor, (i, value) in itertools.product((*params, *grads), enumerate(EXTREMES)):
        tensor[i :: 199 + i] = value
    masks, offsets = zip(
        *(mask_tensors(torch.rand(n, generator=generator) < density, index_dtype) for n in sizes), strict=True
    )
    active = [int(offset[-1]) if len(offset) else len(mask) for mask, offset in zip(masks, offsets, strict=True)]

    def zeros(kind: torch.dtype = FP32) -> list[torch.Tensor]:
        return [torch.zeros(count, dtype=kind) for count in active]

    residual = step.RESIDUAL_DTYPES.get(precision) if dtype == BF16 else None
    moments = [zeros(), zeros(), zeros()] if adamw else [zeros(), [], []]
    return [params, grads, list(masks), list(offsets), *moments, zeros(residual) if residual else []]


def two_steps(count: int, adamw: bool) -> list[torch.Tensor]:
    """The scalars of steps 1 and 2."""
    if adamw:
        return [step.adamw_scalars([t] * count, 1e-3, (0.9, 0.999), 1e-8, 0.01) for t in (1, 2)]
    return [step.sgd_scalars([t] * count, 1e-2, 0.9, 0.1, 0.01) for t in (1, 2)]


def factors() -> list[torch.Tensor]:
    return [torch.tensor([3.0]), torch.tensor([0.7])]


def cases(n: int) -> Iterator[Case]:
    sizes = (n, 31, 0, 2048)
    kinds = [(FP32, "nearest"), *((BF16, precision) for precision in step.PRECISIONS)]
    for adamw, (dtype, precision), index_dtype in itertools.product((True, False), kinds, (None, torch.int32)):
        grad = BF16 if precision in ("nearest", "kahan") else FP32
        state = functools.partial(make_state, sizes, dtype, grad, precision, index_dtype, adamw)
        yield Case(
            f"{'AdamW' if adamw else 'SGD'} {dtype} {precision} {'indices' if index_dtype else 'bitmap'} {n}",
            lambda state=state, a=adamw, p=precision: [state(), two_steps(len(sizes), a), factors(), p, a],
            call_step,
        )


def check_repeated(kernel: Kernel, expected_by: Kernel, device: torch.device, tile: int, times: int) -> None:
    n = tile // step.BLOCK * step.BLOCK
    state = make_state((n,), BF16, BF16, "nearest", None, True, density=0.05)
    repeated = [[tensor.to(device).repeat(times) for tensor in tensors] for tensors in state]
    (counts,) = state[3]
    blocks = (counts[1:] + counts[-1] * torch.arange(times).unsqueeze(1)).flatten()
    repeated[3] = [torch.cat([torch.zeros(1, dtype=INT64), blocks]).to(device)]
    on_device = Allocator(device).put([two_steps(1, True), factors()])
    outputs = call_step(kernel, Allocator(device), repeated, *on_device, "nearest", False)
    expected = call_step(expected_by, Allocator(), state, two_steps(1, True), factors(), "nearest", False)
    for i, (output, once) in enumerate(zip(outputs, expected, strict=True)):
        parts = output.view(torch.int16 if output.itemsize == 2 else torch.int32).view(times, -1)
        assert bool((parts == parts[:1]).all()), f"output {i} is not the same in every part"
        assert_equal([output[: len(once)]], [once], [])


FAMILY = Family(
    "step",
    ("masked_adamw_", "masked_sgd_", "masked_gather_", "masked_scatter_"),
    cases,
    tuple,
    check_repeated,
    bytes_per_coordinate=8,
)
