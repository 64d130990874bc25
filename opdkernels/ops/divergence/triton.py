"""`divergence` in Triton: products by the library, everything else of a chunk of the vocabulary in one pass over its logits.

A chunk's logits of both models are in fp32, as matrix units accumulate them (torch.mm with out_dtype), in a workspace of bounded
size. Forward, a program reads a token's and leaves their sums about a running maximum; logits at ids are taken from them too, as those
of another product would not fit the sums. Backward makes the logits again and writes their gradient over the chunk, in bf16 where
hidden states and head are, else in fp32; two products with it make the gradients. Every sum belongs to one program and chunks come in
order: no atomics, and the same bits every time.

On an H200 products that a kernel of Triton's fused with the sums ran at 300 TFLOP/s, where the library reaches 776 (docs/gpu.md).

bf16 and fp16 go to matrix units as they are. Anything else is widened and multiplied in fp32, or what torch takes for it where TF32 is
allowed; so is the gradient of fp16, whose small values do not fit fp16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from opdkernels.backends.triton import launch
from opdkernels.backends.triton.numeric import multiple, to_bf16_bits, widen
from opdkernels.ops.divergence import logits as plain

COLUMNS, LEAST_COLUMNS = 4096, 256  # ids that a program takes at a time
WORKSPACE_BYTES = 1 << 28  # of a chunk's logits and their gradient
BYTES_AN_ID = 12  # two logits and a gradient, each at most fp32
WARPS = 16
MOMENTS = tl.constexpr(8)
FLOOR = tl.constexpr(-1e4)  # as in opdkernels/ops/divergence/tiles.py, and the kinds
FORWARD, REVERSE, JSD, VARIATION, AT_IDS = (tl.constexpr(k) for k in range(5))


@triton.jit
def tanh(x):
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def shaped(x, scale, softcap, temperature, CAPPED: tl.constexpr):
    """Logits over temperature, of hidden @ weight.T + bias; NaN stays."""
    x *= scale
    if CAPPED:
        x = softcap * tanh(x / softcap)
    x /= temperature
    return tl.where(x < FLOOR, FLOOR, x)


@triton.jit
def whole(size, EVEN: tl.constexpr):
    """A chunk's ids in 64 bits; EVEN: a multiple of 16, so that its rows are loaded 16 bytes at once."""
    if EVEN:
        return multiple(size, 16)
    return size.to(tl.int64)


@triton.jit
def logits(products, bias, first, place, size, scale, softcap, temperature, CAPPED: tl.constexpr):
    """Over temperature, of one token at places of a chunk that begins with id `first`; FLOOR beyond it."""
    inside = place < size
    x = tl.load(products + place, inside, 0.0)
    if bias is not None:
        x += widen(tl.load(bias + (first + place), inside, 0.0), tl.float32)
    return tl.where(inside, shaped(x, scale, softcap, temperature, CAPPED), FLOOR)


@triton.jit
def tile_sums(z, u, inside):
    """About each side's maximum: maximum and sum of exponentials, twice; sums of e^u (u - z), e^z (z - u), e^z z and e^u u."""
    z_max, u_max = tl.max(z, 0), tl.max(u, 0)
    z -= z_max
    u -= u_max
    e = tl.where(inside, tl.exp(z), 0.0)
    z_sum, reverse, z_mean = tl.sum(e, 0), tl.sum(e * (z - u), 0), tl.sum(e * z, 0)
    e = tl.where(inside, tl.exp(u), 0.0)
    return z_max, z_sum, u_max, tl.sum(e, 0), tl.sum(e * (u - z), 0), reverse, z_mean, tl.sum(e * u, 0)


@triton.jit
def first_of(x, largest, column, end):
    """The first id at which x is its largest: of fewer registers than an arg-max."""
    return tl.min(tl.where((x == largest) & (column < end), column, end), 0)


