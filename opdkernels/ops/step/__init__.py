r"""`step`: masked AdamW and SGD, in place, on the active coordinates of many tensors; the others are neither read nor written.

Of an active coordinate, with moments m, v that exist for active ones only, at step t, AdamW:

    w <- w (1 - lr wd)
    m <- m + (1 - b1) (g - m)
    v <- b2 v + (1 - b2) g^2
    w <- w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

and SGD, with momentum mu, dampening d and, where nesterov, g + mu m for m:

    g <- g + wd w
    m <- mu m + (1 - d) g, at t = 1 g
    w <- w - lr m

in fp32, operation by operation as `torch.optim.AdamW` and `SGD` round them with `foreach=False`, with a square root that is
rounded right (torch's own on the CPU may be off by one unit). Weight decay may draw to where a weight began instead of to zero. A
bf16 weight is kept in one of four ways: "split_master" with the 16 bits that it lacks of an fp32 master; "kahan" with a bf16
compensation; "stochastic", rounded up or down by Philox, keyed by seed, step, tensor and global coordinate, so that no sharding
shows; "nearest", where updates below half a unit are lost.

Sources: Loshchilov and Hutter 2019 (AdamW); Sutskever et al. 2013 (Nesterov); Salmon et al. 2011 (Philox); arXiv 2606.13657.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from opdkernels.bits import bit_counts
from opdkernels.ops import register

COMMON = (
    "Tensor[] inits, Tensor[] cohorts, Tensor scalars, int[] rows, int[] starts, int[] ordinals, Tensor? grad_scale, Tensor? clip, "
    "Tensor? found_inf, bool maximize"
)
ADAMW = (
    "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor[] masks, Tensor[] offsets, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    f"Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] extras, {COMMON}, int precision, int seed) -> ()"
)
SGD = (
    "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor[] masks, Tensor[] offsets, Tensor(b!)[] momentum_buffers, Tensor(c!)[] extras, "
    f"{COMMON}, bool nesterov, int precision, int seed) -> ()"
)
TAKE = "masked_gather_(Tensor values, Tensor mask, Tensor offsets, Tensor(a!) into, bool add) -> ()"
PUT = "masked_scatter_(Tensor(a!) values, Tensor mask, Tensor offsets, Tensor compact) -> ()"
PRECISIONS = ("nearest", "split_master", "kahan", "stochastic")
DTYPES = (torch.float32, torch.bfloat16)
RESIDUAL_DTYPES = {"split_master": torch.int16, "kahan": torch.bfloat16}
BLOCK = 2048  # coordinates between the counts that go with a bitmask
COHORTS = 256  # of one tensor, at most
DECAY, WEIGHT, BETA2, SQUARE, BIAS, EPS, SIZE, STEP = range(8)  # columns of AdamW's scalars
MOMENTUM, DAMP, FIRST = range(1, 4)  # of SGD's, which share DECAY, SIZE and STEP


def reference_adamw(
    params,
    grads,
    masks,
    offsets,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    extras,
    inits,
    cohorts,
    scalars,
    rows,
    starts,
    ordinals,
    grad_scale,
    clip,
    found_inf,
    maximize,
    precision,
    seed,
) -> None:
    """The definition of AdamW's step, in plain PyTorch, tensor by tensor."""

    def update(i, p, g, w0, columns):
        return adamw(p, g, w0, exp_avgs[i], exp_avg_sqs[i], max_exp_avg_sqs[i] if max_exp_avg_sqs else None, columns)

    each_active(
        update,
        params,
        grads,
        masks,
        extras,
        inits,
        cohorts,
        scalars,
        rows,
        starts,
        ordinals,
        grad_scale,
        clip,
        found_inf,
        maximize,
        precision,
        seed,
    )


