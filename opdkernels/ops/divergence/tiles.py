"""What `divergence` computes from hidden states, in plain PyTorch, tile by tile of the vocabulary: the references of its operators,
which also serve the CPU.

A side is [hidden, weight] or [hidden, weight, bias]; numbers are both sides' scale and softcap, temperature and beta. Nearly all
time goes into products, in fp32 whatever the inputs: a CPU without AMX multiplies bf16 at half the speed of fp32 (AVX512_BF16, oneDNN),
so that rounding would cost accuracy and time. A head is widened tile by tile, once for all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from opdkernels.ops import register
from opdkernels.ops.divergence.logits import FLOOR, local_ids, shaped, without

FORWARD, REVERSE, JSD, VARIATION, AT_IDS = range(5)
MOMENTS = 8
STUDENT_MAX, STUDENT_LOG, TEACHER_MAX, TEACHER_LOG, MEAN_FORWARD, MEAN_REVERSE, STUDENT_MEAN, TEACHER_MEAN = range(
    MOMENTS
)
TILE, TILE_NUMBERS, ROWS = 4096, 1 << 24, 1024  # ids and numbers of a head's tile, tokens at a time

SCAN = "divergence_scan(Tensor[] student, Tensor[] teacher, Tensor ids, int rest, int vocab, float[] numbers, bool tops) -> (Tensor, Tensor, Tensor, Tensor)"
MEANS = "divergence_means(Tensor[] student, Tensor[] teacher, Tensor moments, int vocab, float[] numbers, int kind) -> Tensor"
BACKWARD = (
    "divergence_backward(Tensor[] student, Tensor[] teacher, Tensor scalars, Tensor ids, Tensor at, int vocab, float[] numbers, int kind, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor)"
)
TOP = "divergence_top(Tensor[] side, int vocab, int k, float[] numbers) -> Tensor"


def wide_of(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def over_mixture(d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(q / m) of d = log(p / q): no exponential grows, so neither m nor a gradient is lost where p and q underflow."""
    below = d.clamp(max=0)
    above = d - below
    common = torch.where(d <= 0, torch.log1p(beta * torch.expm1(below)), torch.log1p((1 - beta) * torch.expm1(-above)))
    return below - common, -above - common


def fake_scan(student, teacher, ids, rest, vocab, numbers, tops):
    n, new = len(student[0]), student[0].new_empty
    wide = wide_of(student[0])
    return (
        new((MOMENTS, n), dtype=wide),
        new((2, *ids.shape), dtype=wide),
        new((2, n if rest else 0), dtype=wide),
        new((2, n if tops else 0), dtype=torch.int64),
    )


def fake_means(student, teacher, moments, vocab, numbers, kind):
    return moments.new_empty((2, moments.shape[1]))


def fake_backward(student, teacher, scalars, ids, at, vocab, numbers, kind, wanted):
    parts = [*student, student[0].new_empty(0)]
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if want else t.new_empty(0)
        for t, want in zip(parts, wanted, strict=False)
    )


def fake_top(side, vocab, k, numbers):
    return side[0].new_empty((len(side[0]), k), dtype=torch.int64)


