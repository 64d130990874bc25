r"""`step`: masked AdamW and SGD, in place, on the active coordinates of many tensors.

Other coordinates are neither read nor written.

For each active coordinate with weight w and gradient g, AdamW at step t is

    w <- w (1 - lr wd)
    m <- m + (1 - b1) (g - m)
    v <- b2 v + (1 - b2) g^2
    w <- w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

and SGD with momentum mu and dampening d is

    g <- g + wd w
    m <- mu m + (1 - d) g, at t = 1 m <- g
    w <- w - lr m, with nesterov w <- w - lr (g + mu m)

in fp32, operation by operation as `torch.optim.AdamW` and `SGD` round them with `foreach=False`, with a correctly
rounded square root (torch's on the CPU may be off by one unit in the last place). The moments m and v exist for active
coordinates only. Weight decay pulls towards zero or towards an initial value. A bf16 weight is kept in one of four
precisions: "split_master" stores the 16 bits that it lacks of an fp32 master; "kahan" stores a bf16 compensation;
"stochastic" rounds up or down by Philox, keyed by seed, step, tensor and global coordinate, so that the result does not
depend on the sharding; "nearest" loses updates below half a unit in the last place.

`changed` records which active coordinates have another bf16 value after the step than before, by bits: -0 differs from
+0, and a NaN from a NaN of another payload. fp32 weights are compared after rounding both to bf16. Bits are set and
never cleared, so that after several steps they contain every coordinate that differs from its value before the first.

Sources: Loshchilov and Hutter 2019 (AdamW); Sutskever et al. 2013 (Nesterov); Salmon et al. 2011 (Philox); arXiv
2606.13657.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from opdkernels.ops import register
from opdkernels.ops.step import validation
from opdkernels.ops.step.args import ADAMW_FIELDS, SGD_FIELDS, StepArgs, adamw_operator, flatten, schema, sgd_operator
from opdkernels.ops.step.layout import (
    IS_FIRST,
    MOMENTUM,
    NEG_STEP_SIZE,
    NUM_SCALARS,
    ONE_MINUS_DAMPENING,
    PRECISIONS,
    STEP,
    WEIGHT_DECAY,
)
from opdkernels.ops.step.validation import RESIDUAL_DTYPES

GATHER = "masked_gather_(Tensor values, Tensor mask, Tensor block_counts, Tensor(a!) out, bool add) -> ()"
SCATTER = "masked_scatter_(Tensor(a!) values, Tensor mask, Tensor block_counts, Tensor compact) -> ()"


@adamw_operator
def reference_adamw(args: StepArgs) -> None:
    """The definition of the AdamW step in plain PyTorch."""

    def update(i, p, g, w0, columns):
        v_max = args.max_exp_avg_sqs[i] if args.max_exp_avg_sqs and args.max_exp_avg_sqs[i].numel() else None
        return adamw(p, g, w0, args.exp_avgs[i], args.exp_avg_sqs[i], v_max, columns)

    update_active(args, update)


@sgd_operator
def reference_sgd(args: StepArgs) -> None:
    """The definition of the SGD step in plain PyTorch."""

    def update(i, p, g, w0, columns):
        buffer = args.momentum_buffers[i] if args.momentum_buffers else None
        return sgd(p, g, w0, buffer, columns, args.nesterov)

    update_active(args, update)


def reference_gather(
    values: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor, out: torch.Tensor, add: bool
) -> None:
    """The definition of `masked_gather_` in plain PyTorch."""
    active = values.view(-1)[active_indices(mask, values.numel())].float()
    out.copy_(out + active if add else active)


def reference_scatter(
    values: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor, compact: torch.Tensor
) -> None:
    """The definition of `masked_scatter_` in plain PyTorch."""
    values.view(-1)[active_indices(mask, values.numel())] = compact.to(values.dtype)


def update_active(args: StepArgs, update: Callable[..., torch.Tensor]) -> None:
    """Update the active coordinates of each tensor.

    Args:
        args: Arguments of the operator.
        update: Called with the position of the tensor, its active weights and gradients in fp32, their initial values
            or None, and the columns of scalars; returns the new weights in fp32.
    """
    if args.found_inf is not None and bool(args.found_inf):
        return
    for i, param in enumerate(args.params):
        flat, indices = param.view(-1), active_indices(args.masks[i], param.numel())
        grad = args.grads[i].view(-1)
        g = (grad if is_compact(grad.numel(), param.numel(), len(indices)) else grad[indices]).float()
        g = g if args.grad_scale is None else g / args.grad_scale
        g = g if args.clip is None else g * args.clip
        residual = args.residuals[i] if args.residuals else None
        w0 = args.init_values[i].float() if args.init_values and args.init_values[i].numel() else None
        first_row = args.scalars[args.scalar_rows[i]]
        rows = first_row
        if args.step_groups and args.step_groups[i].numel():
            rows = args.scalars[args.scalar_rows[i] + args.step_groups[i].long()].T
        stored = flat[indices]
        p = to_fp32(stored, residual, args.precision)
        new = update(i, p, -g if args.maximize else g, w0, list(rows.unbind()))
        key = (args.seed, int(first_row[STEP]), args.param_ids[i], indices + args.shard_offsets[i])
        rounded = round_to_storage(new, param.dtype, residual, args.precision, key)
        flat[indices] = rounded
        if args.changed and args.changed[i].numel():
            bits = torch.arange(len(indices), device=param.device) if args.masks[i].dtype != torch.uint8 else indices
            set_bits(args.changed[i], bits[bf16_bits(rounded) != bf16_bits(stored)])


def adamw(
    p: torch.Tensor,
    g: torch.Tensor,
    w0: torch.Tensor | None,
    m: torch.Tensor,
    v: torch.Tensor,
    v_max: torch.Tensor | None,
    columns: list[torch.Tensor],
) -> torch.Tensor:
    """New fp32 weights. Updates the moments m and v, and the largest v so far, in place. Every scalar is fp32."""
    decay_factor, one_minus_beta1, beta2, one_minus_beta2, bias_correction, eps, neg_step_size = columns[:STEP]
    p = p * decay_factor if w0 is None else fma(decay_factor, p - w0, w0)
    m.copy_(torch.where(one_minus_beta1 < 0.5, fma(one_minus_beta1, g - m, m), fma(one_minus_beta1 - 1, g - m, g)))
    v.copy_(fma(one_minus_beta2 * g, g, v * beta2))
    second = v if v_max is None else v_max.copy_(torch.maximum(v_max, v))
    return p + neg_step_size * m / (second.double().sqrt().float() / bias_correction + eps)


def sgd(
    p: torch.Tensor,
    g: torch.Tensor,
    w0: torch.Tensor | None,
    buffer: torch.Tensor | None,
    columns: list[torch.Tensor],
    nesterov: bool,
) -> torch.Tensor:
    """New fp32 weights. Updates the momentum buffer, if any, in place."""
    weight_decay, momentum, one_minus_dampening, is_first, neg_step_size = (
        columns[j] for j in (WEIGHT_DECAY, MOMENTUM, ONE_MINUS_DAMPENING, IS_FIRST, NEG_STEP_SIZE)
    )
    g = torch.where(weight_decay != 0, fma(weight_decay, p if w0 is None else p - w0, g), g)
    if buffer is not None:
        buffer.copy_(torch.where(is_first != 0, g, fma(one_minus_dampening, g, buffer * momentum)))
        g = fma(momentum, buffer, g) if nesterov else buffer
    return fma(neg_step_size, g, p)


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a b + c of fp32, rounded once: the product is exact in fp64; the sum there is rounded to odd, so that rounding
    again to fp32 is right (Boldo and Melquiond 2008)."""
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)  # exact (Knuth)
    bits = total.view(torch.int64)
    toward = torch.where((error > 0) == (total > 0), bits + 1, bits - 1)
    odd = torch.where((error != 0) & (bits & 1 == 0) & error.isfinite() & total.isfinite(), toward, bits)
    return odd.view(torch.float64).float()


