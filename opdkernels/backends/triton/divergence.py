"""`divergence` in Triton: products, softmaxes and sums of both models in one kernel, logits never leave the processor forward.

A program holds the logits of ROWS tokens at COLUMNS ids of both models at once, in fp32 (as tl.dot accumulates them), and walks
over its share of the vocabulary. Sums are about a running maximum; shares are merged in order by a second kernel.

Backward makes the logits again, a chunk of the vocabulary at a time, and writes their gradient to a workspace of bounded size, in
bf16 where hidden states and head are, else in fp32. Two products with it make the gradients: every tile of a result belongs to one
program, so no atomics, and the same bits every time.

bf16 and fp16 go to matrix units as they are. Anything else is widened and multiplied in full fp32, not in TF32, except the
gradient's products of fp16: fp16 fits TF32, and a gradient's small values do not fit fp16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from opdkernels.backends.triton import launch
from opdkernels.backends.triton.numeric import multiple, to_pattern, widen

ROWS, COLUMNS, DEPTH, DEPTH_SLOW = 128, 64, 64, 16  # slow: in fp32, or of a width that has no whole 16-byte loads
SIDE, SIDE_SLOW = 128, 64  # of a tile of the gradients
IDS, DEPTH_AT_IDS = 16, 128
WARPS = 8
MERGED = 128  # tokens a program
WORKSPACE_BYTES, CHUNK = 1 << 27, 1 << 13  # and ids at most, however few the tokens
MOMENTS = tl.constexpr(8)
FLOOR = tl.constexpr(-1e4)  # as in opdkernels/ops/tiles.py, and the kinds
FORWARD, REVERSE, JSD, VARIATION, AT_IDS = (tl.constexpr(k) for k in range(5))


@triton.jit
def tanh(x):
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def product(a, b, total, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b, of a [I, K] and b [K, J]."""
    if HALF:
        return tl.dot(a, b, total)
    else:
        return tl.dot(widen(a, tl.float32), widen(b, tl.float32), total, input_precision=PRECISION)


@triton.jit
def shaped(x, scale, softcap, temperature, CAPPED: tl.constexpr):
    """Logits over temperature, of hidden @ weight.T + bias; NaN stays."""
    x *= scale
    if CAPPED:
        x = softcap * tanh(x / softcap)
    x /= temperature
    return tl.where(x < FLOOR, FLOOR, x)