class Workspace:
    """Buffers of one tile's numbers that are used again for the next: a fresh one costs more than the pass that fills it."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.like.new_empty(size, dtype=wide_of(self.like))
        return self.buffers[name][:size].view(shape)


def tiles(sides: Sequence[Sequence[Tensor]], vocab: int, work: Workspace) -> Iterator[tuple[slice, list[list[Tensor]]]]:
    """Ids, and the head of each side at them, widened: once a tile, for all tokens; until the next."""
    wide = wide_of(sides[0][0])
    width = max(1, min(TILE, TILE_NUMBERS // max(1, *(side[0].shape[1] for side in sides))))
    for start in range(0, vocab, width):
        here = slice(start, min(start + width, vocab))
        yield (
            here,
            [
                [
                    part[here] if part.dtype == wide else work(f"head {k} {i}", part[here].shape).copy_(part[here])
                    for i, part in enumerate(side[1:])
                ]
                for k, side in enumerate(sides)
            ],
        )


def logits(
    hidden: Tensor, head: Sequence[Tensor], scale: float, softcap: float, temperature: float, out: Tensor
) -> Tensor:
    """Over temperature, of one tile; `slope` is their derivative."""
    weight, *bias = head
    torch.mm(hidden.to(weight.dtype), weight.T, out=out)
    return shaped(out, bias[0] if bias else None, scale, softcap, temperature)


def floored(x: Tensor) -> Tensor:
    """The same, differentiable: by nothing that is at the floor. NaN stays."""
    return x.masked_fill(x <= FLOOR, FLOOR)


def tile_logits(sides, heads, rows: slice, numbers, work: Workspace) -> list[Tensor]:
    """Of each side, for some tokens; `heads` are those of one tile."""
    found = []
    for k, (side, head) in enumerate(zip(sides, heads, strict=True)):
        hidden = side[0][rows]
        out = work(f"logits {k}", (len(hidden), len(head[0])))
        found.append(logits(hidden, head, numbers[2 * k], numbers[2 * k + 1], numbers[4], out))
    return found


def row_slices(n: int) -> list[slice]:
    return [slice(start, min(start + ROWS, n)) for start in range(0, n, ROWS)]


def divergence_scan(student, teacher, ids, rest, vocab, numbers, tops):
    """moments [8, N]; both sides' logits at ids [N, K], NaN at ids beyond the vocabulary, [2, N, K]; logs of the sums of exponentials
    outside the first `rest` ids, [2, N], summed and not what is left of all, of which a confident token leaves nothing; the argmax_ids
    ids [2, N].

    The sums of a tile are about its own maximum; `merged` brings them together."""
    n, work = len(student[0]), Workspace(student[0])
    at = student[0].new_full((2, *ids.shape), math.nan, dtype=wide_of(student[0]))
    partial, best, outside = [], [], []
    for here, heads in tiles((student, teacher), vocab, work):
        sums, argmax_ids, others = at.new_empty(MOMENTS, n), ids.new_empty(2, n), at.new_empty(2, n if rest else 0)
        for rows in row_slices(n):
            both = tile_logits((student, teacher), heads, rows, numbers, work)
            inside, local = local_ids(ids[rows], here)
            for k, x in enumerate(both):
                at[k, rows] = torch.where(inside, x.gather(1, local), at[k, rows])
                if rest:
                    others[k, rows] = without(
                        work("others", x.shape).copy_(x), inside[:, :rest], local[:, :rest]
                    ).logsumexp(1)
                if tops:
                    argmax_ids[k, rows] = x.argmax(1) + here.start
            sums[:, rows] = torch.stack(tile_sums(both[0], both[1], work))
        partial.append(sums)
        best.append(argmax_ids)
        outside.append(others)
    sums = torch.stack(partial)
    return (
        merged(sums),
        at,
        torch.stack(outside).logsumexp(0),
        likeliest_of(sums, torch.stack(best)) if tops else ids.new_empty(2, 0),
    )


def tile_sums(z: Tensor, u: Tensor, work: Workspace) -> list[Tensor]:
    """About each side's maximum: maximum and sum of exponentials, twice; sums of e^u (u - z), e^z (z - u), e^z z, e^u u. Overwrites both."""
    z_max, u_max = z.amax(1), u.amax(1)
    z -= z_max[:, None]
    u -= u_max[:, None]
    difference = torch.sub(z, u, out=work("difference", z.shape))
    e = torch.exp(z, out=work("e", z.shape))
    z_sum, z_mean, reverse = e.sum(1), z.mul_(e).sum(1), e.mul_(difference).sum(1)
    torch.exp(u, out=e)
    u_sum, u_mean, forward = e.sum(1), u.mul_(e).sum(1), -e.mul_(difference).sum(1)
    return [z_max, z_sum, u_max, u_sum, forward, reverse, z_mean, u_mean]