@triton.jit
def joined(a, b):
    """Two sets of sums as one, about the larger maxima."""
    z_max, u_max = tl.maximum(a[0], b[0]), tl.maximum(a[2], b[2])
    za, zb, ua, ub = a[0] - z_max, b[0] - z_max, a[2] - u_max, b[2] - u_max
    ez, fz, eu, fu = tl.exp(za), tl.exp(zb), tl.exp(ua), tl.exp(ub)
    return (
        z_max,
        ez * a[1] + fz * b[1],
        u_max,
        eu * a[3] + fu * b[3],
        eu * (a[4] + a[3] * (ua - za)) + fu * (b[4] + b[3] * (ub - zb)),
        ez * (a[5] + a[1] * (za - ua)) + fz * (b[5] + b[1] * (zb - ub)),
        ez * (a[6] + a[1] * za) + fz * (b[6] + b[1] * zb),
        eu * (a[7] + a[3] * ua) + fu * (b[7] + b[3] * ub),
    )


NUMBERS = [
    "first",
    "size",
    "scale",
    "softcap",
    "teacher_scale",
    "teacher_softcap",
    "temperature",
]  # a chunk, and how logits are shaped


@triton.jit(do_not_specialize=["n", "vocab", *NUMBERS])
def scan(
    products,
    teacher_products,
    bias,
    teacher_bias,
    sums,
    best,
    n,
    vocab,
    first,
    size,
    scale,
    softcap,
    teacher_scale,
    teacher_softcap,
    temperature,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    EVEN: tl.constexpr,
    BEST: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds a chunk to the sums [8, n] and the likeliest ids [2, n] of a token; after the last one sums as logs, the others as means."""
    n, row = n.to(tl.int64), tl.program_id(0).to(tl.int64)
    size = whole(size, EVEN)
    products += row * size
    teacher_products += row * size
    sums += row
    total = (
        tl.load(sums),
        tl.load(sums + n),
        tl.load(sums + 2 * n),
        tl.load(sums + 3 * n),
        tl.load(sums + 4 * n),
        tl.load(sums + 5 * n),
        tl.load(sums + 6 * n),
        tl.load(sums + 7 * n),
    )
    if BEST:
        z_best, u_best = tl.load(best + row), tl.load(best + n + row)
    for start in range(0, size, COLUMNS):
        place = start + tl.arange(0, COLUMNS)
        z = logits(products, bias, first, place, size, scale, softcap, temperature, CAPPED)
        u = logits(
            teacher_products,
            teacher_bias,
            first,
            place,
            size,
            teacher_scale,
            teacher_softcap,
            temperature,
            TEACHER_CAPPED,
        )
        tile = tile_sums(z, u, place < size)
        if BEST:
            z_best = tl.where(tile[0] > total[0], (first + first_of(z, tile[0], place, size)).to(tl.int64), z_best)
            u_best = tl.where(tile[2] > total[2], (first + first_of(u, tile[2], place, size)).to(tl.int64), u_best)
        total = joined(total, tile)
    if BEST:
        tl.store(best + row, z_best)
        tl.store(best + n + row, u_best)
    if first + size < vocab:
        for k in tl.static_range(MOMENTS):
            tl.store(sums + k * n, total[k])
    else:
        tl.store(sums, total[0])
        tl.store(sums + n, tl.log(total[1]))
        tl.store(sums + 2 * n, total[2])
        tl.store(sums + 3 * n, tl.log(total[3]))
        tl.store(sums + 4 * n, total[4] / total[3])
        tl.store(sums + 5 * n, total[5] / total[1])
        tl.store(sums + 6 * n, total[6] / total[1])
        tl.store(sums + 7 * n, total[7] / total[3])


@triton.jit
def four(data, n):
    """A token's maximum and log of the sum of exponentials, of both sides."""
    return tl.load(data), tl.load(data + n), tl.load(data + 2 * n), tl.load(data + 3 * n)


@triton.jit
def over_mixture(d, beta):
    """log(p / m) and log(q / m) of d = log(p / q), by an exponential that does not grow."""
    share = tl.where(d <= 0, beta, 1 - beta)
    common = tl.log(1 + share * (tl.exp(-tl.abs(d)) - 1))
    below = tl.where(d <= 0, d, 0.0)
    return below - common, below - d - common


@triton.jit(do_not_specialize=["n", "beta", *NUMBERS])
def means(
    products,
    teacher_products,
    bias,
    teacher_bias,
    moments,
    into,
    n,
    first,
    size,
    beta,
    scale,
    softcap,
    teacher_scale,
    teacher_softcap,
    temperature,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds a chunk to [2, n]: the sum that makes the divergence, and the mean under q that its gradient subtracts."""
    n, row = n.to(tl.int64), tl.program_id(0).to(tl.int64)
    size = whole(size, EVEN)
    products += row * size
    teacher_products += row * size
    z_max, z_log, u_max, u_log = four(moments + row, n)
    total, mean = tl.load(into + row), tl.load(into + n + row)
    for start in range(0, size, COLUMNS):
        place = start + tl.arange(0, COLUMNS)
        lq = logits(products, bias, first, place, size, scale, softcap, temperature, CAPPED) - z_max - z_log
        lp = (
            logits(
                teacher_products,
                teacher_bias,
                first,
                place,
                size,
                teacher_scale,
                teacher_softcap,
                temperature,
                TEACHER_CAPPED,
            )
            - u_max
            - u_log
        )
        inside = place < size
        q, p = tl.where(inside, tl.exp(lq), 0.0), tl.where(inside, tl.exp(lp), 0.0)
        if KIND == JSD:
            over_p, over_q = over_mixture(lp - lq, beta)
            total += tl.sum(beta * p * over_p + (1 - beta) * q * over_q, 0)
            mean += tl.sum(q * over_q, 0)
        else:
            total += tl.sum(tl.abs(q - p), 0) / 2
            mean += tl.sum(tl.where(q > p, q, tl.where(q < p, -q, 0.0)), 0)
    mean += 0.0 * total  # NaN, which has no sign
    tl.store(into + row, total)
    tl.store(into + n + row, mean)


@triton.jit
def logit_gradient(lq, lp, center, beta, KIND: tl.constexpr):
    """Of one token's divergence by its logits over temperature; the softmax alone for AT_IDS."""
    q = tl.exp(lq)
    if KIND == FORWARD:
        return q - tl.exp(lp)
    if KIND == REVERSE:
        return q * (lq - lp - center)
    if KIND == JSD:
        _, over_q = over_mixture(lp - lq, beta)
        return (1 - beta) * q * (over_q - center)
    if KIND == VARIATION:
        p = tl.exp(lp)
        return 0.5 * q * (tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0)) - center)
    return q