def reference_sgd(
    params,
    grads,
    masks,
    offsets,
    momentum_buffers,
    extras,
    inits,
    cohorts,
    scalars,
    rows,
    starts,
    ordinals,
    grad_scale,
    clip,
    found_inf,
    maximize,
    nesterov,
    precision,
    seed,
) -> None:
    """The definition of SGD's step, in plain PyTorch, tensor by tensor."""

    def update(i, p, g, w0, columns):
        return sgd(p, g, w0, momentum_buffers[i] if momentum_buffers else None, columns, nesterov)

    each_active(
        update,
        params,
        grads,
        masks,
        extras,
        inits,
        cohorts,
        scalars,
        rows,
        starts,
        ordinals,
        grad_scale,
        clip,
        found_inf,
        maximize,
        precision,
        seed,
    )


def reference_gather(values, mask, offsets, into, add) -> None:
    taken = values.view(-1)[active_indices(mask, values.numel())].float()
    into.copy_(into + taken if add else taken)


def reference_scatter(values, mask, offsets, compact) -> None:
    values.view(-1)[active_indices(mask, values.numel())] = compact.to(values.dtype)


def each_active(
    update: Callable,
    params,
    grads,
    masks,
    extras,
    inits,
    cohorts,
    scalars,
    rows,
    starts,
    ordinals,
    grad_scale,
    clip,
    found_inf,
    maximize,
    precision,
    seed,
) -> None:
    """Takes what is active of each tensor, widened, lets `update(tensor, weights, gradients, weights at the start, columns of
    scalars)` make new weights of it, and puts them back, narrowed."""
    if found_inf is not None and bool(found_inf):
        return
    for i, param in enumerate(params):
        flat, places = param.view(-1), active_indices(masks[i], param.numel())
        grad = grads[i].view(-1)
        g = (grad if is_compact(grad.numel(), param.numel(), len(places)) else grad[places]).float()
        g = g if grad_scale is None else g / grad_scale
        g = g if clip is None else g * clip
        stored = flat[places]
        extra, w0 = extras[i] if extras else None, inits[i] if inits and inits[i].numel() else None
        mine = scalars[rows[i]]
        columns = list((scalars[rows[i] + cohorts[i].long()].T if cohorts and cohorts[i].numel() else mine).unbind())
        new = update(
            i, widened(stored, extra, precision), -g if maximize else g, None if w0 is None else w0.float(), columns
        )
        flat[places] = narrowed(
            new, param.dtype, extra, precision, (seed, int(mine[STEP]), ordinals[i], places + starts[i])
        )


def adamw(p, g, w0, m, v, most, columns) -> torch.Tensor:
    """The new fp32 values; m, v and the largest v so far move on in place. Every scalar is an fp32 number."""
    decay, weight, beta2, square, bias, eps, size = columns[:STEP]
    p = p * decay if w0 is None else fma(decay, p - w0, w0)
    m.copy_(torch.where(weight < 0.5, fma(weight, g - m, m), fma(weight - 1, g - m, g)))
    v.copy_(fma(square * g, g, v * beta2))
    second = v if most is None else most.copy_(torch.maximum(most, v))
    return p + size * m / (second.double().sqrt().float() / bias + eps)


def sgd(p, g, w0, buffer, columns, nesterov) -> torch.Tensor:
    """The new fp32 values; the momentum buffer, if any, moves on in place."""
    decay, momentum, damp, first, size = (columns[j] for j in (DECAY, MOMENTUM, DAMP, FIRST, SIZE))
    g = torch.where(decay != 0, fma(decay, p if w0 is None else p - w0, g), g)
    if buffer is not None:
        buffer.copy_(torch.where(first != 0, g, fma(damp, g, buffer * momentum)))
        g = fma(momentum, buffer, g) if nesterov else buffer
    return fma(size, g, p)


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


def active_indices(mask: torch.Tensor, numel: int) -> torch.Tensor:
    """Flat places of the active coordinates, int64, from bits (uint8) or places."""
    if mask.dtype != torch.uint8:
        return mask.long()
    bits = (mask.unsqueeze(1) >> torch.arange(8, device=mask.device)) & 1
    return torch.nonzero(bits.view(-1)[:numel]).view(-1)