def merged(partial: Tensor) -> Tensor:
    """moments [8, N] of the sums of tiles [tiles, 8, N]: about the largest maximum, sums as logs, the others as means."""
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


def likeliest_of(partial: Tensor, best: Tensor) -> Tensor:
    tile = partial[:, [STUDENT_MAX, TEACHER_MAX]].argmax(0, keepdim=True)
    return best.gather(0, tile).squeeze(0)


def mixed(d: Tensor, beta: float, work: Workspace) -> Tensor:
    """log(m / max(p, q)) of d = log(p / q): `common` of `over_mixture`, without its temporaries."""
    found = torch.abs(d, out=work("mixed", d.shape)).neg_().expm1_()
    if beta != 0.5:
        found *= torch.gt(d, 0, out=work("share", d.shape)).mul_(1 - 2 * beta).add_(beta)
    else:
        found *= beta
    return found.log1p_()


def log_probabilities(both: Sequence[Tensor], scalars: Tensor, rows: slice) -> list[Tensor]:
    """In place, of the logits of one tile."""
    return [x.sub_(scalars[2 * k, rows, None]).sub_(scalars[2 * k + 1, rows, None]) for k, x in enumerate(both)]


def divergence_means(student, teacher, moments, vocab, numbers, kind):
    """What takes a second pass, [2, N]: of jsd the divergence and the mean of log(q / m) under q; of total variation the divergence
    and the mean of sign(q - p) under q."""
    work, total = Workspace(student[0]), moments.new_zeros((2, moments.shape[1]), dtype=torch.float64)
    beta = numbers[5]
    for _, heads in tiles((student, teacher), vocab, work):
        for rows in row_slices(moments.shape[1]):
            lq, lp = log_probabilities(tile_logits((student, teacher), heads, rows, numbers, work), moments, rows)
            q, p = torch.exp(lq, out=work("q", lq.shape)), torch.exp(lp, out=work("p", lq.shape))
            if kind == JSD:
                d = lp.sub_(lq)
                common = mixed(d, beta, work)
                over_p = torch.clamp(d, max=0, out=lq).sub_(common).mul_(p).sum(1)
                mean = d.clamp_(min=0).add_(common).mul_(q).sum(1).neg_()
                total[0, rows] += beta * over_p + (1 - beta) * mean
            else:
                difference = torch.sub(q, p, out=p)
                mean = torch.sign(difference, out=lp).mul_(q).sum(1)
                total[0, rows] += difference.abs_().sum(1) / 2
            total[1, rows] += mean
    if kind == VARIATION:
        total[1] += 0 * total[0]  # NaN, which has no sign
    return total.to(moments.dtype)


def divergence_backward(student, teacher, scalars, ids, at, vocab, numbers, kind, wanted):
    """Gradients of hidden states, weight and bias, those wanted, each rounded once.

    scalars: [6, N], the first four moments, the mean that is subtracted, and the factor of each token; or [8, N], of AT_IDS, with the
    log of the student's mass outside ids and its gradient; at: gradients of the student's logits over temperature at ids, [N, K]. Every
    product is in fp32: a CPU without AMX multiplies bf16 at half that speed (AVX512_BF16, oneDNN), so rounding would cost accuracy
    and time."""
    hidden, (weight, *bias) = student[0], student[1:]
    wide, work = scalars.dtype, Workspace(hidden)
    hidden_grad = hidden.new_zeros(hidden.shape if wanted[0] else 0, dtype=wide)
    weight_grad = weight.new_zeros(weight.shape if wanted[1] else 0)
    bias_grad = hidden.new_zeros(len(weight) if wanted[2] else 0, dtype=wide)
    sides = (student,) if kind == AT_IDS else (student, teacher)
    for here, heads in tiles(sides, vocab, work):
        whole = work("whole", heads[0][0].shape).zero_() if wanted[1] else None
        for rows in row_slices(len(hidden)):
            g = tile_gradient(sides, heads, here, rows, scalars, ids, at, numbers, kind, work)
            if wanted[0]:
                hidden_grad[rows].addmm_(g, heads[0][0])
            if whole is not None:
                whole.addmm_(g.T, hidden[rows].to(wide))
            if wanted[2]:
                bias_grad[here] += g.sum(0)
        if whole is not None:
            weight_grad[here] = whole
    return hidden_grad.to(hidden.dtype), weight_grad, bias_grad.to(bias[0].dtype if bias else hidden.dtype)


