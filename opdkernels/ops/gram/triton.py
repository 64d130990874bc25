"""`gram` in Triton: rows are packed once, then multiplied on tensor cores: in fp64, or in bf16 where fp32 is asked for.

`pack` reads W and W' with any dtypes and strides and writes the operands of the products: W and delta in fp64, and in
bf16 pieces for the fp32 blocks, padded with zeros to full tiles.

Products in fp64 are the library's (torch.mm), of a symmetric matrix panel by panel: on an H200 Triton's own took 2.6
times as long as eager PyTorch's three matrices.

`multiply_blocks` computes W^T delta in fp32 blocks of rows. An fp32 number is the sum of three bf16 pieces of eight
bits, cut off one after the other; for bf16 data and for the visible view one piece is enough. Products of pieces are
exact in fp32, and those below 2^-24 of the full product are omitted: one, three or six bf16 products, each many times
faster than one in fp32. A block is summed in fp32, blocks in fp64.

Each tile of such a result belongs to one program per row split, and the splits are added in order: no atomics, so the
result is deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from opdkernels.backends.layout import INFINITY_BITS
from opdkernels.backends.triton import launch
from opdkernels.backends.triton.numeric import bf16_bits_of, bits_of, from_bf16_bits, multiple, widen
from opdkernels.ops.gram.layout import PART_BASE, PART_CROSS, PART_DELTA

INFINITY_BITS = tl.constexpr(INFINITY_BITS)
SIDE = 64  # of a tile of the result
DEPTH = 32  # rows per product
PANEL = 512  # columns of a symmetric matrix at a time; nothing below the diagonal panel is computed
PACK_LINES, PACK_LENGTH = 32, 64  # tile of `pack`
ROWS = 1 << 13  # packed at a time
SPLITS = 256  # programs that compute a result of few tiles: its rows are split among them


@triton.jit
def truncated(x):
    """bf16 bits of the upper half of fp32: eight significant bits; a NaN stays a NaN."""
    return tl.where(x == x, (bits_of(x) >> 16) & 0xFFFF, 0x7FC0)


@triton.jit
def store_pieces(pieces_ptr, at, stride, x, PIECES: tl.constexpr):
    """Stores x as bf16 pieces, the largest first; the remainder of a non-finite value is 0."""
    for piece in tl.static_range(PIECES):
        bits = truncated(x)
        tl.store(pieces_ptr + piece * stride + at, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True))
        x = tl.where((bits & INFINITY_BITS) == INFINITY_BITS, 0.0, x - from_bf16_bits(bits))


@triton.jit
def load_tile(data_ptr, line, column, line_stride, stride, inside, UNIT: tl.constexpr, FULL: tl.constexpr):
    """A tile of a strided matrix; 0 where not inside. UNIT: stride is 1. FULL: every element is inside."""
    offsets = line * line_stride + (column if UNIT else column * stride)
    if FULL:
        return tl.load(data_ptr + offsets)
    else:
        return tl.load(data_ptr + offsets, inside, 0.0)


@triton.jit
def pack_tile(
    base_ptr,
    trained_ptr,
    w64_ptr,
    d64_ptr,
    w16_ptr,
    d16_ptr,
    line_start,
    column_start,
    lines,
    length,
    base_line_stride,
    base_stride,
    trained_line_stride,
    trained_stride,
    pitch,
    plane,
    WIDE: tl.constexpr,
    VISIBLE: tl.constexpr,
    ACROSS: tl.constexpr,
    BASE_UNIT: tl.constexpr,
    TRAINED_UNIT: tl.constexpr,
    W_PIECES: tl.constexpr,
    D_PIECES: tl.constexpr,
    FULL: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Packs one tile; arguments as `pack`."""
    line = (line_start + tl.arange(0, LINES)).to(tl.int64)[:, None]
    column = (column_start + tl.arange(0, LENGTH)).to(tl.int64)[None, :]
    inside = (line < lines) & (column < length)
    a = load_tile(base_ptr, line, column, base_line_stride, base_stride, inside, BASE_UNIT, FULL)
    b = load_tile(trained_ptr, line, column, trained_line_stride, trained_stride, inside, TRAINED_UNIT, FULL)
    if VISIBLE:
        w = from_bf16_bits(bf16_bits_of(a))
        d = from_bf16_bits(bf16_bits_of(from_bf16_bits(bf16_bits_of(b)) - w))
    else:
        w = widen(a, WIDE)
        d = widen(b, WIDE) - w
    at = column * pitch + line if ACROSS else line * pitch + column
    if w64_ptr is not None:
        tl.store(w64_ptr + at, w.to(tl.float64))
    if d64_ptr is not None:
        tl.store(d64_ptr + at, d.to(tl.float64))
    if w16_ptr is not None:
        store_pieces(w16_ptr, at, plane, w, W_PIECES)
        store_pieces(d16_ptr, at, plane, d, D_PIECES)


