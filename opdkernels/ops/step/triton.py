"""`step` in Triton: one launch steps the active coordinates of all tensors of one kind, through a table of their addresses.

A program takes tiles of coordinates, or of places, in turn, and goes along the table as it does: the tiles of a tensor follow
those of the one before. Of a bitmask, a lane is a coordinate; the bits before it in its block of 2,048 say where its moments are.
Lanes without a bit read and write nothing, so a lane loads one coordinate at a time, beside its neighbours'. Tensors are of one
kind where their dtypes, their masks' form and what goes with them are alike; a model has one or two kinds.

Nothing comes back to the host: how many coordinates are active, `found_inf`, `grad_scale` and `clip` are read on the device.

Rounding. Quotients and square roots are rounded right, sums and products are fused where the reference says so and nowhere else.
The arithmetic of a coordinate is that of csrc/step/step.h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from opdkernels.backends import gpu
from opdkernels.backends.triton import launch
from opdkernels.backends.triton.numeric import bits_of, bits_set, from_bf16_bits, to_bf16_bits, widen
from opdkernels.ops.step.gpu_common import StepKind, step_rows, step_size

TILE, WARPS, REGISTERS = 512, 4, 128  # four coordinates a thread, four programs a multiprocessor
BLOCK = tl.constexpr(2048)  # coordinates between the counts that go with a bitmask

# Columns of the table, int64 [tensors, 16]. FIRST and SECOND are the moments, of SGD the momentum buffer; SIZE is how many
# coordinates, or places; BEGIN and END are the tensor's tiles among all.
PARAM, GRAD, MASK, OFFSETS, FIRST, SECOND, MOST, EXTRA = (tl.constexpr(x) for x in range(8))
INIT, COHORT, ROW, START, ORDINAL, SIZE, BEGIN, END, COLUMNS = (tl.constexpr(x) for x in range(8, 17))

# Columns of the scalars, as opdkernels/ops/step/__init__.py lays them out: those of AdamW, then those of SGD that have other names.
DECAY, WEIGHT, BETA2, SQUARE, BIAS, EPS, SIZE_OF_STEP, STEP, SCALARS = (tl.constexpr(x) for x in range(9))
MOMENTUM, DAMP, FRESH = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
NEAREST, EXACT, KAHAN, STOCHASTIC = (tl.constexpr(x) for x in range(4))

ELEMENTS = {torch.uint8: tl.uint8, torch.int32: tl.int32, torch.int64: tl.int64}


@triton.jit
def data_of(tensor, COLUMN: tl.constexpr, ELEMENT: tl.constexpr):
    return tl.load(tensor + COLUMN).to(tl.pointer_type(ELEMENT))


@triton.jit
def load_wide(tensor, COLUMN: tl.constexpr, base, at, active, BF16: tl.constexpr):
    """fp32 of fp32 or bf16 values."""
    if BF16:
        return from_bf16_bits(tl.load(data_of(tensor, COLUMN, tl.uint16) + base + at, active, 0))
    return tl.load(data_of(tensor, COLUMN, tl.float32) + base + at, active, 0.0)


@triton.jit
def widen_weights(stored, extra, PRECISION: tl.constexpr):
    """fp32 of bf16 weights, and of what they lack: patterns."""
    if PRECISION == EXACT:
        upper, low = stored.to(tl.int32), extra.to(tl.int32)
        low = tl.where(((upper & 0x7FFF) == 0) & (low >= 0x8000), 0, low)  # a weight that someone else set to zero
        return from_bf16_bits((upper - (low >> 15)) & 0xFFFF).to(tl.int32, bitcast=True) | low
    if PRECISION == KAHAN:
        return bits_of(from_bf16_bits(stored) + from_bf16_bits(extra))
    return bits_of(from_bf16_bits(stored))


@triton.jit
def adamw(p, g, w0, m, v, most, scalars, INIT: tl.constexpr, AMSGRAD: tl.constexpr):
    """New weights and moments, and the largest second moments so far."""
    decay, weight = tl.load(scalars + DECAY), tl.load(scalars + WEIGHT)
    if INIT:
        p = tl.fma(decay, p - w0, w0)
    else:
        p = p * decay
    near = weight < 0.5
    m = tl.fma(tl.where(near, weight, weight - 1.0), g - m, tl.where(near, m, g))
    v = tl.fma(tl.load(scalars + SQUARE) * g, g, v * tl.load(scalars + BETA2))
    second = v
    if AMSGRAD:
        most = tl.maximum(most, v, propagate_nan=tl.PropagateNan.ALL)
        second = most
    root = tl.div_rn(tl.sqrt_rn(second), tl.load(scalars + BIAS)) + tl.load(scalars + EPS)
    return p + tl.div_rn(tl.load(scalars + SIZE_OF_STEP) * m, root), m, v, most


@triton.jit
def sgd(p, g, w0, buffer, scalars, INIT: tl.constexpr, WITH_BUFFER: tl.constexpr, NESTEROV: tl.constexpr):
    """New weights, and the momentum buffer."""
    decay, momentum = tl.load(scalars + DECAY), tl.load(scalars + MOMENTUM)
    if INIT:
        pull = p - w0
    else:
        pull = p
    g = tl.where(decay != 0, tl.fma(decay, pull, g), g)
    if WITH_BUFFER:
        buffer = tl.where(tl.load(scalars + FRESH) != 0, g, tl.fma(tl.load(scalars + DAMP), g, buffer * momentum))
        if NESTEROV:
            g = tl.fma(momentum, buffer, g)
        else:
            g = buffer
    return tl.fma(tl.load(scalars + SIZE_OF_STEP), g, p), buffer


@triton.jit
def store_weights(
    tensor, new, base, at, slots, slot, active, step, seed, PARAM_BF16: tl.constexpr, PRECISION: tl.constexpr
):
    """Puts weights back where they belong; what a bf16 weight lacks goes to its slot."""
    if PARAM_BF16:
        param, extra = data_of(tensor, PARAM, tl.uint16) + base, data_of(tensor, EXTRA, tl.uint16) + slots
        pattern, bits = to_bf16_bits(new), new.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        if PRECISION == EXACT:  # to nearest, ties away from zero, so that the remainder's sign says which way
            number = magnitude <= 0x7F800000
            pattern = tl.where(number, ((bits + 0x8000) >> 16).to(tl.int32), pattern)
            tl.store(extra + slot, tl.where(number, bits & 0xFFFF, 0).to(tl.uint16), active)
        elif PRECISION == KAHAN:
            tl.store(extra + slot, to_bf16_bits(new - from_bf16_bits(pattern)).to(tl.uint16), active)
        elif PRECISION == STOCHASTIC:
            place = tl.load(tensor + START) + base + at
            ordinal = tl.load(tensor + ORDINAL).to(tl.uint32)
            low, high = place.to(tl.uint32), (place >> 32).to(tl.uint32)
            random, _, _, _ = tl.philox(seed, low, high, ordinal, step)
            pattern = tl.where(magnitude < 0x7F800000, ((bits + (random & 0xFFFF)) >> 16).to(tl.int32), pattern)
        tl.store(param + at, pattern.to(tl.uint16), active)
    else:
        tl.store(data_of(tensor, PARAM, tl.float32) + base + at, new, active)


@triton.jit
def step_active(
    tensor,
    table,
    grad_scale,
    clip,
    base,
    at,
    slots,
    slot,
    active,
    seed,
    PARAM_BF16: tl.constexpr,
    GRAD_BF16: tl.constexpr,
    COMPACT: tl.constexpr,
    INITS: tl.constexpr,
    COHORTS: tl.constexpr,
    AMSGRAD: tl.constexpr,
    SGD: tl.constexpr,
    WITH_BUFFER: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Steps the active of the coordinates base + at, whose moments are at slots + slot."""
    if COMPACT:
        g = load_wide(tensor, GRAD, slots, slot, active, False)
    else:
        g = load_wide(tensor, GRAD, base, at, active, GRAD_BF16)
    if grad_scale is not None:
        g = tl.div_rn(g, tl.load(grad_scale))
    if clip is not None:
        g = g * tl.load(clip)
    if MAXIMIZE:
        g = -g

    if PARAM_BF16:
        stored = tl.load(data_of(tensor, PARAM, tl.uint16) + base + at, active, 0)
        lacking = stored
        if (PRECISION == EXACT) | (PRECISION == KAHAN):
            lacking = tl.load(data_of(tensor, EXTRA, tl.uint16) + slots + slot, active, 0)
        p = widen_weights(stored, lacking, PRECISION).to(tl.float32, bitcast=True)
    else:
        p = load_wide(tensor, PARAM, base, at, active, False)
    w0 = p
    if INITS:
        w0 = load_wide(tensor, INIT, slots, slot, active, PARAM_BF16)
    scalars = table + tl.load(tensor + ROW) * SCALARS
    step = tl.load(scalars + STEP).to(tl.int32).to(tl.uint32)
    if COHORTS:
        scalars += tl.load(data_of(tensor, COHORT, tl.uint8) + slots + slot, active, 0).to(tl.int32) * SCALARS

    if SGD:
        buffer = p
        if WITH_BUFFER:
            first = data_of(tensor, FIRST, tl.float32) + slots
            buffer = tl.load(first + slot, active, 0.0)
        p, buffer = sgd(p, g, w0, buffer, scalars, INITS, WITH_BUFFER, NESTEROV)
        if WITH_BUFFER:
            tl.store(first + slot, buffer, active)
    else:
        first, second = data_of(tensor, FIRST, tl.float32) + slots, data_of(tensor, SECOND, tl.float32) + slots
        m, v = tl.load(first + slot, active, 0.0), tl.load(second + slot, active, 0.0)
        most = v
        if AMSGRAD:
            most = load_wide(tensor, MOST, slots, slot, active, False)
        p, m, v, most = adamw(p, g, w0, m, v, most, scalars, INITS, AMSGRAD)
        tl.store(first + slot, m, active)
        tl.store(second + slot, v, active)
        if AMSGRAD:
            tl.store(data_of(tensor, MOST, tl.float32) + slots + slot, most, active)
    store_weights(tensor, p, base, at, slots, slot, active, step, seed, PARAM_BF16, PRECISION)