def active_indices(mask: torch.Tensor, numel: int) -> torch.Tensor:
    """Flat indices of the active coordinates, int64 [num_active], from a bitmap (uint8) or indices."""
    if mask.dtype != torch.uint8:
        return mask.long()
    bits = (mask.unsqueeze(1) >> torch.arange(8, device=mask.device)) & 1
    return torch.nonzero(bits.view(-1)[:numel]).view(-1)


def is_compact(num_grads: int, numel: int, num_active: int) -> bool:
    """Whether a gradient of `num_grads` elements has one element per active coordinate."""
    return num_grads == num_active != numel


def to_fp32(stored: torch.Tensor, residual: torch.Tensor | None, precision: int) -> torch.Tensor:
    """fp32 values of stored weights and their residuals."""
    if stored.dtype == torch.float32 or PRECISIONS[precision] not in RESIDUAL_DTYPES:
        return stored.float()
    if PRECISIONS[precision] == "kahan":
        return stored.float() + residual.float()  # type: ignore[union-attr]
    low, upper = residual.int() & 0xFFFF, stored.view(torch.int16).int() & 0xFFFF  # type: ignore[union-attr]
    low = torch.where(
        (upper & 0x7FFF == 0) & (low >= 0x8000), 0, low
    )  # a weight that was set to zero outside of a step
    high = (upper - (low >> 15)) & 0xFFFF
    return (high << 16 | low).view(torch.float32)