def tile_gradient(sides, heads, here, rows, scalars, ids, at, numbers, kind, work) -> Tensor:
    """Of hidden @ weight.T + bias, for some tokens at one tile."""
    both = tile_logits(sides, heads, rows, numbers, work)
    chain = slope(both[0], numbers[0], numbers[1], numbers[4], work)
    lq, *others = log_probabilities(both, scalars, rows)
    inside, local = local_ids(ids[rows], here)
    outside = without(work("outside", lq.shape).copy_(lq), inside, local) if len(scalars) > 6 else None
    g = logit_gradient(kind, lq, *others, center=scalars[4, rows, None], beta=numbers[5], work=work)
    g *= scalars[5, rows, None]
    if ids.shape[1]:
        g.scatter_add_(1, local, at[rows] * inside)
    if outside is not None:
        g += outside.sub_(scalars[6, rows, None]).exp_().mul_(scalars[7, rows, None])
    return g.mul_(chain)


def slope(z: Tensor, scale: float, softcap: float, temperature: float, work: Workspace) -> Tensor | float:
    """Derivative of logits over temperature by hidden @ weight.T + bias; 0 at the floor."""
    low = z.numel() > 0 and not bool(z.amin() > FLOOR)  # NaN too: other tokens may be at the floor
    if not softcap and not low:
        return scale / temperature
    chain = work("chain", z.shape)
    if softcap:
        torch.mul(z, temperature / softcap, out=chain).square_().neg_().add_(1).mul_(scale / temperature)
    else:
        chain.fill_(scale / temperature)
    return chain.masked_fill_(z <= FLOOR, 0) if low else chain


def logit_gradient(
    kind: int, lq: Tensor, lp: Tensor | None = None, *, center: Tensor, beta: float, work: Workspace
) -> Tensor:
    """Of one token's divergence by its logits over temperature; the softmax alone for AT_IDS. Overwrites lq and lp."""
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
    common = mixed(d, beta, work)
    return d.clamp_(min=0).add_(common).add_(center).mul_(q).mul_(beta - 1)


def divergence_top(side, vocab, k, numbers):
    """The ids of a side's k largest logits, [N, k]."""
    n, work = len(side[0]), Workspace(side[0])
    values = side[0].new_empty((n, 0), dtype=wide_of(side[0]))
    ids = values.new_empty((n, 0 if n else k), dtype=torch.int64)
    for here, heads in tiles((side,), vocab if n else 0, work):
        found = []
        for rows in row_slices(n):
            (x,) = tile_logits((side,), heads, rows, numbers, work)
            found.append(x.topk(min(k, x.shape[1]), 1))
        values = torch.cat([values, torch.cat([one.values for one in found])], 1)
        ids = torch.cat([ids, torch.cat([one.indices for one in found]) + here.start], 1)
        values, places = values.topk(min(k, values.shape[1]), 1)
        ids = ids.gather(1, places)
    return ids


register("divergence", SCAN, divergence_scan, fake_scan)
register("divergence", MEANS, divergence_means, fake_means)
register("divergence", BACKWARD, divergence_backward, fake_backward)
register("divergence", TOP, divergence_top, fake_top)
