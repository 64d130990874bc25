r"""`step`: masked AdamW, in place, on the active coordinates of many tensors; the others are neither read nor written.

Of an active coordinate, with moments m, v that exist for active ones only, at step t:

    w <- w (1 - lr wd)
    m <- m + (1 - b1) (g - m)
    v <- b2 v + (1 - b2) g^2
    w <- w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

in fp32, operation by operation as `torch.optim.AdamW(foreach=False)` rounds them, with a square root that is rounded right
(torch's own on the CPU may be off by one unit). A bf16 weight is kept in one of four ways: "exact" with the 16 bits that it lacks
of an fp32 master; "kahan" with a bf16 compensation; "stochastic", rounded up or down by Philox, keyed by seed, step, tensor and
global coordinate, so that no sharding shows; "nearest", where updates below half a unit are lost.

Sources: Loshchilov and Hutter 2019 (AdamW); Salmon et al. 2011 (Philox); arXiv 2606.13657 (masked training).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from opdkernels.ops import register

SCHEMA = (
    "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor[] masks, Tensor[] offsets, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] extras, Tensor scalars, int[] starts, Tensor? grad_scale, Tensor? clip, Tensor? found_inf, "
    "bool maximize, int precision, int seed) -> ()"
)
PRECISIONS = ("nearest", "exact", "kahan", "stochastic")
DTYPES = (torch.float32, torch.bfloat16)
EXTRA_DTYPES = {"exact": torch.int16, "kahan": torch.bfloat16}
BLOCK = 2048  # coordinates between the counts that go with a bitmask
DECAY, WEIGHT, BETA2, SQUARE, BIAS, EPS, SIZE, STEP = range(8)  # columns of `scalars`


def fake(params, grads, masks, offsets, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, extras, scalars, starts, grad_scale, clip, found_inf, maximize, precision, seed) -> None:
    pass


def reference(
    params, grads, masks, offsets, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, extras, scalars, starts, grad_scale, clip, found_inf, maximize, precision, seed
) -> None:
    """The definition, in plain PyTorch, tensor by tensor."""
    if found_inf is not None and bool(found_inf):
        return
    for i, param in enumerate(params):
        flat, places = param.view(-1), places_of(masks[i], param.numel())
        grad = grads[i].view(-1)
        g = (grad if is_compact(grads[i], param, exp_avgs[i]) else grad[places]).float()
        g = g if grad_scale is None else g / grad_scale
        g = g if clip is None else g * clip
        stored = flat[places]
        extra = extras[i] if extras else None
        new = adamw(
            widened(stored, extra, precision), -g if maximize else g, exp_avgs[i], exp_avg_sqs[i], max_exp_avg_sqs[i] if max_exp_avg_sqs else None, scalars[i]
        )
        flat[places] = narrowed(new, param.dtype, extra, precision, (seed, int(scalars[i, STEP]), i, places + starts[i]))


def adamw(p, g, m, v, most, scalars) -> torch.Tensor:
    """The new fp32 values; m, v and the largest v so far move on in place. Every scalar is an fp32 number."""
    decay, weight, beta2, square, bias, eps, size = scalars[:STEP].unbind()
    m.copy_(fma(weight, g - m, m) if weight < 0.5 else fma(weight - 1, g - m, g))
    v.copy_(fma(square * g, g, v * beta2))
    second = v if most is None else most.copy_(torch.maximum(most, v))
    return p * decay + size * m / (second.double().sqrt().float() / bias + eps)


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a b + c of fp32, rounded once: the product is exact in fp64; the sum there is rounded to odd, so that rounding again to fp32
    is right (Boldo and Melquiond 2008)."""
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)  # exact (Knuth)
    bits = total.view(torch.int64)
    toward = torch.where((error > 0) == (total > 0), bits + 1, bits - 1)
    odd = torch.where((error != 0) & (bits & 1 == 0) & error.isfinite() & total.isfinite(), toward, bits)
    return odd.view(torch.float64).float()


