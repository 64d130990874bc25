"""References of the operators of `divergence`, in plain PyTorch, tile by tile of the vocabulary; they also serve the
CPU.

A side is [hidden, weight] or [hidden, weight, bias] of the student or the teacher: hidden [num_tokens, hidden_size],
weight [num_rows, hidden_size], bias [num_rows]. Nearly all time goes into matrix products, in fp32 whatever the inputs:
a CPU without AMX multiplies bf16 at half the speed of fp32 (AVX512_BF16, oneDNN), so rounding would cost accuracy and
time. A head is converted to fp32 tile by tile, once for all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from opdkernels.ops import register
from opdkernels.ops.divergence.logits import FLOOR, LogitParams, local_ids, mask_ids, shape_logits
from opdkernels.ops.divergence.validation import validate_backward, validate_means, validate_scan, validate_top

Side = Sequence[Tensor]

# what the operators compute: the dense kinds, and AT_IDS for the kinds that see log-probabilities at some ids only
FORWARD, REVERSE, JSD, VARIATION, AT_IDS = range(5)
# rows of `moments` [8, num_tokens]; *_LOG is the log of the sum of exp(logit - *_MAX)
MOMENTS = 8
STUDENT_MAX, STUDENT_LOG, TEACHER_MAX, TEACHER_LOG, MEAN_FORWARD, MEAN_REVERSE, STUDENT_MEAN, TEACHER_MEAN = range(
    MOMENTS
)
TILE, TILE_NUMBERS, ROWS = 4096, 1 << 24, 1024  # ids per tile, values of a head per tile, tokens at a time

SCAN = (
    "divergence_scan(Tensor[] student, Tensor[] teacher, Tensor ids, int tail_k, int vocab, float[] student_params, "
    "float[] teacher_params, bool with_argmax) -> (Tensor, Tensor, Tensor, Tensor)"
)
MEANS = (
    "divergence_means(Tensor[] student, Tensor[] teacher, Tensor moments, int vocab, float[] student_params, "
    "float[] teacher_params, float beta, int kind) -> Tensor"
)
BACKWARD = (
    "divergence_backward(Tensor[] student, Tensor[] teacher, Tensor scalars, Tensor ids, Tensor grad_at_ids, "
    "int vocab, float[] student_params, float[] teacher_params, float beta, int kind, bool[] needs_grad) -> "
    "(Tensor, Tensor, Tensor)"
)
TOP = "divergence_top(Tensor[] side, int vocab, int k, float[] params) -> Tensor"


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def over_mixture(d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(q / m) of d = log(p / q), for the mixture m = beta p + (1 - beta) q.

    All exponents are at most 0, so that neither m nor a gradient is lost where p and q underflow."""
    below = d.clamp(max=0)
    above = d - below
    common = torch.where(d <= 0, torch.log1p(beta * torch.expm1(below)), torch.log1p((1 - beta) * torch.expm1(-above)))
    return below - common, -above - common


