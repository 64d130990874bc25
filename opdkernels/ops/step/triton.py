"""`step` in Triton: one launch for all tensors with equal flags, through a table of addresses.

Programs take tiles of coordinates or indices in turn and advance along the table as they do: the tiles of a tensor
follow those of the one before. For a bitmap, a lane is a coordinate; the bits before it in its block of 2,048 give the
position of its moments. Lanes without a bit read and write nothing; a lane loads one coordinate at a time, next to
those of its neighbours. Tensors have equal flags where their dtypes, the layout of their masks and their optional
values agree; a model has one or two such groups.

Nothing is copied back to the host: the number of active coordinates, `found_inf`, `grad_scale` and `clip` are read on
the device.

Rounding: quotients and square roots are correctly rounded; products and sums are fused where the reference fuses them
and nowhere else. The arithmetic of a coordinate is that of csrc/step/step.h.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from opdkernels.backends import gpu
from opdkernels.backends.triton import launch
from opdkernels.backends.triton.numeric import bits_of, bits_set, from_bf16_bits, to_bf16_bits, widen
from opdkernels.ops.step import layout
from opdkernels.ops.step.args import StepArgs, adamw_operator, sgd_operator
from opdkernels.ops.step.layout import STEP_ROW
from opdkernels.ops.step.rows import step_rows, step_size, with_tiles

TILE, NUM_WARPS, MAXNREG = 512, 4, 128  # four coordinates per thread, four programs per multiprocessor
BLOCK = tl.constexpr(layout.BLOCK)


def column(field: str) -> tl.constexpr:
    """Column of a field where a row is read as int64 [COLUMNS]; param_id is the low half of its column."""
    return tl.constexpr(dict(STEP_ROW.fields or {})[field][1] // 8)


# Columns of a row.
COLUMNS = tl.constexpr(STEP_ROW.itemsize // 8)
PARAM, GRAD, MASK, BLOCK_COUNTS = column("param"), column("grad"), column("mask"), column("block_counts")
EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ = column("exp_avg"), column("exp_avg_sq"), column("max_exp_avg_sq")
RESIDUAL, INIT_VALUE, STEP_GROUP = column("residual"), column("init_value"), column("step_group")
SCALAR_ROW, SHARD_OFFSET, SIZE, PARAM_ID = (
    column("scalar_row"),
    column("shard_offset"),
    column("size"),
    column("param_id"),
)
CHANGED, FIRST_TILE, END_TILE = column("changed"), column("first_tile"), column("end_tile")

# Columns of the scalars.
NUM_SCALARS = tl.constexpr(layout.NUM_SCALARS)
DECAY_FACTOR, ONE_MINUS_BETA1 = tl.constexpr(layout.DECAY_FACTOR), tl.constexpr(layout.ONE_MINUS_BETA1)
BETA2, ONE_MINUS_BETA2 = tl.constexpr(layout.BETA2), tl.constexpr(layout.ONE_MINUS_BETA2)
BIAS_CORRECTION2_SQRT, EPS = tl.constexpr(layout.BIAS_CORRECTION2_SQRT), tl.constexpr(layout.EPS)
NEG_STEP_SIZE, STEP = tl.constexpr(layout.NEG_STEP_SIZE), tl.constexpr(layout.STEP)
WEIGHT_DECAY, MOMENTUM = tl.constexpr(layout.WEIGHT_DECAY), tl.constexpr(layout.MOMENTUM)
ONE_MINUS_DAMPENING, IS_FIRST = tl.constexpr(layout.ONE_MINUS_DAMPENING), tl.constexpr(layout.IS_FIRST)

SPLIT_MASTER, KAHAN, STOCHASTIC = (
    tl.constexpr(layout.PRECISIONS.index(name)) for name in ("split_master", "kahan", "stochastic")
)


@triton.jit
def array_ptr(row_ptr, COLUMN: tl.constexpr, ELEMENT: tl.constexpr):
    """The address in a column of a row, as a pointer to elements of a type."""
    return tl.load(row_ptr + COLUMN).to(tl.pointer_type(ELEMENT))


@triton.jit
def load_fp32(row_ptr, COLUMN: tl.constexpr, base, at, active, BF16: tl.constexpr):
    """Elements base + at of an fp32 or bf16 array, as fp32."""
    if BF16:
        return from_bf16_bits(tl.load(array_ptr(row_ptr, COLUMN, tl.uint16) + base + at, active, 0))
    else:
        return tl.load(array_ptr(row_ptr, COLUMN, tl.float32) + base + at, active, 0.0)


@triton.jit
def to_fp32_bits(stored, residual, PRECISION: tl.constexpr):
    """The bits of the fp32 values of bf16 weights and their residuals, both as 16-bit patterns."""
    if PRECISION == SPLIT_MASTER:
        upper, low = stored.to(tl.int32), residual.to(tl.int32)
        low = tl.where(
            ((upper & 0x7FFF) == 0) & (low >= 0x8000), 0, low
        )  # a weight that was set to zero outside of a step
        return from_bf16_bits((upper - (low >> 15)) & 0xFFFF).to(tl.int32, bitcast=True) | low
    elif PRECISION == KAHAN:
        return bits_of(from_bf16_bits(stored) + from_bf16_bits(residual))
    else:
        return bits_of(from_bf16_bits(stored))


@triton.jit
def adamw(p, g, w0, m, v, v_max, scalars_ptr, HAS_INIT_VALUE: tl.constexpr, AMSGRAD: tl.constexpr):
    """New weights and moments, and the largest second moments so far. scalars_ptr: a row, per lane or for all."""
    decay_factor, one_minus_beta1 = tl.load(scalars_ptr + DECAY_FACTOR), tl.load(scalars_ptr + ONE_MINUS_BETA1)
    if HAS_INIT_VALUE:
        p = tl.fma(decay_factor, p - w0, w0)
    else:
        p = p * decay_factor
    below_half = one_minus_beta1 < 0.5
    m = tl.fma(tl.where(below_half, one_minus_beta1, one_minus_beta1 - 1.0), g - m, tl.where(below_half, m, g))
    v = tl.fma(tl.load(scalars_ptr + ONE_MINUS_BETA2) * g, g, v * tl.load(scalars_ptr + BETA2))
    second = v
    if AMSGRAD:
        v_max = tl.maximum(v_max, v, propagate_nan=tl.PropagateNan.ALL)
        second = v_max
    root = tl.div_rn(tl.sqrt_rn(second), tl.load(scalars_ptr + BIAS_CORRECTION2_SQRT))
    denominator = root + tl.load(scalars_ptr + EPS)
    return p + tl.div_rn(tl.load(scalars_ptr + NEG_STEP_SIZE) * m, denominator), m, v, v_max


@triton.jit
def sgd(
    p,
    g,
    w0,
    buffer,
    scalars_ptr,
    HAS_INIT_VALUE: tl.constexpr,
    WITH_BUFFER: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    """New weights, and the momentum buffer."""
    weight_decay, momentum = tl.load(scalars_ptr + WEIGHT_DECAY), tl.load(scalars_ptr + MOMENTUM)
    if HAS_INIT_VALUE:
        pull = p - w0
    else:
        pull = p
    g = tl.where(weight_decay != 0, tl.fma(weight_decay, pull, g), g)
    if WITH_BUFFER:
        damped = tl.fma(tl.load(scalars_ptr + ONE_MINUS_DAMPENING), g, buffer * momentum)
        buffer = tl.where(tl.load(scalars_ptr + IS_FIRST) != 0, g, damped)
        if NESTEROV:
            g = tl.fma(momentum, buffer, g)
        else:
            g = buffer
    return tl.fma(tl.load(scalars_ptr + NEG_STEP_SIZE), g, p), buffer


@triton.jit
def store_weights(
    row_ptr, new, base, at, slots, slot, active, step, seed, PARAM_BF16: tl.constexpr, PRECISION: tl.constexpr
):
    """Store weights rounded to their dtype, and the residuals of bf16 weights. Returns the bits of bf16 weights."""
    if PARAM_BF16:
        param_ptr = array_ptr(row_ptr, PARAM, tl.uint16) + base
        residual_ptr = array_ptr(row_ptr, RESIDUAL, tl.uint16) + slots
        bf16_bits, bits = to_bf16_bits(new), new.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        if PRECISION == SPLIT_MASTER:  # to nearest, ties away from zero: the top bit of the remainder says which way
            not_nan = magnitude <= 0x7F800000
            bf16_bits = tl.where(not_nan, ((bits + 0x8000) >> 16).to(tl.int32), bf16_bits)
            tl.store(residual_ptr + slot, tl.where(not_nan, bits & 0xFFFF, 0).to(tl.uint16), active)
        elif PRECISION == KAHAN:
            tl.store(residual_ptr + slot, to_bf16_bits(new - from_bf16_bits(bf16_bits)).to(tl.uint16), active)
        elif PRECISION == STOCHASTIC:
            index = tl.load(row_ptr + SHARD_OFFSET) + base + at
            param_id = tl.load(row_ptr + PARAM_ID).to(tl.uint32)  # the low half of the column
            low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
            random, _, _, _ = tl.philox(seed, low, high, param_id, step)
            bf16_bits = tl.where(magnitude < 0x7F800000, ((bits + (random & 0xFFFF)) >> 16).to(tl.int32), bf16_bits)
        bf16_bits = bf16_bits & 0xFFFF
        tl.store(param_ptr + at, bf16_bits.to(tl.uint16), active)
        return bf16_bits
    else:
        tl.store(array_ptr(row_ptr, PARAM, tl.float32) + base + at, new, active)
        return to_bf16_bits(new)


@triton.jit
def step_active(
    row_ptr,
    scalars_ptr,
    grad_scale_ptr,
    clip_ptr,
    base,
    at,
    slots,
    slot,
    active,
    seed,
    PARAM_BF16: tl.constexpr,
    GRAD_BF16: tl.constexpr,
    GRAD_COMPACT: tl.constexpr,
    HAS_INIT_VALUE: tl.constexpr,
    HAS_STEP_GROUP: tl.constexpr,
    AMSGRAD: tl.constexpr,
    SGD: tl.constexpr,
    WITH_BUFFER: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Update the active of the coordinates base + at; their elements in compact arrays are slots + slot.

    Returns which lanes changed a bf16 value.
    """
    if GRAD_COMPACT:
        g = load_fp32(row_ptr, GRAD, slots, slot, active, False)
    else:
        g = load_fp32(row_ptr, GRAD, base, at, active, GRAD_BF16)
    if grad_scale_ptr is not None:
        g = tl.div_rn(g, tl.load(grad_scale_ptr))
    if clip_ptr is not None:
        g = g * tl.load(clip_ptr)
    if MAXIMIZE:
        g = -g

    if PARAM_BF16:
        stored = tl.load(array_ptr(row_ptr, PARAM, tl.uint16) + base + at, active, 0)
        residual = stored
        if (PRECISION == SPLIT_MASTER) | (PRECISION == KAHAN):
            residual = tl.load(array_ptr(row_ptr, RESIDUAL, tl.uint16) + slots + slot, active, 0)
        p = to_fp32_bits(stored, residual, PRECISION).to(tl.float32, bitcast=True)
        before = stored.to(tl.int32)
    else:
        p = load_fp32(row_ptr, PARAM, base, at, active, False)
        before = to_bf16_bits(p)
    w0 = p
    if HAS_INIT_VALUE:
        w0 = load_fp32(row_ptr, INIT_VALUE, slots, slot, active, PARAM_BF16)
    scalars_ptr += tl.load(row_ptr + SCALAR_ROW) * NUM_SCALARS
    step = tl.load(scalars_ptr + STEP).to(tl.int32).to(tl.uint32)
    if HAS_STEP_GROUP:
        scalars_ptr += (
            tl.load(array_ptr(row_ptr, STEP_GROUP, tl.uint8) + slots + slot, active, 0).to(tl.int32) * NUM_SCALARS
        )

    exp_avg_ptr = array_ptr(row_ptr, EXP_AVG, tl.float32) + slots
    if SGD:
        buffer = p
        if WITH_BUFFER:
            buffer = tl.load(exp_avg_ptr + slot, active, 0.0)
        p, buffer = sgd(p, g, w0, buffer, scalars_ptr, HAS_INIT_VALUE, WITH_BUFFER, NESTEROV)
        if WITH_BUFFER:
            tl.store(exp_avg_ptr + slot, buffer, active)
    else:
        exp_avg_sq_ptr = array_ptr(row_ptr, EXP_AVG_SQ, tl.float32) + slots
        m, v = tl.load(exp_avg_ptr + slot, active, 0.0), tl.load(exp_avg_sq_ptr + slot, active, 0.0)
        v_max = v
        if AMSGRAD:
            v_max = load_fp32(row_ptr, MAX_EXP_AVG_SQ, slots, slot, active, False)
        p, m, v, v_max = adamw(p, g, w0, m, v, v_max, scalars_ptr, HAS_INIT_VALUE, AMSGRAD)
        tl.store(exp_avg_ptr + slot, m, active)
        tl.store(exp_avg_sq_ptr + slot, v, active)
        if AMSGRAD:
            tl.store(array_ptr(row_ptr, MAX_EXP_AVG_SQ, tl.float32) + slots + slot, v_max, active)
    after = store_weights(row_ptr, p, base, at, slots, slot, active, step, seed, PARAM_BF16, PRECISION)
    return active & (before != after)