def is_compact(grads: int, numel: int, active: int) -> bool:
    """Whether so many gradients are those of the active coordinates alone."""
    return grads == active != numel


def widened(stored: torch.Tensor, extra: torch.Tensor | None, precision: int) -> torch.Tensor:
    """fp32 values of stored weights."""
    if stored.dtype == torch.float32 or PRECISIONS[precision] not in RESIDUAL_DTYPES:
        return stored.float()
    if PRECISIONS[precision] == "kahan":
        return stored.float() + extra.float()  # type: ignore[union-attr]
    low, upper = extra.int() & 0xFFFF, stored.view(torch.int16).int() & 0xFFFF  # type: ignore[union-attr]
    low = torch.where((upper & 0x7FFF == 0) & (low >= 0x8000), 0, low)  # a weight that someone else set to zero
    high = (upper - (low >> 15)) & 0xFFFF
    return (high << 16 | low).view(torch.float32)


def narrowed(
    new: torch.Tensor, dtype: torch.dtype, extra: torch.Tensor | None, precision: int, key: tuple
) -> torch.Tensor:
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
    if kind == "split_master":
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


register("step", ADAMW, reference_adamw)
register("step", SGD, reference_sgd)
register("step", TAKE, reference_gather)
register("step", PUT, reference_scatter)


