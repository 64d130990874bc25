"""`divergence` in Triton: matrix products by the library, everything else of a chunk of the vocabulary in one pass over
its logits.

The products hidden @ weight.T of a chunk, of both models, are in fp32, as matrix units accumulate them (torch.mm with
out_dtype), in a workspace of bounded size. In the forward pass one program reads a token's products and leaves their
sums relative to a running maximum; logits at ids are taken from the same products, as those of another product would
not match the sums. The backward pass computes the products again and writes the gradient of the logits over the chunk,
in bf16 if hidden states and head are bf16, else in fp32; two more products give the gradients. Every sum belongs to one
program and chunks are processed in order: no atomics, bit-identical results every time.

On an H200, a Triton kernel that fused the products with the sums ran at 300 TFLOP/s, where the library reaches 776
(docs/gpu.md).

bf16 and fp16 go to matrix units as they are. Anything else is converted to fp32 and multiplied in fp32, or in TF32
where torch allows it; so is the gradient of fp16, whose small values do not fit fp16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from opdkernels.backends.triton import launch
from opdkernels.backends.triton.numeric import multiple, to_bf16_bits, widen
from opdkernels.ops.divergence import logits as plain
from opdkernels.ops.divergence.logits import LogitParams
from opdkernels.ops.divergence.tiles import Side, mixture_shift

COLUMNS, LEAST_COLUMNS = 4096, 256  # maximum and minimum ids that a program processes at a time
WORKSPACE_BYTES = 1 << 28  # for a chunk's logits and their gradient
BYTES_AN_ID = 12  # per token and id: two logits and a gradient, each at most fp32
WARPS = 16
MOMENTS = tl.constexpr(8)
FLOOR = tl.constexpr(-1e4)  # these two lines: as in logits.py and tiles.py
FORWARD, REVERSE, JSD, VARIATION, AT_IDS = (tl.constexpr(k) for k in range(5))


@triton.jit
def tanh(x):
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def shape_logits(x, scale, softcap, temperature, CAPPED: tl.constexpr):
    """Logits over temperature from hidden @ weight.T + bias; at least FLOOR, NaN stays."""
    x *= scale
    if CAPPED:
        x = softcap * tanh(x / softcap)
    x /= temperature
    return tl.where(x < FLOOR, FLOOR, x)


@triton.jit
def to_int64(size, EVEN: tl.constexpr):
    """Number of ids of a chunk in 64 bits; EVEN: a multiple of 16, so that its rows are loaded 16 bytes at once."""
    if EVEN:
        return multiple(size, 16)
    else:
        return size.to(tl.int64)


@triton.jit
def load_logits(
    products_ptr,  # fp32 [size], one token's row
    bias_ptr,  # [vocab] or None
    first,  # first id of the chunk
    column,  # int64 [COLUMNS], columns of the chunk
    size,  # ids of the chunk
    scale,
    softcap,
    temperature,
    CAPPED: tl.constexpr,
):
    """Logits over temperature of one token at some columns of a chunk; FLOOR beyond its end."""
    inside = column < size
    x = tl.load(products_ptr + column, inside, 0.0)
    if bias_ptr is not None:
        x += widen(tl.load(bias_ptr + (first + column), inside, 0.0), tl.float32)
    return tl.where(inside, shape_logits(x, scale, softcap, temperature, CAPPED), FLOOR)


@triton.jit
def tile_sums(z, u, inside):
    """Sums of logits z (student) and u (teacher), each relative to its own maximum: maximum and sum of exponentials of
    z, then of u; sums of e^u (u - z), e^z (z - u), e^z z and e^u u."""
    z_max, u_max = tl.max(z, 0), tl.max(u, 0)
    z -= z_max
    u -= u_max
    e = tl.where(inside, tl.exp(z), 0.0)
    z_sum, reverse, z_mean = tl.sum(e, 0), tl.sum(e * (z - u), 0), tl.sum(e * z, 0)
    e = tl.where(inside, tl.exp(u), 0.0)
    return z_max, z_sum, u_max, tl.sum(e, 0), tl.sum(e * (u - z), 0), reverse, z_mean, tl.sum(e * u, 0)


@triton.jit
def first_argmax(x, largest, column, end):
    """The first column where x is its maximum: takes fewer registers than an arg-max."""
    return tl.min(tl.where((x == largest) & (column < end), column, end), 0)


@triton.jit
def merge_sums(a, b):
    """Two sets of sums as one, relative to the larger maxima."""
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


# scalars of every kernel: the chunk, and how logits are shaped
SCALARS = ["first", "size", "scale", "softcap", "teacher_scale", "teacher_softcap", "temperature"]


@triton.jit(do_not_specialize=["n", "vocab", *SCALARS])
def scan(
    products_ptr,  # fp32 [n, size], hidden @ weight.T of the student
    teacher_products_ptr,  # fp32 [n, size]
    bias_ptr,  # [vocab] or None
    teacher_bias_ptr,  # [vocab] or None
    sums_ptr,  # fp32 [8, n], read and written
    argmax_ptr,  # int64 [2, n], read and written if ARGMAX
    n,  # number of tokens
    vocab,
    first,  # first id of the chunk
    size,  # ids of the chunk
    scale,
    softcap,
    teacher_scale,
    teacher_softcap,
    temperature,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    EVEN: tl.constexpr,
    ARGMAX: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds a chunk to the sums and the most likely ids, one program per token; after the last chunk sums of
    exponentials become logs, the other sums means."""
    n, row = n.to(tl.int64), tl.program_id(0).to(tl.int64)
    size = to_int64(size, EVEN)
    products_ptr += row * size
    teacher_products_ptr += row * size
    sums_ptr += row
    total = (
        tl.load(sums_ptr),
        tl.load(sums_ptr + n),
        tl.load(sums_ptr + 2 * n),
        tl.load(sums_ptr + 3 * n),
        tl.load(sums_ptr + 4 * n),
        tl.load(sums_ptr + 5 * n),
        tl.load(sums_ptr + 6 * n),
        tl.load(sums_ptr + 7 * n),
    )
    if ARGMAX:
        z_argmax, u_argmax = tl.load(argmax_ptr + row), tl.load(argmax_ptr + n + row)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        z = load_logits(products_ptr, bias_ptr, first, column, size, scale, softcap, temperature, CAPPED)
        u = load_logits(
            teacher_products_ptr,
            teacher_bias_ptr,
            first,
            column,
            size,
            teacher_scale,
            teacher_softcap,
            temperature,
            TEACHER_CAPPED,
        )
        tile = tile_sums(z, u, column < size)
        if ARGMAX:
            z_first, u_first = first_argmax(z, tile[0], column, size), first_argmax(u, tile[2], column, size)
            z_argmax = tl.where(tile[0] > total[0], (first + z_first).to(tl.int64), z_argmax)
            u_argmax = tl.where(tile[2] > total[2], (first + u_first).to(tl.int64), u_argmax)
        total = merge_sums(total, tile)
    if ARGMAX:
        tl.store(argmax_ptr + row, z_argmax)
        tl.store(argmax_ptr + n + row, u_argmax)
    if first + size < vocab:
        for k in tl.static_range(MOMENTS):
            tl.store(sums_ptr + k * n, total[k])
    else:
        tl.store(sums_ptr, total[0])
        tl.store(sums_ptr + n, tl.log(total[1]))
        tl.store(sums_ptr + 2 * n, total[2])
        tl.store(sums_ptr + 3 * n, tl.log(total[3]))
        tl.store(sums_ptr + 4 * n, total[4] / total[3])
        tl.store(sums_ptr + 5 * n, total[5] / total[1])
        tl.store(sums_ptr + 6 * n, total[6] / total[1])
        tl.store(sums_ptr + 7 * n, total[7] / total[3])