@triton.jit
def set_changed(changed_ptr, differs, TILE: tl.constexpr):
    """Set the bits of the lanes of a tile that differ. A tile has whole bytes."""
    bits = tl.reshape(differs.to(tl.int32) << (tl.arange(0, TILE) & 7), [TILE // 8, 8])
    byte = tl.sum(bits, 1)
    at = changed_ptr + tl.arange(0, TILE // 8)
    old = tl.load(at, byte > 0, 0).to(tl.int32)
    tl.store(at, (old | byte).to(tl.uint8), (byte & ~old) > 0)


@triton.jit
def count_before(bitmap_ptr, base, TILE: tl.constexpr):
    """Set bits of the block of a tile before the tile."""
    block = base // BLOCK * BLOCK
    byte = tl.arange(0, BLOCK // 8)
    return tl.sum(bits_set(tl.load(bitmap_ptr + block // 8 + byte, byte < (base - block) // 8, 0).to(tl.int32)))


@triton.jit
def any_active(mask_ptr, block_counts_ptr, base):
    """Whether any coordinate of a tile's block is active; always true for indices."""
    if mask_ptr.dtype.element_ty == tl.uint8:
        return tl.load(block_counts_ptr + base // BLOCK + 1) > tl.load(block_counts_ptr + base // BLOCK)
    else:
        return True


@triton.jit
def active_lanes(mask_ptr, block_counts_ptr, base, size, TILE: tl.constexpr):
    """The lanes of a tile: first coordinate, that of each lane relative to it; first element in compact arrays, that of
    each lane relative to it; which lanes are active."""
    lane = tl.arange(0, TILE)
    inside = lane < size - base
    if mask_ptr.dtype.element_ty == tl.uint8:
        bit = (tl.load(mask_ptr + base // 8 + lane // 8, inside, 0).to(tl.int32) >> (lane & 7)) & 1
        slots = tl.load(block_counts_ptr + base // BLOCK) + count_before(mask_ptr, base, TILE)
        return base, lane, slots, tl.cumsum(bit) - bit, bit > 0
    else:
        return base * 0, tl.load(mask_ptr + base + lane, inside, 0).to(tl.int64), base, lane, inside


@triton.jit(do_not_specialize=["tiles", "seed"])
def step(
    rows_ptr,  # int64 [tensors, COLUMNS]: STEP_ROW
    scalars_ptr,  # fp32 [scalar rows, NUM_SCALARS]
    grad_scale_ptr,  # fp32 [1], or None
    clip_ptr,  # fp32 [1], or None
    found_inf_ptr,  # fp32 [1], or None
    tiles,
    seed,
    TILE: tl.constexpr,
    MASK_ELEMENT: tl.constexpr,  # uint8 for bitmaps, else the integer type of the indices
    PARAM_BF16: tl.constexpr,
    GRAD_BF16: tl.constexpr,
    GRAD_COMPACT: tl.constexpr,
    HAS_INIT_VALUE: tl.constexpr,
    HAS_STEP_GROUP: tl.constexpr,
    AMSGRAD: tl.constexpr,
    SGD: tl.constexpr,
    WITH_BUFFER: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_CHANGED: tl.constexpr,
):
    """AdamW or SGD on the active coordinates of all tensors with equal flags."""
    program, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    seed = seed.to(tl.int64)
    if found_inf_ptr is not None:
        tiles = tl.where(tl.load(found_inf_ptr) == 0, tiles, 0)
    row_ptr = rows_ptr
    for tile in range(program, tiles, num_programs):
        while tile >= tl.load(row_ptr + END_TILE):
            row_ptr += COLUMNS
        base = (tile - tl.load(row_ptr + FIRST_TILE)) * TILE
        mask_ptr = array_ptr(row_ptr, MASK, MASK_ELEMENT)
        block_counts_ptr = array_ptr(row_ptr, BLOCK_COUNTS, tl.int64)
        if any_active(mask_ptr, block_counts_ptr, base):
            size = tl.load(row_ptr + SIZE)
            first, at, slots, slot, active = active_lanes(mask_ptr, block_counts_ptr, base, size, TILE)
            differs = step_active(
                row_ptr,
                scalars_ptr,
                grad_scale_ptr,
                clip_ptr,
                first,
                at,
                slots,
                slot,
                active,
                seed,
                PARAM_BF16,
                GRAD_BF16,
                GRAD_COMPACT,
                HAS_INIT_VALUE,
                HAS_STEP_GROUP,
                AMSGRAD,
                SGD,
                WITH_BUFFER,
                NESTEROV,
                MAXIMIZE,
                PRECISION,
            )
            if HAS_CHANGED:
                set_changed(array_ptr(row_ptr, CHANGED, tl.uint8) + base // 8, differs, TILE)


@triton.jit(do_not_specialize=["size"])
def gather(
    values_ptr,  # fp32 or bf16 [numel]
    mask_ptr,  # uint8 [ceil(numel / 8)], or int32 or int64 [num_active]
    block_counts_ptr,  # int64 [ceil(numel / BLOCK) + 1]
    out_ptr,  # fp32 [num_active]
    size,  # coordinates of a bitmap, or number of indices
    ADD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the active values to `out`, or add them to it. Programs take tiles in turn."""
    size, step = size.to(tl.int64), tl.num_programs(0).to(tl.int64) * TILE
    for base in range(tl.program_id(0).to(tl.int64) * TILE, size, step):
        if any_active(mask_ptr, block_counts_ptr, base):
            first, at, slots, slot, active = active_lanes(mask_ptr, block_counts_ptr, base, size, TILE)
            gathered = widen(tl.load(values_ptr + first + at, active, 0.0), tl.float32)
            if ADD:
                gathered = tl.load(out_ptr + slots + slot, active, 0.0) + gathered
            tl.store(out_ptr + slots + slot, gathered, active)


@triton.jit(do_not_specialize=["size"])
def scatter(
    values_ptr,  # fp32 or bf16 [numel]
    mask_ptr,  # uint8 [ceil(numel / 8)], or int32 or int64 [num_active]
    block_counts_ptr,  # int64 [ceil(numel / BLOCK) + 1]
    compact_ptr,  # fp32 [num_active]
    size,  # coordinates of a bitmap, or number of indices
    TILE: tl.constexpr,
):
    """Set the active values to `compact`, rounded to nearest. Programs take tiles in turn."""
    size, step = size.to(tl.int64), tl.num_programs(0).to(tl.int64) * TILE
    for base in range(tl.program_id(0).to(tl.int64) * TILE, size, step):
        if any_active(mask_ptr, block_counts_ptr, base):
            first, at, slots, slot, active = active_lanes(mask_ptr, block_counts_ptr, base, size, TILE)
            new = tl.load(compact_ptr + slots + slot, active, 0.0)
            if values_ptr.dtype.element_ty == tl.bfloat16:
                bf16_bits = to_bf16_bits(new).to(tl.uint16)
                tl.store(values_ptr + first + at, bf16_bits.to(tl.bfloat16, bitcast=True), active)
            else:
                tl.store(values_ptr + first + at, new, active)


def run(args: StepArgs, *, is_sgd: bool) -> None:
    """One launch for each group of tensors with equal flags."""
    rows = step_rows(args)
    for flags in dict.fromkeys(rows["flags"].tolist()):
        launch_group(args, with_tiles(rows[rows["flags"] == flags], TILE), flags, is_sgd)


def launch_group(args: StepArgs, rows: np.ndarray, flags: int, is_sgd: bool) -> None:
    """Launch the kernel on tensors with these flags."""
    device, tiles = args.params[0].device, int(rows["end_tile"][-1])
    index_type = tl.int64 if flags & layout.MASK_INDICES_64 else tl.int32
    launch.run(
        step,
        (launch.num_programs(device, tiles),),
        gpu.on_device(rows.view(np.int64).reshape(len(rows), -1).tolist(), device),
        args.scalars.to(device, non_blocking=True).contiguous(),
        args.grad_scale,
        args.clip,
        args.found_inf,
        tiles,
        args.seed,
        MASK_ELEMENT=index_type if flags & layout.MASK_INDICES else tl.uint8,
        PARAM_BF16=bool(flags & layout.PARAM_BF16),
        GRAD_BF16=bool(flags & layout.GRAD_BF16),
        GRAD_COMPACT=bool(flags & layout.GRAD_COMPACT),
        HAS_INIT_VALUE=bool(flags & layout.HAS_INIT_VALUE),
        HAS_STEP_GROUP=bool(flags & layout.HAS_STEP_GROUP),
        AMSGRAD=bool(flags & layout.HAS_MAX_EXP_AVG_SQ),
        SGD=is_sgd,
        WITH_BUFFER=bool(args.momentum_buffers),
        NESTEROV=args.nesterov,
        MAXIMIZE=args.maximize,
        PRECISION=args.precision,
        HAS_CHANGED=bool(flags & layout.HAS_CHANGED),
        num_warps=NUM_WARPS,
        maxnreg=MAXNREG,
        TILE=TILE,
    )


@adamw_operator
def masked_adamw_(args: StepArgs) -> None:
    """The operator, for contiguous tensors on one device."""
    run(args, is_sgd=False)


@sgd_operator
def masked_sgd_(args: StepArgs) -> None:
    """The operator, for contiguous tensors on one device."""
    run(args, is_sgd=True)


def masked_gather_(
    values: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor, out: torch.Tensor, add: bool
) -> None:
    """The operator, for contiguous tensors on one device."""
    size = step_size(values, mask)
    if size:
        grid = (launch.num_programs(values.device, triton.cdiv(size, TILE)),)
        launch.run(gather, grid, values, mask, block_counts, out, size, num_warps=NUM_WARPS, ADD=add, TILE=TILE)


def masked_scatter_(
    values: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor, compact: torch.Tensor
) -> None:
    """The operator, for contiguous tensors on one device."""
    size = step_size(values, mask)
    if size:
        grid = (launch.num_programs(values.device, triton.cdiv(size, TILE)),)
        launch.run(scatter, grid, values, mask, block_counts, compact, size, num_warps=NUM_WARPS, TILE=TILE)