def adamw_scalars(
    steps: Sequence[float], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.Tensor:
    """fp32 [steps, 8]: what `masked_adamw` multiplies with, computed in double and rounded once, as torch's scalars are.

    >>> adamw_scalars([1], 0.1, (0.9, 0.99), 1e-8, 0.5)[0, 0].item() == torch.tensor(0.95).item()
    True
    """
    b1, b2 = betas
    rows = [
        [1 - lr * weight_decay, 1 - b1, b2, 1 - b2, math.sqrt(1 - b2**t), eps, -(lr / (1 - b1**t)), t] for t in steps
    ]
    return torch.tensor(rows, dtype=torch.float64).float().view(-1, 8)


def sgd_scalars(
    steps: Sequence[float], lr: float, momentum: float, dampening: float, weight_decay: float
) -> torch.Tensor:
    """fp32 [steps, 8]: what `masked_sgd` multiplies with, computed in double and rounded once, as torch's scalars are."""
    rows = [[weight_decay, momentum, 1 - dampening, t == 1, 0, 0, -lr, t] for t in steps]
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
    inits: Sequence[torch.Tensor] = (),
    cohorts: Sequence[torch.Tensor] = (),
    rows: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
    ordinals: Sequence[int] | None = None,
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
    max_exp_avg_sqs (amsgrad): fp32 [active]. extras, of bf16 params: int16 [active] for "split_master", bf16 for "kahan", else
    none; of fp32 params empty. inits: [active] of the param's dtype, what weight decay draws to instead of zero, or none.
    scalars: of `adamw_scalars`; tensor i uses row rows[i], by default i, or, where it has cohorts, uint8 [active], row
    rows[i] + cohort of each coordinate: coordinates that joined later have a step count of their own. starts: the global place
    of each tensor's first coordinate; ordinals: its number in the model, by default i (both for "stochastic"). grad_scale divides
    gradients, clip multiplies them; where found_inf is not 0 nothing is done: each fp32 with one element.

    Raises TypeError for other dtypes, ValueError for what does not fit.
    """
    common = checked(
        params,
        grads,
        masks,
        offsets,
        [exp_avgs, exp_avg_sqs, max_exp_avg_sqs],
        2,
        extras,
        inits,
        cohorts,
        scalars,
        rows,
        starts,
        ordinals,
        precision,
    )
    torch.ops.opdkernels.masked_adamw_(
        list(params),
        list(grads),
        list(masks),
        list(offsets),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(max_exp_avg_sqs),
        list(extras),
        list(inits),
        list(cohorts),
        scalars,
        *common,
        grad_scale,
        clip,
        found_inf,
        maximize,
        PRECISIONS.index(precision),
        seed,
    )


def masked_sgd(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    scalars: torch.Tensor,
    *,
    momentum_buffers: Sequence[torch.Tensor] = (),
    extras: Sequence[torch.Tensor] = (),
    inits: Sequence[torch.Tensor] = (),
    cohorts: Sequence[torch.Tensor] = (),
    rows: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
    ordinals: Sequence[int] | None = None,
    grad_scale: torch.Tensor | None = None,
    clip: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    maximize: bool = False,
    nesterov: bool = False,
    precision: str = "nearest",
    seed: int = 0,
) -> None:
    """One step of SGD on the active coordinates of all tensors, in place. scalars: of `sgd_scalars`; momentum_buffers: fp32
    [active], or none without momentum; all else as `masked_adamw` takes it, and raises.
    """
    common = checked(
        params,
        grads,
        masks,
        offsets,
        [momentum_buffers],
        0,
        extras,
        inits,
        cohorts,
        scalars,
        rows,
        starts,
        ordinals,
        precision,
    )
    torch.ops.opdkernels.masked_sgd_(
        list(params),
        list(grads),
        list(masks),
        list(offsets),
        list(momentum_buffers),
        list(extras),
        list(inits),
        list(cohorts),
        scalars,
        *common,
        grad_scale,
        clip,
        found_inf,
        maximize,
        nesterov,
        PRECISIONS.index(precision),
        seed,
    )


def masked_gather(
    values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, into: torch.Tensor, *, add: bool = False
) -> torch.Tensor:
    """`into`, fp32 [active], with the active of `values`, fp32 or bf16 and contiguous, or, where `add`, with those added to it.
    mask and offsets as `masked_adamw` takes them.

    Raises TypeError for other dtypes, ValueError for what does not fit.
    """
    check(0, values, values, mask, offsets, [into], None, None, None, 0, "nearest")
    torch.ops.opdkernels.masked_gather_(values, mask, offsets, into, add)
    return into


def masked_scatter(values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, compact: torch.Tensor) -> None:
    """Sets the active of `values`, fp32 or bf16 and contiguous, in place, to `compact`, fp32 [active], rounded to nearest. mask and
    offsets as `masked_adamw` takes them.

    Raises TypeError for other dtypes, ValueError for what does not fit.
    """
    check(0, values, values, mask, offsets, [compact], None, None, None, 0, "nearest")
    torch.ops.opdkernels.masked_scatter_(values, mask, offsets, compact)


def checked(
    params, grads, masks, offsets, moments, needed, extras, inits, cohorts, scalars, rows, starts, ordinals, precision
) -> tuple[list[int], list[int], list[int]]:
    """rows, starts and ordinals, where everything fits. The first `needed` of the lists of moments must be there."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision}")
    count = len(params)
    rows, ordinals = (list(range(count)) if one is None else list(one) for one in (rows, ordinals))
    starts = [0] * count if starts is None else list(starts)
    must = (grads, masks, offsets, rows, starts, ordinals, *moments[:needed])
    may = (extras, inits, cohorts, *moments[needed:])
    if any(len(one) != count for one in must) or any(len(one) not in (0, count) for one in may):
        raise ValueError(f"{count} params need as many gradients, masks, offsets, moments and places")
    if (
        scalars.dtype != torch.float32
        or scalars.ndim != 2
        or scalars.shape[1] != 8
        or any(not 0 <= row < len(scalars) for row in rows)
    ):
        raise ValueError(
            f"scalars must be float32 [steps, 8] with a row for each of {count} params, not {scalars.dtype} {list(scalars.shape)}"
        )
    for i, param in enumerate(params):
        extra, init, cohort = (one[i] if one else None for one in (extras, inits, cohorts))
        check(
            i,
            param,
            grads[i],
            masks[i],
            offsets[i],
            [one[i] for one in moments if one],
            extra,
            init,
            cohort,
            len(scalars) - rows[i],
            precision,
        )
    return rows, starts, ordinals