@triton.jit
def load_normalizers(moments_ptr, n):
    """A token's maximum and log of the sum of exponentials, of both sides."""
    return (
        tl.load(moments_ptr),
        tl.load(moments_ptr + n),
        tl.load(moments_ptr + 2 * n),
        tl.load(moments_ptr + 3 * n),
    )


@triton.jit
def over_mixture(d, beta):
    """log(p / m) and log(q / m) of d = log(p / q); all exponents are at most 0."""
    weight = tl.where(d <= 0, beta, 1 - beta)
    common = tl.log(1 + weight * (tl.exp(-tl.abs(d)) - 1))
    below = tl.where(d <= 0, d, 0.0)
    return below - common, below - d - common


@triton.jit(do_not_specialize=["n", "beta", *SCALARS])
def means(
    products_ptr,  # fp32 [n, size], hidden @ weight.T of the student
    teacher_products_ptr,  # fp32 [n, size]
    bias_ptr,  # [vocab] or None
    teacher_bias_ptr,  # [vocab] or None
    moments_ptr,  # fp32 [8, n]
    out_ptr,  # fp32 [3, n], read and written but for the shift
    n,  # number of tokens
    first,  # first id of the chunk
    size,  # ids of the chunk
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
    """Adds a chunk to the divergence and to the mean under q that its gradient subtracts, one program per token."""
    n, row = n.to(tl.int64), tl.program_id(0).to(tl.int64)
    size = to_int64(size, EVEN)
    products_ptr += row * size
    teacher_products_ptr += row * size
    z_max, z_log, u_max, u_log = load_normalizers(moments_ptr + row, n)
    total, shift, mean = tl.load(out_ptr + row), tl.load(out_ptr + n + row), tl.load(out_ptr + 2 * n + row)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        z = load_logits(products_ptr, bias_ptr, first, column, size, scale, softcap, temperature, CAPPED)
        lq = z - z_max - z_log
        u = load_logits(
            teacher_products_ptr,
            teacher_bias_ptr,
            first,
            column,
            size,
            teacher_scale,
            teacher_softcap,
            temperature,
            TEACHER_CAPPED,
        )
        lp = u - u_max - u_log
        inside = column < size
        q, p = tl.where(inside, tl.exp(lq), 0.0), tl.where(inside, tl.exp(lp), 0.0)
        if KIND == JSD:
            over_p, over_q = over_mixture(lp - lq, beta)
            over_q -= shift
            total += tl.sum(beta * p * over_p + (1 - beta) * q * over_q, 0)
            mean += tl.sum(q * over_q, 0)
        else:
            total += tl.sum(tl.abs(q - p), 0) / 2
            mean += tl.sum(tl.where(q > p, q, tl.where(q < p, -q, 0.0)), 0)
    mean += 0.0 * total  # keeps NaN, whose sign is 0
    tl.store(out_ptr + row, total)
    tl.store(out_ptr + 2 * n + row, mean)


@triton.jit
def logit_gradient(lq, lp, shift, center, beta, KIND: tl.constexpr):
    """Gradient of a token's divergence by its logits over temperature; for AT_IDS only the softmax. Only JSD takes the
    shift."""
    q = tl.exp(lq)
    if KIND == FORWARD:
        return q - tl.exp(lp)
    elif KIND == REVERSE:
        return q * (lq - lp - center)
    elif KIND == JSD:
        _, over_q = over_mixture(lp - lq, beta)
        return (1 - beta) * q * (over_q - shift - center)
    elif KIND == VARIATION:
        p = tl.exp(lp)
        return 0.5 * q * (tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0)) - center)
    else:
        return q