@triton.jit
def count_before(bits, base, TILE: tl.constexpr):
    """Bits of the block of a tile that lie before the tile."""
    block = base // BLOCK * BLOCK
    byte = tl.arange(0, BLOCK // 8)
    return tl.sum(bits_set(tl.load(bits + block // 8 + byte, byte < (base - block) // 8, 0).to(tl.int32)))


@triton.jit
def some_active(mask, offsets, base):
    """Whether anything of a tile's block is active; places are."""
    if mask.dtype.element_ty == tl.uint8:
        return tl.load(offsets + base // BLOCK + 1) > tl.load(offsets + base // BLOCK)
    return True


@triton.jit
def active_of(mask, offsets, base, size, TILE: tl.constexpr):
    """Of a tile's lanes: where coordinates begin, and each lane's; where their moments begin, and each lane's; which lanes count."""
    lane = tl.arange(0, TILE)
    inside = lane < size - base
    if mask.dtype.element_ty == tl.uint8:
        bit = (tl.load(mask + base // 8 + lane // 8, inside, 0).to(tl.int32) >> (lane & 7)) & 1
        slots = tl.load(offsets + base // BLOCK) + count_before(mask, base, TILE)
        return base, lane, slots, tl.cumsum(bit) - bit, bit > 0
    return base * 0, tl.load(mask + base + lane, inside, 0).to(tl.int64), base, lane, inside


@triton.jit(do_not_specialize=["tiles", "seed"])
def step(
    tensors,
    table,
    grad_scale,
    clip,
    found_inf,
    tiles,
    seed,
    TILE: tl.constexpr,
    MASKS: tl.constexpr,
    PARAM_BF16: tl.constexpr,
    GRAD_BF16: tl.constexpr,
    COMPACT: tl.constexpr,
    INITS: tl.constexpr,
    COHORTS: tl.constexpr,
    AMSGRAD: tl.constexpr,
    SGD: tl.constexpr,
    WITH_BUFFER: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """tensors: int64 [tensors, 16], as above; table: fp32 [steps, 8], the scalars. MASKS: of bits, or the integers that places are."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    seed = seed.to(tl.int64)
    if found_inf is not None:
        tiles = tl.where(tl.load(found_inf) == 0, tiles, 0)
    tensor = tensors
    for tile in range(program, tiles, programs):
        while tile >= tl.load(tensor + END):
            tensor += COLUMNS
        base = (tile - tl.load(tensor + BEGIN)) * TILE
        mask, offsets = data_of(tensor, MASK, MASKS), data_of(tensor, OFFSETS, tl.int64)
        if some_active(mask, offsets, base):
            first, at, slots, slot, active = active_of(mask, offsets, base, tl.load(tensor + SIZE), TILE)
            step_active(
                tensor,
                table,
                grad_scale,
                clip,
                first,
                at,
                slots,
                slot,
                active,
                seed,
                PARAM_BF16,
                GRAD_BF16,
                COMPACT,
                INITS,
                COHORTS,
                AMSGRAD,
                SGD,
                WITH_BUFFER,
                NESTEROV,
                MAXIMIZE,
                PRECISION,
            )


@triton.jit(do_not_specialize=["size"])
def take(values, mask, offsets, into, size, ADD: tl.constexpr, TILE: tl.constexpr):
    """The active of `values`, added to or in place of what `into` holds. Programs take tiles in turn."""
    size, step = size.to(tl.int64), tl.num_programs(0).to(tl.int64) * TILE
    for base in range(tl.program_id(0).to(tl.int64) * TILE, size, step):
        if some_active(mask, offsets, base):
            first, at, slots, slot, active = active_of(mask, offsets, base, size, TILE)
            taken = widen(tl.load(values + first + at, active, 0.0), tl.float32)
            if ADD:
                taken = tl.load(into + slots + slot, active, 0.0) + taken
            tl.store(into + slots + slot, taken, active)


@triton.jit(do_not_specialize=["size"])
def put(values, mask, offsets, compact, size, TILE: tl.constexpr):
    """The active of `values` set to `compact`, rounded to nearest. Programs take tiles in turn."""
    size, step = size.to(tl.int64), tl.num_programs(0).to(tl.int64) * TILE
    for base in range(tl.program_id(0).to(tl.int64) * TILE, size, step):
        if some_active(mask, offsets, base):
            first, at, slots, slot, active = active_of(mask, offsets, base, size, TILE)
            new = tl.load(compact + slots + slot, active, 0.0)
            if values.dtype.element_ty == tl.bfloat16:
                tl.store(values + first + at, to_bf16_bits(new).to(tl.uint16).to(tl.bfloat16, bitcast=True), active)
            else:
                tl.store(values + first + at, new, active)


def launch_kinds(
    params,
    grads,
    masks,
    offsets,
    moments,
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
    *,
    is_sgd,
    nesterov,
) -> None:
    """Starts a launch for each kind of tensors; `moments` are up to three lists, in the order of the table."""
    kinds: dict[StepKind, list[list[int]]] = {}
    for kind, row in step_rows(params, grads, masks, offsets, moments, extras, inits, cohorts, rows, starts, ordinals):
        before = kinds.setdefault(kind, [])
        begin = before[-1][END.value] if before else 0
        before.append([*row, begin, begin + triton.cdiv(row[SIZE.value], TILE)])
    for kind, table in kinds.items():
        device, tiles = params[0].device, table[-1][END.value]
        launch.run(
            step,
            (launch.num_programs(device, tiles),),
            gpu.on_device(table, device),
            scalars.to(device, non_blocking=True).contiguous(),
            grad_scale,
            clip,
            found_inf,
            tiles,
            seed,
            MASKS=ELEMENTS[kind.masks],
            PARAM_BF16=kind.param_bf16,
            GRAD_BF16=kind.grad_bf16,
            COMPACT=kind.compact,
            INITS=kind.inits,
            COHORTS=kind.cohorts,
            AMSGRAD=len(moments) == 3,
            SGD=is_sgd,
            WITH_BUFFER=len(moments) == 1,
            NESTEROV=nesterov,
            MAXIMIZE=maximize,
            PRECISION=precision,
            num_warps=WARPS,
            maxnreg=REGISTERS,
            TILE=TILE,
        )


def masked_adamw_(
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
    """The operator, for contiguous tensors of one device."""
    moments = [exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if max_exp_avg_sqs else [])]
    launch_kinds(
        params,
        grads,
        masks,
        offsets,
        moments,
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
        is_sgd=False,
        nesterov=False,
    )


def masked_sgd_(
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
    """The operator, for contiguous tensors of one device."""
    launch_kinds(
        params,
        grads,
        masks,
        offsets,
        [momentum_buffers] if momentum_buffers else [],
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
        is_sgd=True,
        nesterov=nesterov,
    )


def masked_gather_(
    values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, into: torch.Tensor, add: bool
) -> None:
    """The operator, for contiguous tensors of one device."""
    size = step_size(values, mask)
    if size:
        launch.run(
            take,
            (launch.num_programs(values.device, triton.cdiv(size, TILE)),),
            values,
            mask,
            offsets,
            into,
            size,
            num_warps=WARPS,
            ADD=add,
            TILE=TILE,
        )


def masked_scatter_(values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, compact: torch.Tensor) -> None:
    """The operator, for contiguous tensors of one device."""
    size = step_size(values, mask)
    if size:
        launch.run(
            put,
            (launch.num_programs(values.device, triton.cdiv(size, TILE)),),
            values,
            mask,
            offsets,
            compact,
            size,
            num_warps=WARPS,
            TILE=TILE,
        )