def places_of(mask: torch.Tensor, numel: int) -> torch.Tensor:
    """Flat places of the active coordinates, int64, from bits (uint8) or places."""
    if mask.dtype != torch.uint8:
        return mask.long()
    bits = (mask.unsqueeze(1) >> torch.arange(8, device=mask.device)) & 1
    return torch.nonzero(bits.view(-1)[:numel]).view(-1)


def is_compact(grad: torch.Tensor, param: torch.Tensor, exp_avg: torch.Tensor) -> bool:
    return grad.numel() == exp_avg.numel() != param.numel()


def widened(stored: torch.Tensor, extra: torch.Tensor | None, precision: int) -> torch.Tensor:
    """fp32 values of stored weights."""
    if stored.dtype == torch.float32 or extra is None:
        return stored.float()
    if PRECISIONS[precision] == "kahan":
        return stored.float() + extra.float()
    low = extra.int() & 0xFFFF
    high = ((stored.view(torch.int16).int() & 0xFFFF) - (low >> 15)) & 0xFFFF
    return (high << 16 | low).view(torch.float32)


def narrowed(new: torch.Tensor, dtype: torch.dtype, extra: torch.Tensor | None, precision: int, key: tuple) -> torch.Tensor:
    """New values as they are stored; what a bf16 weight lacks goes to `extra`."""
    if dtype == torch.float32:
        return new
    kind = PRECISIONS[precision]
    if kind == "kahan":
        weight = new.bfloat16()
        extra.copy_(new - weight.float())  # type: ignore[union-attr]
        return weight
    if kind == "nearest":
        return new.bfloat16()
    bits = new.view(torch.int32).long() & 0xFFFFFFFF
    special = ~new.isfinite() if kind == "stochastic" else new.isnan()
    if kind == "exact":
        extra.copy_(torch.where(special, 0, bits & 0xFFFF))  # type: ignore[union-attr]
        up = bits + 0x8000
    else:
        up = bits + (philox(*key) & 0xFFFF)
    weight = ((up >> 16) & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.bfloat16)
    return torch.where(special, new.bfloat16(), weight)


def philox(seed: int, step: int, tensor: int, places: torch.Tensor) -> torch.Tensor:
    """A 32-bit word for each place, int64: the first of Philox4x32-10 at counter (place, tensor, step)."""
    mask = 0xFFFFFFFF
    c0, c1 = places & mask, places >> 32 & mask
    c2, c3 = torch.full_like(places, tensor), torch.full_like(places, step)
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(10):
        (a_high, a_low), (b_high, b_low) = wide_product(c0, 0xD2511F53), wide_product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0