@triton.jit(do_not_specialize=["n", "count", "beta", *NUMBERS])
def gradient(
    products,
    teacher_products,
    bias,
    teacher_bias,
    scalars,
    ids,
    at,
    into,
    n,
    first,
    size,
    count,
    beta,
    scale,
    softcap,
    teacher_scale,
    teacher_softcap,
    temperature,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    EVEN: tl.constexpr,
    IDS: tl.constexpr,
    REST: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of hidden @ weight.T + bias of a token at some ids of a chunk, into [n, size]; scalars [6, n], or with REST [8, n], at [n, count]."""
    n, row = n.to(tl.int64), tl.program_id(0).to(tl.int64)
    size = whole(size, EVEN)
    place = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    z_max, z_log, u_max, u_log = four(scalars + row, n)
    center, factor = tl.load(scalars + 4 * n + row), tl.load(scalars + 5 * n + row)
    z = logits(products + row * size, bias, first, place, size, scale, softcap, temperature, CAPPED)
    lq = z - z_max - z_log
    if KIND == AT_IDS:
        g = factor * logit_gradient(lq, lq, center, beta, KIND)
    else:
        u = logits(
            teacher_products + row * size,
            teacher_bias,
            first,
            place,
            size,
            teacher_scale,
            teacher_softcap,
            temperature,
            TEACHER_CAPPED,
        )
        g = factor * logit_gradient(lq, u - u_max - u_log, center, beta, KIND)
    if IDS:
        hits = tl.zeros([COLUMNS], tl.int32)
        for k in range(count):
            hit = tl.load(ids + (row * count + k)) == first + place
            g += tl.where(hit, tl.load(at + (row * count + k)), 0.0)
            if REST:
                hits += hit.to(tl.int32)
        if REST:
            rest_log, rest_gradient = tl.load(scalars + 6 * n + row), tl.load(scalars + 7 * n + row)
            g += tl.where(hits > 0, 0.0, rest_gradient * tl.exp(lq - rest_log))
    slope = scale / temperature
    if CAPPED:
        bent = z * temperature / softcap
        g *= 1 - bent * bent
    g = tl.where(z <= FLOOR, 0.0, g * slope)  # NaN stays
    tl.store(into + (row * size + place), narrow(g, into), place < size)


@triton.jit
def narrow(x, into):
    """To what a pointer points to, to nearest even."""
    if into.dtype.element_ty == tl.bfloat16:
        return to_bf16_bits(x).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(into.dtype.element_ty)


def half(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether matrix units take both as they are."""
    return a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in fp32: of two halves as matrix units accumulate it, else from what is widened. (AMD's libraries were not tried.)"""
    with torch.autocast(a.device.type, enabled=False):  # whose products would be rounded
        if half(a, b) and a.is_cuda and torch.version.hip is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()


def products(side: list[torch.Tensor], first: int, size: int) -> torch.Tensor:
    """fp32 [n, size]: hidden @ weight.T of a chunk of the vocabulary."""
    return product(side[0], side[1].narrow(0, first, size).T)


def biases(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> list[torch.Tensor | None]:
    return [side[2].contiguous() if len(side) > 2 else None for side in (student, teacher)]


def capped(numbers: list[float]) -> dict[str, bool]:
    return {"CAPPED": numbers[1] != 0, "TEACHER_CAPPED": numbers[3] != 0}


def tile_of(n: int) -> int:
    """Ids that a program takes at a time: a power of two, fewer of very many tokens."""
    fits = max(1, WORKSPACE_BYTES // (BYTES_AN_ID * max(n, 1)))
    return max(LEAST_COLUMNS, min(COLUMNS, 1 << fits.bit_length() - 1))


def chunks(vocab: int, *sides: list[torch.Tensor]) -> list[tuple[int, int]]:
    """Where chunks of the vocabulary begin and how many ids they have, whole tiles of which neither logits nor a part of a head in fp32
    exceed the workspace; none without tokens."""
    n, width = len(sides[0][0]), max(side[0].shape[1] for side in sides)
    tile, bytes_an_id = tile_of(n), max(BYTES_AN_ID * n, 4 * width, 1)
    size = max(1, WORKSPACE_BYTES // bytes_an_id // tile) * tile
    return [(first, min(size, vocab - first)) for first in range(0, vocab if n else 0, size)]


def divergence_scan(student, teacher, ids, rest: int, vocab: int, numbers, tops: bool):
    n, new = len(student[0]), student[0].new_zeros
    sums, at = (
        new((MOMENTS.value, n), dtype=torch.float32),
        student[0].new_full((2, *ids.shape), float("nan"), dtype=torch.float32),
    )
    sums.select(0, 0).fill_(FLOOR.value)
    sums.select(0, 2).fill_(FLOOR.value)
    argmax_ids = new((2, n if tops else 0), dtype=torch.int64)
    bias, outside = biases(student, teacher), sums.new_full((2, n if rest else 0), float("-inf"))
    for first, size in chunks(vocab, student, teacher):
        both = products(student, first, size), products(teacher, first, size)
        launch.run(
            scan,
            (n,),
            *both,
            *bias,
            sums,
            argmax_ids,
            n,
            vocab,
            first,
            size,
            *numbers[:5],
            num_warps=WARPS,
            **capped(numbers),
            EVEN=size % 16 == 0,
            BEST=tops,
            COLUMNS=tile_of(n),
        )
        if ids.shape[1]:
            inside, local = plain.local_ids(ids, slice(first, first + size))
            for k, (x, every_bias) in enumerate(zip(both, bias, strict=True)):
                here, scale, softcap = (
                    None if every_bias is None else every_bias.narrow(0, first, size),
                    numbers[2 * k],
                    numbers[2 * k + 1],
                )
                found = plain.shaped(
                    x.gather(1, local), None if here is None else here.take(local), scale, softcap, numbers[4]
                )
                at.select(0, k).copy_(torch.where(inside, found, at.select(0, k)))
                if rest:
                    others = plain.without(
                        plain.shaped(x, here, scale, softcap, numbers[4]),
                        inside.narrow(1, 0, rest),
                        local.narrow(1, 0, rest),
                    )
                    outside.select(0, k).copy_(torch.logaddexp(outside.select(0, k), others.logsumexp(1)))
    return sums, at, outside, argmax_ids


def divergence_means(student, teacher, moments, vocab: int, numbers, kind: int):
    n = moments.shape[1]
    found = moments.new_zeros(2, n)
    for first, size in chunks(vocab, student, teacher):
        launch.run(
            means,
            (n,),
            products(student, first, size),
            products(teacher, first, size),
            *biases(student, teacher),
            moments.contiguous(),
            found,
            n,
            first,
            size,
            numbers[5],
            *numbers[:5],
            num_warps=WARPS,
            KIND=kind,
            **capped(numbers),
            EVEN=size % 16 == 0,
            COLUMNS=tile_of(n),
        )
    return found


def divergence_backward(student, teacher, scalars, ids, at, vocab: int, numbers, kind: int, wanted):
    hidden, weight = student[:2]
    bias = student[2] if len(student) > 2 else hidden
    hidden_grad = hidden.new_zeros(hidden.shape if wanted[0] else 0, dtype=torch.float32)
    weight_grad = weight.new_zeros(weight.shape if wanted[1] else 0)
    bias_grad = bias.new_zeros(len(weight) if wanted[2] else 0)
    for first, size in chunks(vocab, student, teacher):
        g = chunk_gradient(student, teacher, scalars, ids, at, first, size, numbers, kind)
        if wanted[0]:
            hidden_grad.add_(product(g, weight.narrow(0, first, size)))
        if wanted[1]:
            weight_grad.narrow(0, first, size).copy_(product(g.T, hidden))
        if wanted[2]:
            bias_grad.narrow(0, first, size).copy_(g.sum(0, dtype=torch.float32))
    return hidden_grad.to(hidden.dtype), weight_grad, bias_grad


def chunk_gradient(student, teacher, scalars, ids, at, first: int, size: int, numbers, kind: int) -> torch.Tensor:
    """[n, size]: of hidden @ weight.T + bias at one chunk, in bf16 where both are."""
    hidden, weight = student[:2]
    n, bf16 = len(hidden), hidden.dtype == weight.dtype == torch.bfloat16
    into = hidden.new_empty((n, size), dtype=torch.bfloat16 if bf16 else torch.float32)
    mine = products(student, first, size)
    theirs = mine if kind == AT_IDS.value else products(teacher, first, size)
    tile = tile_of(n)
    launch.run(
        gradient,
        (n, triton.cdiv(size, tile)),
        mine,
        theirs,
        *biases(student, teacher),
        scalars.contiguous(),
        ids.contiguous(),
        at.contiguous(),
        into,
        n,
        first,
        size,
        ids.shape[1],
        numbers[5],
        *numbers[:5],
        num_warps=WARPS,
        KIND=kind,
        **capped(numbers),
        EVEN=size % 16 == 0,
        IDS=ids.shape[1] > 0,
        REST=len(scalars) > 6,
        COLUMNS=tile,
    )
    return into


def divergence_top(side, vocab: int, k: int, numbers):
    """By the logits before cap and temperature, which keep their order."""
    n = len(side[0])
    best, ids = side[0].new_empty((n, 0), dtype=torch.float32), side[0].new_empty((n, 0 if n else k), dtype=torch.int64)
    for first, size in chunks(vocab, side):
        x = products(side, first, size)
        if len(side) > 2:
            x += side[2].narrow(0, first, size)
        found = x.mul_(numbers[0]).topk(min(k, size), 1)
        best, ids = torch.cat([best, found.values], 1), torch.cat([ids, found.indices + first], 1)
        best, places = best.topk(min(k, best.shape[1]), 1)
        ids = ids.gather(1, places)
    return ids