@triton.jit(do_not_specialize=["n", "num_ids", "beta", *SCALARS])
def gradient(
    products_ptr,  # fp32 [n, size], hidden @ weight.T of the student
    teacher_products_ptr,  # fp32 [n, size]; not read for AT_IDS
    bias_ptr,  # [vocab] or None
    teacher_bias_ptr,  # [vocab] or None
    scalars_ptr,  # fp32 [7, n], with TAIL [9, n]
    ids_ptr,  # int64 [n, num_ids]
    grad_at_ids_ptr,  # fp32 [n, num_ids]
    out_ptr,  # bf16 or fp32 [n, size]
    n,  # number of tokens
    first,  # first id of the chunk
    size,  # ids of the chunk
    num_ids,
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
    TAIL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient of hidden @ weight.T + bias over a chunk, one program per token and COLUMNS ids."""
    n, row = n.to(tl.int64), tl.program_id(0).to(tl.int64)
    size = to_int64(size, EVEN)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    z_max, z_log, u_max, u_log = load_normalizers(scalars_ptr + row, n)
    shift, center = tl.load(scalars_ptr + 4 * n + row), tl.load(scalars_ptr + 5 * n + row)
    factor = tl.load(scalars_ptr + 6 * n + row)
    z = load_logits(products_ptr + row * size, bias_ptr, first, column, size, scale, softcap, temperature, CAPPED)
    lq = z - z_max - z_log
    if KIND == AT_IDS:
        g = factor * logit_gradient(lq, lq, shift, center, beta, KIND)
    else:
        u = load_logits(
            teacher_products_ptr + row * size,
            teacher_bias_ptr,
            first,
            column,
            size,
            teacher_scale,
            teacher_softcap,
            temperature,
            TEACHER_CAPPED,
        )
        g = factor * logit_gradient(lq, u - u_max - u_log, shift, center, beta, KIND)
    if IDS:
        hits = tl.zeros([COLUMNS], tl.int32)
        for k in range(num_ids):
            hit = tl.load(ids_ptr + (row * num_ids + k)) == first + column
            g += tl.where(hit, tl.load(grad_at_ids_ptr + (row * num_ids + k)), 0.0)
            if TAIL:
                hits += hit.to(tl.int32)
        if TAIL:
            tail_log, tail_grad = tl.load(scalars_ptr + 7 * n + row), tl.load(scalars_ptr + 8 * n + row)
            g += tl.where(hits > 0, 0.0, tail_grad * tl.exp(lq - tail_log))
    slope = scale / temperature
    if CAPPED:
        capped = z * temperature / softcap
        g *= 1 - capped * capped
    g = tl.where(z <= FLOOR, 0.0, g * slope)  # NaN stays
    tl.store(out_ptr + (row * size + column), round_to_storage(g, out_ptr), column < size)


@triton.jit
def round_to_storage(x, out_ptr):
    """x in the dtype that a pointer points to, rounded to nearest even."""
    if out_ptr.dtype.element_ty == tl.bfloat16:
        return to_bf16_bits(x).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(out_ptr.dtype.element_ty)


def both_half(a: Tensor, b: Tensor) -> bool:
    """Whether matrix units take both tensors as they are."""
    return a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32: of two half-precision tensors as matrix units accumulate it, else after conversion to fp32. (The
    libraries of AMD were not tried.)"""
    with torch.autocast(a.device.type, enabled=False):  # which would round the products
        if both_half(a, b) and a.is_cuda and torch.version.hip is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()


def chunk_products(side: Side, first: int, size: int) -> Tensor:
    """hidden @ weight.T of a chunk of the vocabulary, fp32 [num_tokens, size]."""
    return product(side[0], side[1].narrow(0, first, size).T)


def biases(student: Side, teacher: Side) -> list[Tensor | None]:
    return [side[2].contiguous() if len(side) > 2 else None for side in (student, teacher)]


def shape_scalars(student_params: Sequence[float], teacher_params: Sequence[float]) -> list[float]:
    """The kernels' arguments scale, softcap, teacher_scale, teacher_softcap, temperature."""
    student, teacher = LogitParams(*student_params), LogitParams(*teacher_params)
    return [student.scale, student.softcap, teacher.scale, teacher.softcap, student.temperature]


def cap_flags(student_params: Sequence[float], teacher_params: Sequence[float]) -> dict[str, bool]:
    student, teacher = LogitParams(*student_params), LogitParams(*teacher_params)
    return {"CAPPED": student.softcap != 0, "TEACHER_CAPPED": teacher.softcap != 0}


def columns_per_program(n: int) -> int:
    """Ids that a program processes at a time: a power of two, smaller for very many tokens."""
    fits = max(1, WORKSPACE_BYTES // (BYTES_AN_ID * max(n, 1)))
    return max(LEAST_COLUMNS, min(COLUMNS, 1 << fits.bit_length() - 1))


def chunks(vocab: int, *sides: Side) -> list[tuple[int, int]]:
    """First id and size of each chunk of the vocabulary: a multiple of the columns per program for which neither logits
    nor a part of a head in fp32 exceed the workspace; no chunk without tokens."""
    n, width = len(sides[0][0]), max(side[0].shape[1] for side in sides)
    columns, bytes_per_id = columns_per_program(n), max(BYTES_AN_ID * n, 4 * width, 1)
    size = max(1, WORKSPACE_BYTES // bytes_per_id // columns) * columns
    return [(first, min(size, vocab - first)) for first in range(0, vocab if n else 0, size)]


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
    """As the reference in tiles.py."""
    n, new_zeros = len(student[0]), student[0].new_zeros
    sums = new_zeros((MOMENTS.value, n), dtype=torch.float32)
    logits_at_ids = student[0].new_full((2, *ids.shape), float("nan"), dtype=torch.float32)
    sums.select(0, 0).fill_(FLOOR.value)
    sums.select(0, 2).fill_(FLOOR.value)
    argmax_ids = new_zeros((2, n if with_argmax else 0), dtype=torch.int64)
    bias, tails = biases(student, teacher), sums.new_full((2, n if tail_k else 0), float("-inf"))
    params = LogitParams(*student_params), LogitParams(*teacher_params)
    for first, size in chunks(vocab, student, teacher):
        products = chunk_products(student, first, size), chunk_products(teacher, first, size)
        launch.run(
            scan,
            (n,),
            *products,
            *bias,
            sums,
            argmax_ids,
            n,
            vocab,
            first,
            size,
            *shape_scalars(*params),
            num_warps=WARPS,
            **cap_flags(*params),
            EVEN=size % 16 == 0,
            ARGMAX=with_argmax,
            COLUMNS=columns_per_program(n),
        )
        if ids.shape[1]:
            in_chunk, columns = plain.local_ids(ids, slice(first, first + size))
            for k, (x, side_bias) in enumerate(zip(products, bias, strict=True)):
                chunk_bias = None if side_bias is None else side_bias.narrow(0, first, size)
                bias_at_ids = None if chunk_bias is None else chunk_bias.take(columns)
                at_ids = plain.shape_logits(x.gather(1, columns), bias_at_ids, params[k])
                logits_at_ids.select(0, k).copy_(torch.where(in_chunk, at_ids, logits_at_ids.select(0, k)))
                if tail_k:
                    others = plain.mask_ids(
                        plain.shape_logits(x, chunk_bias, params[k]),
                        in_chunk.narrow(1, 0, tail_k),
                        columns.narrow(1, 0, tail_k),
                    )
                    tails.select(0, k).copy_(torch.logaddexp(tails.select(0, k), others.logsumexp(1)))
    return sums, logits_at_ids, tails, argmax_ids


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
    """As the reference in tiles.py."""
    n = moments.shape[1]
    out = moments.new_zeros(3, n)
    if kind == JSD.value:
        shift = mixture_shift(moments, beta)
        out.select(0, 0).copy_((1 - beta) * shift)
        out.select(0, 1).copy_(shift)
    for first, size in chunks(vocab, student, teacher):
        launch.run(
            means,
            (n,),
            chunk_products(student, first, size),
            chunk_products(teacher, first, size),
            *biases(student, teacher),
            moments.contiguous(),
            out,
            n,
            first,
            size,
            beta,
            *shape_scalars(student_params, teacher_params),
            num_warps=WARPS,
            KIND=kind,
            **cap_flags(student_params, teacher_params),
            EVEN=size % 16 == 0,
            COLUMNS=columns_per_program(n),
        )
    return out


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
    """As the reference in tiles.py."""
    hidden, weight = student[:2]
    bias = student[2] if len(student) > 2 else hidden
    params = student_params, teacher_params
    hidden_grad = hidden.new_zeros(hidden.shape if needs_grad[0] else 0, dtype=torch.float32)
    weight_grad = weight.new_zeros(weight.shape if needs_grad[1] else 0)
    bias_grad = bias.new_zeros(len(weight) if needs_grad[2] else 0)
    for first, size in chunks(vocab, student, teacher):
        g = chunk_gradient(student, teacher, scalars, ids, grad_at_ids, first, size, *params, beta, kind)
        if needs_grad[0]:
            hidden_grad.add_(product(g, weight.narrow(0, first, size)))
        if needs_grad[1]:
            weight_grad.narrow(0, first, size).copy_(product(g.T, hidden))
        if needs_grad[2]:
            bias_grad.narrow(0, first, size).copy_(g.sum(0, dtype=torch.float32))
    return hidden_grad.to(hidden.dtype), weight_grad, bias_grad


def chunk_gradient(
    student: Side,
    teacher: Side,
    scalars: Tensor,
    ids: Tensor,
    grad_at_ids: Tensor,
    first: int,
    size: int,
    student_params: Sequence[float],
    teacher_params: Sequence[float],
    beta: float,
    kind: int,
) -> Tensor:
    """Gradient of hidden @ weight.T + bias over a chunk, [num_tokens, size]: bf16 if both are bf16, else fp32."""
    hidden, weight = student[:2]
    n, bf16 = len(hidden), hidden.dtype == weight.dtype == torch.bfloat16
    out = hidden.new_empty((n, size), dtype=torch.bfloat16 if bf16 else torch.float32)
    student_products = chunk_products(student, first, size)
    teacher_products = student_products if kind == AT_IDS.value else chunk_products(teacher, first, size)
    columns = columns_per_program(n)
    launch.run(
        gradient,
        (n, triton.cdiv(size, columns)),
        student_products,
        teacher_products,
        *biases(student, teacher),
        scalars.contiguous(),
        ids.contiguous(),
        grad_at_ids.contiguous(),
        out,
        n,
        first,
        size,
        ids.shape[1],
        beta,
        *shape_scalars(student_params, teacher_params),
        num_warps=WARPS,
        KIND=kind,
        **cap_flags(student_params, teacher_params),
        EVEN=size % 16 == 0,
        IDS=ids.shape[1] > 0,
        TAIL=len(scalars) > 7,
        COLUMNS=columns,
    )
    return out


def divergence_top(side: Side, vocab: int, k: int, params: Sequence[float]) -> Tensor:
    """As the reference in tiles.py; by the logits before softcap and temperature, which keep their order."""
    n, scale = len(side[0]), LogitParams(*params).scale
    values = side[0].new_empty((n, 0), dtype=torch.float32)
    ids = side[0].new_empty((n, 0 if n else k), dtype=torch.int64)
    for first, size in chunks(vocab, side):
        x = chunk_products(side, first, size)
        if len(side) > 2:
            x += side[2].narrow(0, first, size)
        top = x.mul_(scale).topk(min(k, size), 1)
        values, ids = torch.cat([values, top.values], 1), torch.cat([ids, top.indices + first], 1)
        values, order = values.topk(min(k, values.shape[1]), 1)
        ids = ids.gather(1, order)
    return ids