@triton.jit
def logits(
    hidden, weight, bias, row, column, width, scale, softcap, temperature,
    HALF: tl.constexpr, EVEN: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Over temperature, fp32 [ROWS, COLUMNS]. Rows and columns lie within the tensors."""
    if EVEN:
        width = multiple(width, DEPTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, DEPTH):
        k = start + tl.arange(0, DEPTH)
        a, b = hidden + (row[:, None] * width + k[None, :]), weight + (column[:, None] * width + k[None, :])
        if EVEN:
            total = product(tl.load(a), tl.trans(tl.load(b)), total, HALF, "ieee")
        else:
            inside = k[None, :] < width
            total = product(tl.load(a, inside, 0.0), tl.trans(tl.load(b, inside, 0.0)), total, HALF, "ieee")
    if bias is not None:
        total += widen(tl.load(bias + column), tl.float32)[None, :]
    return shaped(total, scale, softcap, temperature, CAPPED)


@triton.jit
def tile_sums(z, u, inside):
    """About each side's maximum: maximum and sum of exponentials, twice; sums of e^u (u - z), e^z (z - u), e^z z and e^u u."""
    z, u = tl.where(inside, z, FLOOR), tl.where(inside, u, FLOOR)
    z_max, u_max = tl.max(z, 1), tl.max(u, 1)
    z -= z_max[:, None]
    u -= u_max[:, None]
    e = tl.where(inside, tl.exp(z), 0.0)
    z_sum, reverse, z_mean = tl.sum(e, 1), tl.sum(e * (z - u), 1), tl.sum(e * z, 1)
    e = tl.where(inside, tl.exp(u), 0.0)
    return z_max, z_sum, u_max, tl.sum(e, 1), tl.sum(e * (u - z), 1), reverse, z_mean, tl.sum(e * u, 1)


@triton.jit
def first_of(x, largest, column, end):
    """The first id at which x is its largest: of fewer registers than an arg-max."""
    return tl.min(tl.where((x == largest[:, None]) & (column < end)[None, :], column[None, :], end), 1)


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


@triton.jit
def nothing(SIZE: tl.constexpr):
    """The sums of no ids."""
    zero = tl.zeros([SIZE], tl.float32)
    floor = zero + FLOOR
    return floor, zero, floor, zero, zero, zero, zero, zero


NUMBERS = ["width", "teacher_width", "n", "vocab", "share", "scale", "softcap", "teacher_scale", "teacher_softcap", "temperature"]


@triton.jit(do_not_specialize=NUMBERS)
def scan(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, partial, best, n, vocab, share,
    width, teacher_width, scale, softcap, teacher_scale, teacher_softcap, temperature,
    HALF: tl.constexpr, TEACHER_HALF: tl.constexpr, EVEN: tl.constexpr, TEACHER_EVEN: tl.constexpr, CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, BEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sums of one share of the vocabulary: partial [shares, 8, n], and the likeliest ids, best [shares, 2, n]."""
    n = n.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    held = tl.minimum(row, n - 1)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, vocab)
    sums = nothing(ROWS)
    z_best = tl.zeros([ROWS], tl.int32) + first
    u_best = z_best
    for start in range(first, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (column < end)[None, :]
        place = tl.minimum(column, end - 1).to(tl.int64)
        z = logits(hidden, weight, bias, held, place, width, scale, softcap, temperature, HALF, EVEN, CAPPED, ROWS, COLUMNS, DEPTH)
        u = logits(
            teacher_hidden, teacher_weight, teacher_bias, held, place, teacher_width, teacher_scale, teacher_softcap, temperature,
            TEACHER_HALF, TEACHER_EVEN, TEACHER_CAPPED, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        tile = tile_sums(z, u, inside)
        if BEST:
            z_best = tl.where(tile[0] > sums[0], first_of(z, tile[0], column, end), z_best)
            u_best = tl.where(tile[2] > sums[2], first_of(u, tile[2], column, end), u_best)
        sums = joined(sums, tile)
    into = partial + tl.program_id(1) * MOMENTS * n + row
    for k in tl.static_range(MOMENTS):
        tl.store(into + k * n, sums[k], row < n)
    if BEST:
        into = best + tl.program_id(1) * 2 * n + row
        tl.store(into, z_best, row < n)
        tl.store(into + n, u_best, row < n)


@triton.jit(do_not_specialize=["n", "vocab", "count", "width", "scale", "softcap", "temperature"])
def at_ids(
    hidden, weight, bias, ids, at, n, vocab, count, width, scale, softcap, temperature,
    CAPPED: tl.constexpr, IDS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One side's logits over temperature of a token at some of its ids, [n, count]; ids beyond the vocabulary are passed over."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * IDS + tl.arange(0, IDS)
    id = tl.load(ids + (row * count + k), k < count, -1)
    inside = (id >= 0) & (id < vocab)
    total = tl.zeros([IDS, DEPTH], tl.float32)
    for start in range(0, width, DEPTH):
        place = start + tl.arange(0, DEPTH)
        a = tl.load(hidden + (row * width + place), place < width, 0.0)
        b = tl.load(weight + (id[:, None] * width + place[None, :]), inside[:, None] & (place < width)[None, :], 0.0)
        total += widen(a, tl.float32)[None, :] * widen(b, tl.float32)
    x = tl.sum(total, 1)
    if bias is not None:
        x += widen(tl.load(bias + id, inside, 0.0), tl.float32)
    tl.store(at + (row * count + k), shaped(x, scale, softcap, temperature, CAPPED), inside)


@triton.jit(do_not_specialize=["n", "shares"])
def merge(partial, best, moments, likeliest, n, shares, BEST: tl.constexpr, ROWS: tl.constexpr):
    """moments [8, n] of the sums of shares, in order: sums as logs, the others as means; the likeliest ids [2, n]."""
    n = n.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    sums = nothing(ROWS)
    z_best = tl.zeros([ROWS], tl.int32)
    u_best = z_best
    for share in range(shares):
        one = partial + share * MOMENTS * n + row
        part = (
            tl.load(one, inside, 0.0), tl.load(one + n, inside, 1.0), tl.load(one + 2 * n, inside, 0.0), tl.load(one + 3 * n, inside, 1.0),
            tl.load(one + 4 * n, inside, 0.0), tl.load(one + 5 * n, inside, 0.0), tl.load(one + 6 * n, inside, 0.0), tl.load(one + 7 * n, inside, 0.0),
        )  # fmt: skip
        if BEST:
            mine = best + share * 2 * n + row
            z_best = tl.where((part[0] > sums[0]) | (share == 0), tl.load(mine, inside, 0), z_best)
            u_best = tl.where((part[2] > sums[2]) | (share == 0), tl.load(mine + n, inside, 0), u_best)
        sums = joined(sums, part)
    into = moments + row
    tl.store(into, sums[0], inside)
    tl.store(into + n, tl.log(sums[1]), inside)
    tl.store(into + 2 * n, sums[2], inside)
    tl.store(into + 3 * n, tl.log(sums[3]), inside)
    tl.store(into + 4 * n, sums[4] / sums[3], inside)
    tl.store(into + 5 * n, sums[5] / sums[1], inside)
    tl.store(into + 6 * n, sums[6] / sums[1], inside)
    tl.store(into + 7 * n, sums[7] / sums[3], inside)
    if BEST:
        tl.store(likeliest + row, z_best.to(tl.int64), inside)
        tl.store(likeliest + n + row, u_best.to(tl.int64), inside)


@triton.jit
def four(data, n):
    """Maximum and log of the sum of exponentials of both sides, [ROWS, 1] each."""
    return tl.load(data)[:, None], tl.load(data + n)[:, None], tl.load(data + 2 * n)[:, None], tl.load(data + 3 * n)[:, None]


@triton.jit
def over_mixture(d, beta):
    """log(p / m) and log(q / m) of d = log(p / q), by an exponential that does not grow."""
    share = tl.where(d <= 0, beta, 1 - beta)
    common = tl.log(1 + share * (tl.exp(-tl.abs(d)) - 1))
    below = tl.where(d <= 0, d, 0.0)
    return below - common, below - d - common


@triton.jit(do_not_specialize=[*NUMBERS, "beta"])
def means(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, moments, partial, n, vocab, share, beta,
    width, teacher_width, scale, softcap, teacher_scale, teacher_softcap, temperature,
    KIND: tl.constexpr, HALF: tl.constexpr, TEACHER_HALF: tl.constexpr, EVEN: tl.constexpr, TEACHER_EVEN: tl.constexpr,
    CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Of one share of the vocabulary, [shares, 2, n]: the sum that makes the divergence, and the mean under q that its gradient subtracts."""
    n = n.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    held = tl.minimum(row, n - 1)
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, vocab)
    z_max, z_log, u_max, u_log = four(moments + held, n)
    total = tl.zeros([ROWS], tl.float32)
    mean = total
    for start in range(first, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        place = tl.minimum(column, end - 1).to(tl.int64)
        lq = logits(hidden, weight, bias, held, place, width, scale, softcap, temperature, HALF, EVEN, CAPPED, ROWS, COLUMNS, DEPTH)
        lp = logits(
            teacher_hidden, teacher_weight, teacher_bias, held, place, teacher_width, teacher_scale, teacher_softcap, temperature,
            TEACHER_HALF, TEACHER_EVEN, TEACHER_CAPPED, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        lq, lp = lq - z_max - z_log, lp - u_max - u_log
        inside = (column < end)[None, :]
        q, p = tl.where(inside, tl.exp(lq), 0.0), tl.where(inside, tl.exp(lp), 0.0)
        if KIND == JSD:
            over_p, over_q = over_mixture(lp - lq, beta)
            total += tl.sum(beta * p * over_p + (1 - beta) * q * over_q, 1)
            mean += tl.sum(q * over_q, 1)
        else:
            total += tl.sum(tl.abs(q - p), 1) / 2
            mean += tl.sum(tl.where(q > p, q, tl.where(q < p, -q, 0.0)), 1)
    into = partial + tl.program_id(1) * 2 * n + row
    tl.store(into, total, row < n)
    tl.store(into + n, mean, row < n)


@triton.jit
def logit_gradient(lq, lp, center, beta, KIND: tl.constexpr):
    """Of one token's divergence by its logits over temperature; the softmax alone for AT_IDS."""
    q = tl.exp(lq)
    if KIND == FORWARD:
        return q - tl.exp(lp)
    elif KIND == REVERSE:
        return q * (lq - lp - center)
    elif KIND == JSD:
        _, over_q = over_mixture(lp - lq, beta)
        return (1 - beta) * q * (over_q - center)
    elif KIND == VARIATION:
        p = tl.exp(lp)
        return 0.5 * q * (tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0)) - center)
    else:
        return q


@triton.jit(do_not_specialize=[*NUMBERS, "beta", "count", "first", "pitch"])
def gradient(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, scalars, ids, at, into, n, vocab, first, pitch, count, beta,
    width, teacher_width, scale, softcap, teacher_scale, teacher_softcap, temperature,
    KIND: tl.constexpr, HALF: tl.constexpr, TEACHER_HALF: tl.constexpr, EVEN: tl.constexpr, TEACHER_EVEN: tl.constexpr,
    CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, IDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Of hidden @ weight.T + bias at a chunk of the vocabulary from `first`, into [n, pitch]; scalars [6, n], at [n, count]."""
    n = n.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    held = tl.minimum(row, n - 1)
    local = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column = first + local
    place = tl.minimum(column, vocab - 1).to(tl.int64)
    z_max, z_log, u_max, u_log = four(scalars + held, n)
    center, factor = tl.load(scalars + 4 * n + held)[:, None], tl.load(scalars + 5 * n + held)[:, None]
    z = logits(hidden, weight, bias, held, place, width, scale, softcap, temperature, HALF, EVEN, CAPPED, ROWS, COLUMNS, DEPTH)
    lq = z - z_max - z_log
    if KIND == AT_IDS:
        g = factor * logit_gradient(lq, lq, center, beta, KIND)
    else:
        u = logits(
            teacher_hidden, teacher_weight, teacher_bias, held, place, teacher_width, teacher_scale, teacher_softcap, temperature,
            TEACHER_HALF, TEACHER_EVEN, TEACHER_CAPPED, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        g = factor * logit_gradient(lq, u - u_max - u_log, center, beta, KIND)
    if IDS:
        for k in range(count):
            hit = tl.load(ids + (held * count + k))[:, None] == column[None, :]
            g += tl.where(hit, tl.load(at + (held * count + k))[:, None], 0.0)
    slope = scale / temperature
    if CAPPED:
        bent = z * temperature / softcap
        g *= 1 - bent * bent
    g = tl.where((z > FLOOR) & (column < vocab)[None, :], g * slope, 0.0)
    pitch = multiple(pitch, 64)
    tl.store(into + (row[:, None] * pitch + local[None, :]), narrow(g, into), (row < n)[:, None])


@triton.jit
def narrow(x, into):
    """To what a pointer points to, to nearest even."""
    if into.dtype.element_ty == tl.bfloat16:
        return to_pattern(x).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(into.dtype.element_ty)


@triton.jit(do_not_specialize=["lines", "places", "depth", "pitch"])
def multiply(
    a, b, into, lines, places, depth, pitch,
    ACROSS: tl.constexpr, ADD: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    SIDE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """a b, or added to what is there: into [lines, places], b [depth, places], a [lines, pitch] or, ACROSS, [depth, pitch]. Beyond
    what counts a's rows hold zeros up to their pitch, a multiple of whole tiles."""
    pitch = multiple(pitch, 64)
    if EVEN:
        places = multiple(places, 16)
    i = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    j = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    held = tl.minimum(i, lines - 1)
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for start in range(0, depth, DEPTH):
        k = (start + tl.arange(0, DEPTH)).to(tl.int64)
        if ACROSS:
            left = tl.trans(tl.load(a + (k[:, None] * pitch + i[None, :]), k[:, None] < depth, 0.0))
        else:
            left = tl.load(a + (held[:, None] * pitch + k[None, :]))
        right = tl.load(b + (k[:, None] * places + j[None, :]), (k[:, None] < depth) & (j[None, :] < places), 0.0)
        total = product(left, right, total, HALF, PRECISION)
    inside = (i[:, None] < lines) & (j[None, :] < places)
    here = into + (i[:, None] * places + j[None, :])
    if ADD:
        total += tl.load(here, inside, 0.0)
    tl.store(here, narrow(total, into), inside)


@triton.jit(do_not_specialize=["n", "vocab", "first", "pitch", "width", "scale", "softcap", "temperature"])
def write_logits(
    hidden, weight, bias, into, n, vocab, first, pitch, width, scale, softcap, temperature,
    HALF: tl.constexpr, EVEN: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A chunk of one side's logits, [n, pitch]."""
    n, pitch = n.to(tl.int64), multiple(pitch, 64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    local = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    held, place = tl.minimum(row, n - 1), tl.minimum(first + local, vocab - 1).to(tl.int64)
    x = logits(hidden, weight, bias, held, place, width, scale, softcap, temperature, HALF, EVEN, CAPPED, ROWS, COLUMNS, DEPTH)
    tl.store(into + (row[:, None] * pitch + local[None, :]), x, (row < n)[:, None])


def shared(student: list[torch.Tensor], teacher: list[torch.Tensor], numbers: list[float]) -> tuple[list, list, dict]:
    """What every kernel takes of both sides: tensors, numbers and constants."""
    halves = all(half(side[0], side[1]) and side[0].shape[1] % DEPTH == 0 for side in (student, teacher))
    depth = DEPTH if halves else DEPTH_SLOW
    tensors, constants = [], {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": depth}
    for prefix, side, softcap in (("", student, numbers[1]), ("TEACHER_", teacher, numbers[3])):
        hidden, weight = side[0].contiguous(), side[1].contiguous()
        tensors += [hidden, weight, side[2].contiguous() if len(side) > 2 else None]
        constants |= {f"{prefix}HALF": half(hidden, weight), f"{prefix}EVEN": hidden.shape[1] % depth == 0, f"{prefix}CAPPED": softcap != 0}
    return tensors, [student[0].shape[1], teacher[0].shape[1], *numbers[:5]], constants


def half(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether matrix units take both as they are."""
    return a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)


def shares_of(n: int, vocab: int, device: torch.device) -> tuple[int, int]:
    """The size of a share of the vocabulary and their number: enough programs for the device, each with whole tiles."""
    tiles = triton.cdiv(vocab, COLUMNS)
    wanted = triton.cdiv(launch.processors(device) * launch.PROGRAMS_PER_PROCESSOR, triton.cdiv(n, ROWS))
    share = triton.cdiv(tiles, min(wanted, tiles)) * COLUMNS
    return share, triton.cdiv(vocab, share)


def divergence_scan(student, teacher, ids, vocab: int, numbers, tops: bool):
    n, new = len(student[0]), student[0].new_empty
    moments, at = new((8, n), dtype=torch.float32), student[0].new_full((2, *ids.shape), float("nan"), dtype=torch.float32)
    likeliest = new((2, n if tops else 0), dtype=torch.int64)
    if n:
        tensors, values, constants = shared(student, teacher, numbers)
        share, shares = shares_of(n, vocab, moments.device)
        partial, best = new((shares, 8, n), dtype=torch.float32), new((shares, 2, n if tops else 0), dtype=torch.int32)
        launch.run(
            scan, (triton.cdiv(n, ROWS), shares), *tensors, partial, best, n, vocab, share, *values, warps=WARPS, BEST=tops, **constants,
        )  # fmt: skip
        if ids.shape[1]:
            for k, (scale, softcap) in enumerate((numbers[:2], numbers[2:4])):
                launch.run(
                    at_ids, (n, triton.cdiv(ids.shape[1], IDS)), *tensors[3 * k : 3 * k + 3], ids.contiguous(), at.select(0, k),
                    n, vocab, ids.shape[1], values[k], scale, softcap, numbers[4], warps=4, CAPPED=softcap != 0, IDS=IDS, DEPTH=DEPTH_AT_IDS,
                )  # fmt: skip
        launch.run(merge, (triton.cdiv(n, MERGED),), partial, best, moments, likeliest, n, shares, warps=4, BEST=tops, ROWS=MERGED)
    return moments, at, likeliest


def divergence_means(student, teacher, moments, vocab: int, numbers, kind: int):
    n = moments.shape[1]
    if not n:
        return moments.new_empty(2, 0)
    tensors, values, constants = shared(student, teacher, numbers)
    share, shares = shares_of(n, vocab, moments.device)
    partial = moments.new_empty(shares, 2, n)
    grid = triton.cdiv(n, ROWS), shares
    launch.run(means, grid, *tensors, moments.contiguous(), partial, n, vocab, share, numbers[5], *values, warps=WARPS, KIND=kind, **constants)
    return partial.sum(0)


def divergence_backward(student, teacher, scalars, ids, at, vocab: int, numbers, kind: int, wanted):
    tensors, values, constants = shared(student, teacher, numbers)
    hidden, weight, bias = tensors[:3]
    n, width = hidden.shape
    bf16 = constants["HALF"] and hidden.dtype == torch.bfloat16
    columns = chunk_of(n, vocab, 2 if bf16 else 4)
    work = hidden.new_empty((n, columns), dtype=torch.bfloat16 if bf16 else torch.float32)
    hidden_grad = hidden.new_zeros(hidden.shape if wanted[0] else 0, dtype=torch.float32)
    weight_grad = weight.new_zeros(weight.shape if wanted[1] else 0)
    bias_grad = (hidden if bias is None else bias).new_zeros(len(weight) if wanted[2] else 0)
    even = width % 16 == 0
    side, depth = (SIDE if even else SIDE_SLOW), (DEPTH if even and bf16 else DEPTH_SLOW)
    options = {"HALF": bf16, "PRECISION": "tf32" if constants["HALF"] else "ieee", "EVEN": even, "SIDE": side, "DEPTH": depth, "warps": WARPS}
    for first in range(0, vocab if n else 0, columns):
        size = min(columns, vocab - first)
        launch.run(
            gradient, (triton.cdiv(n, ROWS), triton.cdiv(columns, COLUMNS)), *tensors, scalars.contiguous(), ids.contiguous(), at.contiguous(), work,
            n, vocab, first, columns, ids.shape[1], numbers[5], *values, warps=WARPS, KIND=kind, IDS=ids.shape[1] > 0, **constants,
        )  # fmt: skip
        part = weight.narrow(0, first, size)
        across = triton.cdiv(width, side)
        if wanted[0]:
            launch.run(multiply, (triton.cdiv(n, side), across), work, part, hidden_grad, n, width, size, columns, ACROSS=False, ADD=True, **options)
        if wanted[1]:
            into = weight_grad.narrow(0, first, size)
            launch.run(multiply, (triton.cdiv(size, side), across), work, hidden, into, size, width, n, columns, ACROSS=True, ADD=False, **options)
        if wanted[2]:
            bias_grad.narrow(0, first, size).copy_(work.narrow(1, 0, size).sum(0, dtype=torch.float32))
    return hidden_grad.to(hidden.dtype), weight_grad, bias_grad


def chunk_of(n: int, vocab: int, itemsize: int) -> int:
    """Ids whose gradients the workspace holds, whole tiles of them."""
    unit = max(COLUMNS, SIDE)
    fits = min(CHUNK, WORKSPACE_BYTES // (max(n, 1) * itemsize)) // unit
    return min(max(1, fits), triton.cdiv(vocab, unit)) * unit


def divergence_top(side, vocab: int, k: int, numbers):
    (hidden, weight, bias, *_), values, constants = shared(side, side, numbers)
    constants = {name: one for name, one in constants.items() if not name.startswith("TEACHER_")}
    n, columns = len(hidden), chunk_of(len(hidden), vocab, 4)
    work = hidden.new_empty((n, columns), dtype=torch.float32)
    best, ids = work.narrow(1, 0, 0), work.new_empty((n, 0), dtype=torch.int64)
    for first in range(0, vocab, columns):
        if n:
            grid = triton.cdiv(n, ROWS), triton.cdiv(columns, COLUMNS)
            sizes = n, vocab, first, columns, values[0]
            launch.run(write_logits, grid, hidden, weight, bias, work, *sizes, *numbers[:2], numbers[4], warps=WARPS, **constants)
        size = min(columns, vocab - first)
        found = work.narrow(1, 0, size).topk(min(k, size), 1)
        best, ids = torch.cat([best, found.values], 1), torch.cat([ids, found.indices + first], 1)
        best, places = best.topk(min(k, best.shape[1]), 1)
        ids = ids.gather(1, places)
    return ids