def fake_scan(
    student: Side,
    teacher: Side,
    ids: Tensor,
    tail_k: int,
    vocab: int,
    student_params: Sequence[float],
    teacher_params: Sequence[float],
    with_argmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, new_empty, dtype = len(student[0]), student[0].new_empty, compute_dtype(student[0])
    return (
        new_empty((MOMENTS, n), dtype=dtype),
        new_empty((2, *ids.shape), dtype=dtype),
        new_empty((2, n if tail_k else 0), dtype=dtype),
        new_empty((2, n if with_argmax else 0), dtype=torch.int64),
    )


def fake_means(
    student: Side,
    teacher: Side,
    moments: Tensor,
    vocab: int,
    student_params: Sequence[float],
    teacher_params: Sequence[float],
    beta: float,
    kind: int,
) -> Tensor:
    return moments.new_empty((3, moments.shape[1]))


def fake_backward(
    student: Side,
    teacher: Side,
    scalars: Tensor,
    ids: Tensor,
    grad_at_ids: Tensor,
    vocab: int,
    student_params: Sequence[float],
    teacher_params: Sequence[float],
    beta: float,
    kind: int,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    inputs = [*student, student[0].new_empty(0)]
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else t.new_empty(0)
        for t, needed in zip(inputs, needs_grad, strict=False)
    )


def fake_top(side: Side, vocab: int, k: int, params: Sequence[float]) -> Tensor:
    return side[0].new_empty((len(side[0]), k), dtype=torch.int64)


class Workspace:
    """Buffers for one tile that are reused for the next: a new buffer costs more than the pass that fills it."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        """An uninitialized buffer of a shape; the same memory for the same name."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.like.new_empty(size, dtype=compute_dtype(self.like))
        return self.buffers[name][:size].view(shape)


def tiles(sides: Sequence[Side], vocab: int, work: Workspace) -> Iterator[tuple[slice, list[list[Tensor]]]]:
    """Ids of each tile, and the head (weight[, bias]) of each side there in fp32, valid until the next tile."""
    dtype = compute_dtype(sides[0][0])
    width = max(1, min(TILE, TILE_NUMBERS // max(1, *(side[0].shape[1] for side in sides))))
    for start in range(0, vocab, width):
        tile = slice(start, min(start + width, vocab))
        heads = [
            [
                tensor[tile] if tensor.dtype == dtype else work(f"head {k} {i}", tensor[tile].shape).copy_(tensor[tile])
                for i, tensor in enumerate(side[1:])
            ]
            for k, side in enumerate(sides)
        ]
        yield tile, heads


def head_logits(hidden: Tensor, head: Sequence[Tensor], params: LogitParams, out: Tensor) -> Tensor:
    """Logits over temperature [num_tokens, tile_width], into `out`; `logit_slope` is their derivative."""
    weight, *bias = head
    torch.mm(hidden.to(weight.dtype), weight.T, out=out)
    return shape_logits(out, bias[0] if bias else None, params)


def floored(x: Tensor) -> Tensor:
    """x, at least FLOOR and differentiable; values at the floor have no gradient, NaN stays."""
    return x.masked_fill(x <= FLOOR, FLOOR)


def tile_logits(
    sides: Sequence[Side],
    heads: Sequence[Sequence[Tensor]],
    rows: slice,
    params: Sequence[LogitParams],
    work: Workspace,
) -> list[Tensor]:
    """Logits over temperature of each side, for the tokens `rows` at one tile."""
    logits = []
    for k, (side, head) in enumerate(zip(sides, heads, strict=True)):
        hidden = side[0][rows]
        logits.append(head_logits(hidden, head, params[k], work(f"logits {k}", (len(hidden), len(head[0])))))
    return logits


def row_slices(n: int) -> list[slice]:
    return [slice(start, min(start + ROWS, n)) for start in range(0, n, ROWS)]


def divergence_scan(
    student: Side,
    teacher: Side,
    ids: Tensor,
    tail_k: int,
    vocab: int,
    student_params: Sequence[float],
    teacher_params: Sequence[float],
    with_argmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the vocabulary, and logits at ids.

    Args:
        student, teacher: Both sides.
        ids: int64 [num_tokens, num_ids].
        tail_k: The tail is all ids but the first `tail_k` of each token; 0: no tail.
        vocab: Number of ids.
        student_params, teacher_params: `LogitParams` of both sides.
        with_argmax: Whether to return the most likely ids.

    Returns:
        moments [8, num_tokens]; logits at ids [2, num_tokens, num_ids], NaN at ids outside the vocabulary; log of the
        sum of exponentials of the tail [2, num_tokens or 0], summed directly, as a confident token leaves no digit of
        the difference from the full sum; most likely ids, int64 [2, num_tokens or 0].
    """
    n, work = len(student[0]), Workspace(student[0])
    params = LogitParams(*student_params), LogitParams(*teacher_params)
    logits_at_ids = student[0].new_full((2, *ids.shape), math.nan, dtype=compute_dtype(student[0]))
    partial, tile_argmax, tile_tails = [], [], []
    for tile, heads in tiles((student, teacher), vocab, work):
        sums, argmax_ids = logits_at_ids.new_empty(MOMENTS, n), ids.new_empty(2, n)
        tail = logits_at_ids.new_empty(2, n if tail_k else 0)
        for rows in row_slices(n):
            logits = tile_logits((student, teacher), heads, rows, params, work)
            in_tile, columns = local_ids(ids[rows], tile)
            for k, x in enumerate(logits):
                logits_at_ids[k, rows] = torch.where(in_tile, x.gather(1, columns), logits_at_ids[k, rows])
                if tail_k:
                    others = work("others", x.shape).copy_(x)
                    tail[k, rows] = mask_ids(others, in_tile[:, :tail_k], columns[:, :tail_k]).logsumexp(1)
                if with_argmax:
                    argmax_ids[k, rows] = x.argmax(1) + tile.start
            sums[:, rows] = torch.stack(tile_sums(logits[0], logits[1], work))
        partial.append(sums)
        tile_argmax.append(argmax_ids)
        tile_tails.append(tail)
    sums = torch.stack(partial)
    return (
        merge_tiles(sums),
        logits_at_ids,
        torch.stack(tile_tails).logsumexp(0),
        merge_argmax(sums, torch.stack(tile_argmax)) if with_argmax else ids.new_empty(2, 0),
    )


def tile_sums(z: Tensor, u: Tensor, work: Workspace) -> list[Tensor]:
    """Sums of one tile of logits z (student) and u (teacher), each relative to its own maximum: maximum and sum of
    exponentials of z, then of u; sums of e^u (u - z), e^z (z - u), e^z z and e^u u. Overwrites z and u."""
    z_max, u_max = z.amax(1), u.amax(1)
    z -= z_max[:, None]
    u -= u_max[:, None]
    difference = torch.sub(z, u, out=work("difference", z.shape))
    e = torch.exp(z, out=work("e", z.shape))
    z_sum, z_mean, reverse = e.sum(1), z.mul_(e).sum(1), e.mul_(difference).sum(1)
    torch.exp(u, out=e)
    u_sum, u_mean, forward = e.sum(1), u.mul_(e).sum(1), -e.mul_(difference).sum(1)
    return [z_max, z_sum, u_max, u_sum, forward, reverse, z_mean, u_mean]


def merge_tiles(partial: Tensor) -> Tensor:
    """moments [8, num_tokens] of the sums of tiles [num_tiles, 8, num_tokens]: relative to the largest maximum; sums of
    exponentials as logs, the others as means."""
    z_max, z_sum, u_max, u_sum, forward, reverse, z_mean, u_mean = partial.double().unbind(1)
    z_down, u_down = z_max - z_max.amax(0), u_max - u_max.amax(0)
    z_factor, u_factor = z_down.exp(), u_down.exp()
    z_total, u_total = (z_factor * z_sum).sum(0), (u_factor * u_sum).sum(0)
    forward = (u_factor * (forward + u_sum * (u_down - z_down))).sum(0) / u_total
    reverse = (z_factor * (reverse + z_sum * (z_down - u_down))).sum(0) / z_total
    z_mean = (z_factor * (z_mean + z_sum * z_down)).sum(0) / z_total
    u_mean = (u_factor * (u_mean + u_sum * u_down)).sum(0) / u_total
    rows = [z_max.amax(0), z_total.log(), u_max.amax(0), u_total.log(), forward, reverse, z_mean, u_mean]
    return torch.stack(rows).to(partial.dtype)


def merge_argmax(partial: Tensor, tile_argmax: Tensor) -> Tensor:
    """Most likely ids [2, num_tokens] from those of each tile [num_tiles, 2, num_tokens]."""
    best_tile = partial[:, [STUDENT_MAX, TEACHER_MAX]].argmax(0, keepdim=True)
    return tile_argmax.gather(0, best_tile).squeeze(0)


def log_mixture_over_max(d: Tensor, beta: float, work: Workspace) -> Tensor:
    """log(m / max(p, q)) of d = log(p / q): `common` of `over_mixture`, without its temporaries."""
    result = torch.abs(d, out=work("mixture", d.shape)).neg_().expm1_()
    if beta != 0.5:
        result *= work("weight", d.shape).fill_(beta).masked_fill_(d > 0, 1 - beta)
    else:
        result *= beta
    return result.log1p_()


def mixture_shift(moments: Tensor, beta: float) -> Tensor:
    """log(q / m) at the mean of log(p / q) under q, [num_tokens], from the moments of `divergence_scan`.

    The gradient of JSD is q_j (x_j - sum_i q_i x_i) with x = log(q / m). Where all ids that the student considers have
    nearly the same x, such as -log(1 - beta) where the teacher is sure of another id, the difference is far below the
    rounding of x and of sum(q). It is therefore computed from x - shift, which is near 0 there."""
    mean, student_log, teacher_log = (moments.select(0, i) for i in (MEAN_REVERSE, STUDENT_LOG, TEACHER_LOG))
    return over_mixture(student_log - mean - teacher_log, beta)[1]


def log_probabilities(logits: Sequence[Tensor], scalars: Tensor, rows: slice) -> list[Tensor]:
    """Log-probabilities from one tile's logits of each side, in place."""
    return [x.sub_(scalars[2 * k, rows, None]).sub_(scalars[2 * k + 1, rows, None]) for k, x in enumerate(logits)]


def divergence_means(
    student: Side,
    teacher: Side,
    moments: Tensor,
    vocab: int,
    student_params: Sequence[float],
    teacher_params: Sequence[float],
    beta: float,
    kind: int,
) -> Tensor:
    """The means of JSD and VARIATION, which need a second pass.

    Returns:
        [3, num_tokens]: the divergence; the shift, `mixture_shift` for JSD and 0 for VARIATION; and the mean under q of
        log(q / m) - shift for JSD, or of sign(q - p) for VARIATION.
    """
    shift = mixture_shift(moments, beta) if kind == JSD else torch.zeros_like(moments[0])
    work, total = Workspace(student[0]), moments.new_zeros((2, moments.shape[1]), dtype=torch.float64)
    total[0] = (1 - beta) * shift.double()
    params = LogitParams(*student_params), LogitParams(*teacher_params)
    for _, heads in tiles((student, teacher), vocab, work):
        for rows in row_slices(moments.shape[1]):
            lq, lp = log_probabilities(tile_logits((student, teacher), heads, rows, params, work), moments, rows)
            q, p = torch.exp(lq, out=work("q", lq.shape)), torch.exp(lp, out=work("p", lq.shape))
            if kind == JSD:
                d = lp.sub_(lq)
                common = log_mixture_over_max(d, beta, work)
                over_p = torch.clamp(d, max=0, out=lq).sub_(common).mul_(p).sum(1)
                mean = d.clamp_(min=0).add_(common).add_(shift[rows, None]).mul_(q).sum(1).neg_()
                total[0, rows] += beta * over_p + (1 - beta) * mean
            else:
                difference = torch.sub(q, p, out=p)
                mean = torch.sign(difference, out=lp).mul_(q).sum(1)
                total[0, rows] += difference.abs_().sum(1) / 2
            total[1, rows] += mean
    if kind == VARIATION:
        total[1] += 0 * total[0]  # keeps NaN, whose sign is 0
    divergence, mean = total.to(moments.dtype)
    return torch.stack([divergence, shift, mean])


def divergence_backward(
    student: Side,
    teacher: Side,
    scalars: Tensor,
    ids: Tensor,
    grad_at_ids: Tensor,
    vocab: int,
    student_params: Sequence[float],
    teacher_params: Sequence[float],
    beta: float,
    kind: int,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the student's hidden states, weight and bias, each rounded once to its dtype.

    Every product is in fp32: a CPU without AMX multiplies bf16 at half that speed (AVX512_BF16, oneDNN), so rounding
    would cost accuracy and time.

    Args:
        student, teacher: Both sides; AT_IDS does not read the teacher.
        scalars: [7, num_tokens]: the first four moments, the shift and the mean that the gradient subtracts, the factor
            of each token; with a tail [9, num_tokens]: also the log of the student's mass in the tail, and its
            gradient.
        ids: int64 [num_tokens, num_ids].
        grad_at_ids: Gradients of the student's logits over temperature at ids, [num_tokens, num_ids].
        vocab: Number of ids.
        student_params, teacher_params: `LogitParams` of both sides.
        beta: Weight of the teacher in the mixture of JSD.
        kind: What to differentiate.
        needs_grad: Which of the three gradients to compute; the others are empty or zeros.
    """
    hidden, (weight, *bias) = student[0], student[1:]
    params = LogitParams(*student_params), LogitParams(*teacher_params)
    dtype, work = scalars.dtype, Workspace(hidden)
    hidden_grad = hidden.new_zeros(hidden.shape if needs_grad[0] else 0, dtype=dtype)
    weight_grad = weight.new_zeros(weight.shape if needs_grad[1] else 0)
    bias_grad = hidden.new_zeros(len(weight) if needs_grad[2] else 0, dtype=dtype)
    sides = (student,) if kind == AT_IDS else (student, teacher)
    for tile, heads in tiles(sides, vocab, work):
        tile_weight_grad = work("weight_grad", heads[0][0].shape).zero_() if needs_grad[1] else None
        for rows in row_slices(len(hidden)):
            g = tile_gradient(sides, heads, tile, rows, scalars, ids, grad_at_ids, params, beta, kind, work)
            if needs_grad[0]:
                hidden_grad[rows].addmm_(g, heads[0][0])
            if tile_weight_grad is not None:
                tile_weight_grad.addmm_(g.T, hidden[rows].to(dtype))
            if needs_grad[2]:
                bias_grad[tile] += g.sum(0)
        if tile_weight_grad is not None:
            weight_grad[tile] = tile_weight_grad
    return hidden_grad.to(hidden.dtype), weight_grad, bias_grad.to(bias[0].dtype if bias else hidden.dtype)


def tile_gradient(
    sides: Sequence[Side],
    heads: Sequence[Sequence[Tensor]],
    tile: slice,
    rows: slice,
    scalars: Tensor,
    ids: Tensor,
    grad_at_ids: Tensor,
    params: Sequence[LogitParams],
    beta: float,
    kind: int,
    work: Workspace,
) -> Tensor:
    """Gradient of hidden @ weight.T + bias [num_rows, tile_width], for the tokens `rows` at one tile."""
    logits = tile_logits(sides, heads, rows, params, work)
    slope = logit_slope(logits[0], params[0], work)
    lq, *others = log_probabilities(logits, scalars, rows)
    in_tile, columns = local_ids(ids[rows], tile)
    tail = mask_ids(work("tail", lq.shape).copy_(lq), in_tile, columns) if len(scalars) > 7 else None
    shift, center, factor = scalars[4:7, rows, None]
    g = logit_gradient(kind, lq, *others, shift=shift, center=center, beta=beta, work=work)
    g *= factor
    if ids.shape[1]:
        g.scatter_add_(1, columns, grad_at_ids[rows] * in_tile)
    if tail is not None:
        g += tail.sub_(scalars[7, rows, None]).exp_().mul_(scalars[8, rows, None])
    return g.mul_(slope)


def logit_slope(z: Tensor, params: LogitParams, work: Workspace) -> Tensor | float:
    """Derivative of logits over temperature z by hidden @ weight.T + bias; 0 at the floor."""
    scale, softcap, temperature = params
    at_floor = z.numel() > 0 and not bool(z.amin() > FLOOR)  # also with NaN: other tokens may be at the floor
    if not softcap and not at_floor:
        return scale / temperature
    slope = work("slope", z.shape)
    if softcap:
        torch.mul(z, temperature / softcap, out=slope).square_().neg_().add_(1).mul_(scale / temperature)
    else:
        slope.fill_(scale / temperature)
    return slope.masked_fill_(z <= FLOOR, 0) if at_floor else slope


def logit_gradient(
    kind: int, lq: Tensor, lp: Tensor | None = None, *, shift: Tensor, center: Tensor, beta: float, work: Workspace
) -> Tensor:
    """Gradient of a token's divergence by its logits over temperature; for AT_IDS only the softmax. `shift` is 0 but
    for JSD. Overwrites lq and lp."""
    if lp is None:
        return lq.exp_()
    if kind == FORWARD:
        return lq.exp_().sub_(lp.exp_())
    q = torch.exp(lq, out=work("q", lq.shape))
    if kind == REVERSE:
        return lq.sub_(lp).sub_(center).mul_(q)
    if kind == VARIATION:
        return torch.sub(q, lp.exp_(), out=lp).sign_().sub_(center).mul_(q).mul_(0.5)
    d = lp.sub_(lq)
    common = log_mixture_over_max(d, beta, work)
    return d.clamp_(min=0).add_(common).add_(shift).add_(center).mul_(q).mul_(beta - 1)


def divergence_top(side: Side, vocab: int, k: int, params: Sequence[float]) -> Tensor:
    """Ids of a side's k largest logits, int64 [num_tokens, k], in decreasing order."""
    n, work = len(side[0]), Workspace(side[0])
    values = side[0].new_empty((n, 0), dtype=compute_dtype(side[0]))
    ids = values.new_empty((n, 0 if n else k), dtype=torch.int64)
    for tile, heads in tiles((side,), vocab if n else 0, work):
        top = []
        for rows in row_slices(n):
            (x,) = tile_logits((side,), heads, rows, (LogitParams(*params),), work)
            top.append(x.topk(min(k, x.shape[1]), 1))
        values = torch.cat([values, torch.cat([tile_top.values for tile_top in top])], 1)
        ids = torch.cat([ids, torch.cat([tile_top.indices for tile_top in top]) + tile.start], 1)
        values, order = values.topk(min(k, values.shape[1]), 1)
        ids = ids.gather(1, order)
    return ids


register("divergence", SCAN, divergence_scan, fake_scan, validate=validate_scan)
register("divergence", MEANS, divergence_means, fake_means, validate=validate_means)
register("divergence", BACKWARD, divergence_backward, fake_backward, validate=validate_backward)
register("divergence", TOP, divergence_top, fake_top, validate=validate_top)