def round_to_storage(
    new: torch.Tensor, dtype: torch.dtype, residual: torch.Tensor | None, precision: int, key: tuple
) -> torch.Tensor:
    """New fp32 values rounded to the dtype of the param. Writes what a bf16 weight lacks to `residual`.

    `key` is (seed, step, param id, global coordinates [num_active]), for stochastic rounding.
    """
    if dtype == torch.float32:
        return new
    name = PRECISIONS[precision]
    if name == "kahan":
        weight = new.bfloat16()
        residual.copy_(new - weight.float())  # type: ignore[union-attr]
        return weight
    if name == "nearest":
        return new.bfloat16()
    bits = new.view(torch.int32).long() & 0xFFFFFFFF
    special = ~new.isfinite() if name == "stochastic" else new.isnan()
    if name == "split_master":
        residual.copy_(torch.where(special, 0, bits & 0xFFFF))  # type: ignore[union-attr]
        up = bits + 0x8000
    else:
        up = bits + (philox(*key) & 0xFFFF)
    weight = ((up >> 16) & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.bfloat16)
    return torch.where(special, new.bfloat16(), weight)


def bf16_bits(values: torch.Tensor) -> torch.Tensor:
    """Bits of bf16 values, or of fp32 values rounded to bf16, where a NaN keeps its upper bits and is quiet."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16)
    upper = (values.view(torch.int32) >> 16).to(torch.int16)
    return torch.where(values.isnan(), upper | 0x40, values.bfloat16().view(torch.int16))


def set_bits(bitmap: torch.Tensor, positions: torch.Tensor) -> None:
    """Set bits of a bitmap, uint8, little-endian."""
    flags = torch.zeros(8 * bitmap.numel(), dtype=torch.int32, device=bitmap.device)
    flags[positions] = 1
    bitmap |= (flags.view(-1, 8) << torch.arange(8, device=bitmap.device)).sum(1).to(torch.uint8)


def philox(seed: int, step: int, param_id: int, indices: torch.Tensor) -> torch.Tensor:
    """A random 32-bit word per index, int64: the first word of Philox4x32-10 with counter (index, param id, step)."""
    mask = 0xFFFFFFFF
    c0, c1 = indices & mask, indices >> 32 & mask
    c2, c3 = torch.full_like(indices, param_id), torch.full_like(indices, step)
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


register("step", schema("masked_adamw_", ADAMW_FIELDS), reference_adamw, validate=validation.validate_adamw)
register("step", schema("masked_sgd_", SGD_FIELDS), reference_sgd, validate=validation.validate_sgd)
register("step", GATHER, reference_gather, validate=validation.validate_gather)
register("step", SCATTER, reference_scatter, validate=validation.validate_scatter)


def adamw_scalars(
    steps: Sequence[float],
    lr: float | torch.Tensor,
    betas: tuple[float | torch.Tensor, float | torch.Tensor],
    eps: float,
    weight_decay: float,
) -> torch.Tensor:
    """The scalars of `masked_adamw`, rounded as torch.optim.AdamW rounds them.

    Numbers are computed in double precision and rounded once; terms with a tensor are computed in its dtype.

    Args:
        steps: Step count per row, from 1.
        lr: Learning rate; a tensor has no dimensions.
        betas: Decay rates of the two moments; tensors have no dimensions.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.

    Returns:
        fp32 [len(steps), NUM_SCALARS], columns as in `opdkernels.ops.step.layout`.

    Examples:
        >>> adamw_scalars([1], 0.1, (0.9, 0.99), 1e-8, 0.5)[0, 0].item() == torch.tensor(0.95).item()
        True
    """
    b1, b2 = betas
    rows = [
        [1 - lr * weight_decay, 1 - b1, b2, 1 - b2, math.sqrt(1 - b2**t), eps, -(lr / (1 - b1**t)), t] for t in steps
    ]
    return torch.tensor(rows, dtype=torch.float64).float().view(-1, NUM_SCALARS)


def sgd_scalars(
    steps: Sequence[float], lr: float, momentum: float, dampening: float, weight_decay: float
) -> torch.Tensor:
    """The scalars of `masked_sgd`, fp32 [len(steps), NUM_SCALARS]; arguments and rounding as for `adamw_scalars`.

    Examples:
        >>> sgd_scalars([1, 2], 0.5, 0.75, 0.0, 0.0)[:, IS_FIRST].tolist()
        [1.0, 0.0]
    """
    rows = [[weight_decay, momentum, 1 - dampening, t == 1, 0, 0, -lr, t] for t in steps]
    return torch.tensor(rows, dtype=torch.float64).float().view(-1, NUM_SCALARS)


def masked_adamw(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    block_counts: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    scalars: torch.Tensor,
    *,
    max_exp_avg_sqs: Sequence[torch.Tensor] = (),
    residuals: Sequence[torch.Tensor] = (),
    init_values: Sequence[torch.Tensor] = (),
    step_groups: Sequence[torch.Tensor] = (),
    changed: Sequence[torch.Tensor] = (),
    scalar_rows: Sequence[int] | None = None,
    shard_offsets: Sequence[int] | None = None,
    param_ids: Sequence[int] | None = None,
    grad_scale: torch.Tensor | None = None,
    clip: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    maximize: bool = False,
    precision: str = "nearest",
    seed: int = 0,
) -> None:
    """One AdamW step on the active coordinates of all tensors, in place.

    Args:
        params: fp32 or bf16, contiguous.
        grads: fp32 or bf16, contiguous and of the shape of the param, or fp32 [num_active], already gathered.
        masks: uint8 [ceil(numel / 8)], one bit per coordinate (little-endian), or int32 or int64 [num_active],
            ascending flat indices. Checked completely at the first use of a tensor and after every in-place operation
            of torch on it; do not change it in another way.
        block_counts: int64 [ceil(numel / 2048) + 1], the active coordinates before each block of 2,048 of a bitmap;
            empty for indices.
        exp_avgs: First moments, fp32 [num_active].
        exp_avg_sqs: Second moments, fp32 [num_active].
        scalars: fp32 [rows, 8] from `adamw_scalars`.
        max_exp_avg_sqs: Largest second moments so far, fp32 [num_active], for amsgrad; an empty tensor for none
            (default: none).
        residuals: int16 [num_active] for "split_master" and bf16 [num_active] for "kahan", of bf16 params; empty
            tensors for fp32 params (default: none).
        init_values: What weight decay pulls towards instead of zero, dtype of the param [num_active]; an empty tensor
            for zero (default: none).
        step_groups: uint8 [num_active]; coordinates that became active later have their own step count and use row
            scalar_row + step_group; an empty tensor for none (default: none).
        changed: Bits that the step sets for coordinates whose bf16 value changed, uint8 [ceil(numel / 8)] by coordinate
            where the mask is a bitmap, [ceil(num_active / 8)] by active number where it has indices; an empty tensor
            for none (default: none).
        scalar_rows: The first row of `scalars` of each tensor (default: its position).
        shard_offsets: Flat index of each tensor's first coordinate in the unsharded tensor, for "stochastic"
            (default: 0).
        param_ids: Number of each param in the model, for "stochastic" (default: its position).
        grad_scale: fp32, one element; divides the gradients (default: none).
        clip: fp32, one element; multiplies the gradients (default: none).
        found_inf: fp32, one element; where it is not 0, nothing is done (default: none).
        maximize: Ascend instead of descend (default: False).
        precision: How bf16 weights are kept: "nearest", "split_master", "kahan" or "stochastic" (default: "nearest").
        seed: Seed of "stochastic", 64 bits (default: 0).

    Raises:
        TypeError: A param or a gradient is neither fp32 nor bf16.
        ValueError: Another dtype, shape, device or mask than above.

    Examples:
        >>> param, grad, mask = torch.zeros(4), torch.ones(4), torch.tensor([0, 3])
        >>> moments = torch.zeros(2), torch.zeros(2)
        >>> scalars = adamw_scalars([1], 0.5, (0.9, 0.99), 1e-8, 0.0)
        >>> masked_adamw([param], [grad], [mask], [mask[:0]], [moments[0]], [moments[1]], scalars)
        >>> param
        tensor([-0.5000,  0.0000,  0.0000, -0.5000])
    """
    args = StepArgs(
        params=params,
        grads=grads,
        masks=masks,
        block_counts=block_counts,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        max_exp_avg_sqs=max_exp_avg_sqs,
        residuals=residuals,
        init_values=init_values,
        step_groups=step_groups,
        changed=changed,
        scalars=scalars,
        scalar_rows=range(len(params)) if scalar_rows is None else scalar_rows,
        shard_offsets=[0] * len(params) if shard_offsets is None else shard_offsets,
        param_ids=range(len(params)) if param_ids is None else param_ids,
        grad_scale=grad_scale,
        clip=clip,
        found_inf=found_inf,
        maximize=maximize,
        precision=validation.precision_code(precision),
        seed=seed,
    )
    torch.ops.opdkernels.masked_adamw_(*flatten(args, ADAMW_FIELDS))


def masked_sgd(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    block_counts: Sequence[torch.Tensor],
    scalars: torch.Tensor,
    *,
    momentum_buffers: Sequence[torch.Tensor] = (),
    residuals: Sequence[torch.Tensor] = (),
    init_values: Sequence[torch.Tensor] = (),
    step_groups: Sequence[torch.Tensor] = (),
    changed: Sequence[torch.Tensor] = (),
    scalar_rows: Sequence[int] | None = None,
    shard_offsets: Sequence[int] | None = None,
    param_ids: Sequence[int] | None = None,
    grad_scale: torch.Tensor | None = None,
    clip: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    maximize: bool = False,
    nesterov: bool = False,
    precision: str = "nearest",
    seed: int = 0,
) -> None:
    """One SGD step on the active coordinates of all tensors, in place.

    The arguments that are not listed here are those of `masked_adamw`.

    Args:
        scalars: fp32 [rows, 8] from `sgd_scalars`.
        momentum_buffers: fp32 [num_active] (default: none, without momentum).
        nesterov: Nesterov momentum (default: False).

    Raises:
        TypeError, ValueError: As `masked_adamw`.

    Examples:
        >>> param, mask = torch.zeros(4), torch.tensor([0, 3])
        >>> masked_sgd([param], [torch.ones(4)], [mask], [mask[:0]], sgd_scalars([1], 0.5, 0.0, 0.0, 0.0))
        >>> param
        tensor([-0.5000,  0.0000,  0.0000, -0.5000])
    """
    args = StepArgs(
        params=params,
        grads=grads,
        masks=masks,
        block_counts=block_counts,
        momentum_buffers=momentum_buffers,
        residuals=residuals,
        init_values=init_values,
        step_groups=step_groups,
        changed=changed,
        scalars=scalars,
        scalar_rows=range(len(params)) if scalar_rows is None else scalar_rows,
        shard_offsets=[0] * len(params) if shard_offsets is None else shard_offsets,
        param_ids=range(len(params)) if param_ids is None else param_ids,
        grad_scale=grad_scale,
        clip=clip,
        found_inf=found_inf,
        maximize=maximize,
        nesterov=nesterov,
        precision=validation.precision_code(precision),
        seed=seed,
    )
    torch.ops.opdkernels.masked_sgd_(*flatten(args, SGD_FIELDS))


def masked_gather(
    values: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor, out: torch.Tensor, *, add: bool = False
) -> torch.Tensor:
    """Gather the active coordinates of a tensor.

    Args:
        values: fp32 or bf16, contiguous.
        mask: As for `masked_adamw`.
        block_counts: As for `masked_adamw`.
        out: fp32 [num_active], overwritten.
        add: Add to `out` instead of overwriting it (default: False).

    Returns:
        `out`.

    Raises:
        TypeError, ValueError: As `masked_adamw`.

    Examples:
        >>> mask = torch.tensor([0, 3])
        >>> masked_gather(torch.arange(4.0), mask, mask[:0], torch.empty(2))
        tensor([0., 3.])
    """
    torch.ops.opdkernels.masked_gather_(values, mask, block_counts, out, add)
    return out


def masked_scatter(values: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor, compact: torch.Tensor) -> None:
    """Set the active coordinates of a tensor, in place.

    Args:
        values: fp32 or bf16, contiguous.
        mask: As for `masked_adamw`.
        block_counts: As for `masked_adamw`.
        compact: fp32 [num_active], rounded to nearest.

    Raises:
        TypeError, ValueError: As `masked_adamw`.

    Examples:
        >>> values, mask = torch.zeros(4), torch.tensor([0, 3])
        >>> masked_scatter(values, mask, mask[:0], torch.tensor([1.0, 2.0]))
        >>> values
        tensor([1., 0., 0., 2.])
    """
    torch.ops.opdkernels.masked_scatter_(values, mask, block_counts, compact)