def check(i, param, grad, mask, offset, moments, extra, init, cohort, rows, precision) -> None:
    if param.dtype not in DTYPES or grad.dtype not in DTYPES:
        raise TypeError(f"param {i} is {param.dtype}, its gradient {grad.dtype}; step takes float32 and bfloat16")
    if grad.device != param.device:
        raise ValueError(elsewhere(i, param, "its gradient", grad))
    n, bits = param.numel(), mask.dtype == torch.uint8
    blocks = -(-n // BLOCK) + 1 if bits else 0
    fits = [
        ("mask", mask, (torch.uint8, torch.int32, torch.int64), (n + 7) // 8 if bits else mask.numel()),
        ("offsets", offset, (torch.int64,), blocks),
    ]
    refuse_others(i, param, fits)
    active = active_in(i, mask, offset, n)
    fits = [("a moment", moment, (torch.float32,), active) for moment in moments]
    wanted = RESIDUAL_DTYPES.get(precision) if param.dtype == torch.bfloat16 else None
    if wanted is not None and extra is None:
        raise ValueError(f"precision {precision} needs a contiguous {wanted} [{active}] beside param {i}")
    if extra is not None:
        fits.append(("what a bf16 weight lacks", extra, (wanted or extra.dtype,), active if wanted else extra.numel()))
    if init is not None and init.numel():
        fits.append(("the start", init, (param.dtype,), active))
    if cohort is not None and cohort.numel():
        fits.append(("the cohorts", cohort, (torch.uint8,), active))
    refuse_others(i, param, fits)
    if cohort is not None and cohort.numel() and int(cohort.max()) >= rows:
        raise ValueError(f"param {i} has a cohort {int(cohort.max())} and {rows} rows of scalars")
    if not param.is_contiguous() or not grad.is_contiguous() or grad.shape not in (param.shape, (active,)):
        raise ValueError(
            f"param {i} and its gradient must be contiguous and of one shape, not {list(param.shape)} and {list(grad.shape)}"
        )
    if grad.shape != param.shape and grad.dtype != torch.float32:
        raise ValueError(f"the gathered gradient of param {i} must be float32, not {grad.dtype}")


def active_in(i: int, mask: torch.Tensor, offset: torch.Tensor, n: int) -> int:
    """Active coordinates of a mask, all of it looked at: a kernel would follow a wrong place anywhere."""
    if mask.dtype != torch.uint8:
        if mask.numel() and (int(mask[0]) < 0 or int(mask[-1]) >= n or bool((mask[1:] <= mask[:-1]).any())):
            raise ValueError(f"the places of param {i} must ascend within its {n} coordinates")
        return mask.numel()
    if n % 8 and int(mask[-1]) >> n % 8:
        raise ValueError(f"the mask of param {i} has bits beyond the last of its {n} coordinates")
    padded = np.zeros((offset.numel() - 1) * BLOCK // 8, np.uint8)
    padded[: mask.numel()] = mask.cpu().numpy()
    counts = bit_counts(padded.reshape(-1, BLOCK // 8)).sum(1, dtype=np.int64)
    if not np.array_equal(offset.cpu().numpy(), np.concatenate(([0], np.cumsum(counts)))):
        raise ValueError(f"the offsets of param {i} are not the counts of its mask")
    return int(offset[-1])


def elsewhere(i, param, what, tensor) -> str:
    return f"param {i} is on {param.device}, {what} on {tensor.device}; move one of them"


def refuse_others(i, param, fits) -> None:
    for what, tensor, dtypes, size in fits:
        if tensor.device != param.device:
            raise ValueError(elsewhere(i, param, what, tensor))
        if tensor.dtype not in dtypes or tensor.shape != (size,) or not tensor.is_contiguous():
            raise ValueError(
                f"{what} of param {i} must be contiguous {dtypes[0]} [{size}], not {tensor.dtype} {list(tensor.shape)}"
            )