@triton.jit(
    do_not_specialize=[
        "lines",
        "length",
        "base_line_stride",
        "base_stride",
        "trained_line_stride",
        "trained_stride",
        "pitch",
        "plane",
    ]
)
def pack(
    base_ptr,  # [lines, length] with strides base_line_stride and base_stride
    trained_ptr,  # [lines, length] with strides trained_line_stride and trained_stride
    w64_ptr,  # fp64 [rows, pitch] or None
    d64_ptr,  # fp64 [rows, pitch] or None
    w16_ptr,  # bf16 [W_PIECES, rows, pitch] or None; `plane` elements between pieces
    d16_ptr,  # bf16 [D_PIECES, rows, pitch] or None
    lines,
    length,
    base_line_stride,
    base_stride,
    trained_line_stride,
    trained_stride,
    pitch,
    plane,
    WIDE: tl.constexpr,
    VISIBLE: tl.constexpr,
    ACROSS: tl.constexpr,
    BASE_UNIT: tl.constexpr,
    TRAINED_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    W_PIECES: tl.constexpr,
    D_PIECES: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Packs W and delta. Lines are rows of the matrices or, with ACROSS, their columns: whichever are contiguous."""
    line_start, column_start = tl.program_id(0) * LINES, tl.program_id(1) * LENGTH
    pitch, plane = multiple(pitch, 64), multiple(plane, 64)
    if ALIGNED:
        base_line_stride, trained_line_stride = multiple(base_line_stride, 16), multiple(trained_line_stride, 16)
    if (line_start + LINES <= lines) & (column_start + LENGTH <= length):
        pack_tile(
            base_ptr,
            trained_ptr,
            w64_ptr,
            d64_ptr,
            w16_ptr,
            d16_ptr,
            line_start,
            column_start,
            lines,
            length,
            base_line_stride,
            base_stride,
            trained_line_stride,
            trained_stride,
            pitch,
            plane,
            WIDE,
            VISIBLE,
            ACROSS,
            BASE_UNIT,
            TRAINED_UNIT,
            W_PIECES,
            D_PIECES,
            True,
            LINES,
            LENGTH,
        )
    else:
        pack_tile(
            base_ptr,
            trained_ptr,
            w64_ptr,
            d64_ptr,
            w16_ptr,
            d16_ptr,
            line_start,
            column_start,
            lines,
            length,
            base_line_stride,
            base_stride,
            trained_line_stride,
            trained_stride,
            pitch,
            plane,
            WIDE,
            VISIBLE,
            ACROSS,
            BASE_UNIT,
            TRAINED_UNIT,
            W_PIECES,
            D_PIECES,
            False,
            LINES,
            LENGTH,
        )


@triton.jit
def add_tile(out_ptr, tile, i, j, n):
    """Adds a tile of this program's split to its matrix. out_ptr: fp64 [splits, n, n]."""
    n = n.to(tl.int64)
    at = out_ptr + tl.program_id(2) * n * n + i[:, None] * n + j[None, :]
    inside = (i[:, None] < n) & (j[None, :] < n)
    tl.store(at, tl.load(at, inside, 0.0) + tile, inside)


@triton.jit(do_not_specialize=["rows", "split_rows", "block", "n", "pitch", "plane"])
def multiply_blocks(
    x_ptr,  # bf16 [X_PIECES, rows, pitch]; `plane` elements between pieces
    y_ptr,  # bf16 [Y_PIECES, rows, pitch]
    out_ptr,  # fp64 [splits, n, n], added to
    rows,
    split_rows,
    block,
    n,
    pitch,
    plane,
    X_PIECES: tl.constexpr,
    Y_PIECES: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x^T y of bf16 pieces, summed in fp32 over a block of rows and in fp64 over the blocks of one split."""
    pitch, plane = multiple(pitch, 64), multiple(plane, 64)
    i = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    j = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    first = tl.program_id(2) * split_rows
    total = tl.zeros([SIDE, SIDE], tl.float64)
    for top in range(first, tl.minimum(first + split_rows, rows), block):
        end = tl.minimum(top + block, rows)
        block_sum = tl.zeros([SIDE, SIDE], tl.float32)
        for start in range(top, end, DEPTH):
            row = start + tl.arange(0, DEPTH)[:, None]
            for p in tl.static_range(X_PIECES):
                a = tl.trans(tl.load(x_ptr + p * plane + row * pitch + i[None, :], row < end, 0.0))
                for q in tl.static_range(Y_PIECES):
                    if p + q < 3:
                        b = tl.load(y_ptr + q * plane + row * pitch + j[None, :], row < end, 0.0)
                        block_sum = tl.dot(a, b, block_sum)
        total += block_sum.to(tl.float64)
    add_tile(out_ptr, total, i, j, n)


def round_up(size: int, unit: int) -> int:
    """The least multiple of unit that is at least size."""
    return triton.cdiv(size, unit) * unit


def pieces(dtype: torch.dtype, visible: bool) -> tuple[int, int]:
    """Number of bf16 pieces of W and of delta."""
    return (1 if visible or dtype == torch.bfloat16 else 3), (1 if visible else 3)


def gram_(base: torch.Tensor, trained: torch.Tensor, parts: int, visible: bool, block: int, out: torch.Tensor) -> None:
    """The operator, for matrices on one device with any strides."""
    rows, n = base.shape
    wide = torch.float64 in (base.dtype, trained.dtype) and not visible
    block = 0 if wide else block
    for start in range(0, rows if n else 0, step := ROWS // block * block if block else ROWS):
        size = min(step, rows - start)
        add_rows(base.narrow(0, start, size), trained.narrow(0, start, size), parts, visible, wide, block, out)


def add_rows(
    base: torch.Tensor, trained: torch.Tensor, parts: int, visible: bool, wide: bool, block: int, out: torch.Tensor
) -> None:
    """Pack rows and add their products to the matrices that `parts` asks for."""
    (rows, n), device = base.shape, base.device
    height, pitch = round_up(rows, PACK_LENGTH), round_up(n, PACK_LENGTH)
    in_blocks = bool(block and parts & PART_CROSS)
    in_fp64 = parts & (PART_BASE | PART_DELTA) or not in_blocks
    w_pieces, d_pieces = pieces(base.dtype, visible)

    def fp64(needed):
        return torch.empty(height, pitch, dtype=torch.float64, device=device) if needed else None

    def bf16(count):
        return torch.empty(count, height, pitch, dtype=torch.bfloat16, device=device) if in_blocks else None

    w64 = fp64(in_fp64 and parts & (PART_BASE if in_blocks else PART_BASE | PART_CROSS))
    d64 = fp64(in_fp64 and parts & (PART_DELTA if in_blocks else PART_CROSS | PART_DELTA))
    w16, d16 = bf16(w_pieces), bf16(d_pieces)
    pack_rows(base, trained, w64, d64, w16, d16, visible, wide, w_pieces, d_pieces)

    for matrix, part in zip(out, (p for p in (PART_BASE, PART_CROSS, PART_DELTA) if parts & p), strict=True):
        if part == PART_CROSS and in_blocks:
            tiles = triton.cdiv(n, SIDE)
            split_rows = round_up(triton.cdiv(rows, max(1, SPLITS // tiles**2)), block)
            splits = triton.cdiv(rows, split_rows)
            target = matrix if splits == 1 else matrix.new_zeros(splits, n, n)
            launch.run(
                multiply_blocks,
                (tiles, tiles, splits),
                w16,
                d16,
                target,
                rows,
                split_rows,
                block,
                n,
                pitch,
                height * pitch,
                X_PIECES=w_pieces,
                Y_PIECES=d_pieces,
                SIDE=SIDE,
                DEPTH=DEPTH,
            )
            if target is not matrix:
                matrix += target.sum(0)
        else:
            x, y = (d64 if part == PART_DELTA else w64), (w64 if part == PART_BASE else d64)
            assert x is not None
            assert y is not None
            add_product(matrix, x.narrow(0, 0, rows), y.narrow(0, 0, rows), panel=n if part == PART_CROSS else PANEL)


def add_product(matrix: torch.Tensor, x: torch.Tensor, y: torch.Tensor, panel: int) -> None:
    """Add x^T y in fp64, in panels of columns that each end at the diagonal."""
    for start in range(0, len(matrix), panel):
        stop = min(start + panel, len(matrix))
        columns = matrix.narrow(0, 0, stop).narrow(1, start, stop - start)
        columns.addmm_(x.narrow(1, 0, stop).T, y.narrow(1, start, stop - start))  # without a temporary


def pack_rows(
    base: torch.Tensor,
    trained: torch.Tensor,
    w64: torch.Tensor | None,
    d64: torch.Tensor | None,
    w16: torch.Tensor | None,
    d16: torch.Tensor | None,
    visible: bool,
    wide: bool,
    w_pieces: int,
    d_pieces: int,
) -> None:
    """Write W and delta of rows to the buffers that are not None."""
    across = base.stride(1) != 1 and base.stride(0) == 1
    a, b = (base.T, trained.T) if across else (base, trained)
    lines, length = a.shape
    aligned = all(t.stride(0) % 16 == 0 for t in (a, b))
    buffer = next(x for x in (w64, d64, w16) if x is not None)
    height, pitch = buffer.shape[-2:]
    grid = (
        triton.cdiv(pitch if across else height, PACK_LINES),
        triton.cdiv(height if across else pitch, PACK_LENGTH),
    )
    launch.run(
        pack,
        grid,
        a,
        b,
        w64,
        d64,
        w16,
        d16,
        lines,
        length,
        *a.stride(),
        *b.stride(),
        pitch,
        height * pitch,
        WIDE=tl.float64 if wide else tl.float32,
        VISIBLE=visible,
        ACROSS=across,
        BASE_UNIT=a.stride(1) == 1,
        TRAINED_UNIT=b.stride(1) == 1,
        ALIGNED=aligned,
        W_PIECES=w_pieces,
        D_PIECES=d_pieces,
        LINES=PACK_LINES,
        LENGTH=PACK_LENGTH,
    )