def wide_product(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper and lower 32 bits of the product of 32-bit numbers, in int64 without overflow."""
    low, high = x * (factor & 0xFFFF), x * (factor >> 16)
    middle = high + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | (low & 0xFFFF)


register(SCHEMA, reference, fake)


def adamw_scalars(steps: Sequence[float], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> torch.Tensor:
    """fp32 [tensors, 8]: what `masked_adamw` multiplies with, computed in double and rounded once, as torch's scalars are.

    >>> adamw_scalars([1], 0.1, (0.9, 0.99), 1e-8, 0.5)[0, 0].item() == torch.tensor(0.95).item()
    True
    """
    b1, b2 = betas
    rows = [[1 - lr * weight_decay, 1 - b1, b2, 1 - b2, math.sqrt(1 - b2**t), eps, -(lr / (1 - b1**t)), t] for t in steps]
    return torch.tensor(rows, dtype=torch.float64).float().view(-1, 8)


def masked_adamw(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    scalars: torch.Tensor,
    *,
    max_exp_avg_sqs: Sequence[torch.Tensor] = (),
    extras: Sequence[torch.Tensor] = (),
    starts: Sequence[int] | None = None,
    grad_scale: torch.Tensor | None = None,
    clip: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    maximize: bool = False,
    precision: str = "nearest",
    seed: int = 0,
) -> None:
    """One step of AdamW on the active coordinates of all tensors, in place.

    params: fp32 or bf16, contiguous. grads: fp32 or bf16, of the param's shape and contiguous, or fp32 [active], already gathered.
    masks: uint8 [ceil(n / 8)], a bit a coordinate (little-endian), with offsets int64 [ceil(n / 2048) + 1], the active
    coordinates before each 2048; or int32 or int64 [active], ascending places, with empty offsets. exp_avgs, exp_avg_sqs,
    max_exp_avg_sqs (amsgrad): fp32 [active]. extras, of bf16 params: int16 [active] for "exact", bf16 for "kahan", else
    none; of fp32 params empty. scalars: of `adamw_scalars`. starts: the global place of each tensor's first coordinate.
    grad_scale divides gradients, clip multiplies them; where found_inf is not 0 nothing is done: each fp32 with one element.

    Raises TypeError for other dtypes, ValueError for what does not fit.
    """
    code, lists = PRECISIONS.index(precision) if precision in PRECISIONS else -1, (grads, masks, offsets, exp_avgs, exp_avg_sqs)
    if code < 0:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision}")
    if any(len(one) != len(params) for one in lists) or scalars.shape != (len(params), 8) or scalars.dtype != torch.float32:
        raise ValueError(f"{len(params)} params need as many gradients, masks, offsets, moments and rows of scalars")
    for i, param in enumerate(params):
        extra = extras[i] if extras else None
        check(i, param, grads[i], masks[i], offsets[i], exp_avgs[i], [exp_avg_sqs[i], *(max_exp_avg_sqs[i : i + 1])], extra, precision)
    starts = [0] * len(params) if starts is None else list(starts)
    torch.ops.opdkernels.masked_adamw_(
        list(params), list(grads), list(masks), list(offsets), list(exp_avgs), list(exp_avg_sqs), list(max_exp_avg_sqs), list(extras), scalars,
        starts, grad_scale, clip, found_inf, maximize, code, seed,
    )  # fmt: skip


def check(i, param, grad, mask, offset, exp_avg, moments, extra, precision) -> None:
    if param.dtype not in DTYPES or grad.dtype not in DTYPES:
        raise TypeError(f"param {i} is {param.dtype}, its gradient {grad.dtype}; step takes float32 and bfloat16")
    n, active = param.numel(), exp_avg.numel()
    fits = (n + 7) // 8 if mask.dtype == torch.uint8 else active
    blocks = -(-n // BLOCK) + 1 if mask.dtype == torch.uint8 else 0
    for what, tensor, dtypes, size in (
        ("mask", mask, (torch.uint8, torch.int32, torch.int64), fits),
        ("offsets", offset, (torch.int64,), blocks),
        *(("a moment", m, (torch.float32,), active) for m in (exp_avg, *moments)),
    ):
        if tensor.dtype not in dtypes or tensor.shape != (size,) or not tensor.is_contiguous():
            raise ValueError(f"{what} of param {i} must be contiguous {dtypes[0]} [{size}], not {tensor.dtype} {list(tensor.shape)}")
    if mask.dtype == torch.uint8 and int(offset[-1]) != active:
        raise ValueError(f"the offsets of param {i} end at {int(offset[-1])}, and it has moments of {active} coordinates")
    if not param.is_contiguous() or not grad.is_contiguous() or grad.shape not in (param.shape, (active,)):
        raise ValueError(f"param {i} and its gradient must be contiguous and of one shape, not {list(param.shape)} and {list(grad.shape)}")
    if grad.shape != param.shape and grad.dtype != torch.float32:
        raise ValueError(f"the gathered gradient of param {i} must be float32, not {grad.dtype}")
    wanted = EXTRA_DTYPES.get(precision) if param.dtype == torch.bfloat16 else None
    if wanted is not None and (extra is None or extra.dtype != wanted or extra.shape != (active,) or not extra.is_contiguous()):
        raise ValueError(f"precision {precision} needs a contiguous {wanted} [{active}] beside param {i}")
