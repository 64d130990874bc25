"""`gram` in Triton: rows are packed once, then multiplied by tensor cores: in fp64, or in bf16 where fp32 is asked for.

`pack` reads W and W' as they lie, whatever their dtypes and strides, and writes what the products need: W and delta in fp64, and in
bf16 pieces, padded with zeros to whole tiles, for the fp32 blocks.

Products in fp64 are the library's (torch.mm), of a symmetric matrix panel by panel: on an H200 Triton's own took 2.6 times
as long as eager PyTorch's three matrices.

`multiply_blocks` makes W^T delta in fp32 blocks of rows. An fp32 number is the sum of three bf16 pieces of eight bits, cut off
one after the other; of bf16 data and of the visible view one piece is all. Products of pieces are exact in fp32, and those
below 2^-24 of the whole are left out: one, three or six bf16 products, each many times faster than one in fp32. A block is
summed in fp32, blocks in fp64.

Every tile of such a result belongs to one program of each share of the rows, and shares are added in order: no atomics, so the
same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from opdkernels.backends.triton import launch
from opdkernels.backends.triton.numeric import bf16_bits_of, bits_of, from_bf16_bits, multiple, widen

SIDE = 64  # of a tile of the result
DEPTH = 32  # rows that one product takes
PANEL = 512  # columns of a symmetric matrix at a time: what is below them is not computed
PACK_LINES, PACK_LENGTH = 32, 64
ROWS = 1 << 13  # packed at a time
SHARES = 256  # programs that a result of few tiles is shared among


@triton.jit
def truncated(x):
    """bf16 pattern of the upper half of fp32: eight bits of it; a NaN stays one."""
    return tl.where(x == x, (bits_of(x) >> 16) & 0xFFFF, 0x7FC0)


@triton.jit
def store_pieces(planes, at, stride, x, PIECES: tl.constexpr):
    """Cuts x out bf16 pieces, the largest first. What is left of a value that is not finite is 0."""
    for piece in tl.static_range(PIECES):
        pattern = truncated(x)
        tl.store(planes + piece * stride + at, pattern.to(tl.uint16).to(tl.bfloat16, bitcast=True))
        x = tl.where((pattern & 0x7F80) == 0x7F80, 0.0, x - from_bf16_bits(pattern))


@triton.jit
def load_tile(data, line, place, line_stride, stride, inside, UNIT: tl.constexpr, WHOLE: tl.constexpr):
    offsets = line * line_stride + (place if UNIT else place * stride)
    if WHOLE:
        return tl.load(data + offsets)
    return tl.load(data + offsets, inside, 0.0)


@triton.jit
def pack_tile(
    base,
    trained,
    w64,
    d64,
    w16,
    d16,
    line0,
    place0,
    lines,
    length,
    source_line,
    source_place,
    trained_line,
    trained_place,
    pitch,
    plane,
    WIDE: tl.constexpr,
    VISIBLE: tl.constexpr,
    ACROSS: tl.constexpr,
    SOURCE_UNIT: tl.constexpr,
    TRAINED_UNIT: tl.constexpr,
    W_PIECES: tl.constexpr,
    D_PIECES: tl.constexpr,
    WHOLE: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
):
    line = (line0 + tl.arange(0, LINES)).to(tl.int64)[:, None]
    place = (place0 + tl.arange(0, LENGTH)).to(tl.int64)[None, :]
    inside = (line < lines) & (place < length)
    a = load_tile(base, line, place, source_line, source_place, inside, SOURCE_UNIT, WHOLE)
    b = load_tile(trained, line, place, trained_line, trained_place, inside, TRAINED_UNIT, WHOLE)
    if VISIBLE:
        w = from_bf16_bits(bf16_bits_of(a))
        d = from_bf16_bits(bf16_bits_of(from_bf16_bits(bf16_bits_of(b)) - w))
    else:
        w = widen(a, WIDE)
        d = widen(b, WIDE) - w
    at = place * pitch + line if ACROSS else line * pitch + place
    if w64 is not None:
        tl.store(w64 + at, w.to(tl.float64))
    if d64 is not None:
        tl.store(d64 + at, d.to(tl.float64))
    if w16 is not None:
        store_pieces(w16, at, plane, w, W_PIECES)
        store_pieces(d16, at, plane, d, D_PIECES)


@triton.jit(
    do_not_specialize=[
        "lines",
        "length",
        "source_line",
        "source_place",
        "trained_line",
        "trained_place",
        "pitch",
        "plane",
    ]
)
def pack(
    base,
    trained,
    w64,
    d64,
    w16,
    d16,
    lines,
    length,
    source_line,
    source_place,
    trained_line,
    trained_place,
    pitch,
    plane,
    WIDE: tl.constexpr,
    VISIBLE: tl.constexpr,
    ACROSS: tl.constexpr,
    SOURCE_UNIT: tl.constexpr,
    TRAINED_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    W_PIECES: tl.constexpr,
    D_PIECES: tl.constexpr,
    LINES: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """W and delta of a tile of lines: rows of the matrices or, ACROSS, their columns, whichever lie side by side in memory.

    w64, d64: fp64 [rows, pitch]; w16, d16: bf16 [pieces, rows, pitch], with `plane` elements between pieces.
    """
    line0, place0 = tl.program_id(0) * LINES, tl.program_id(1) * LENGTH
    pitch, plane = multiple(pitch, 64), multiple(plane, 64)
    if ALIGNED:
        source_line, trained_line = multiple(source_line, 16), multiple(trained_line, 16)
    if (line0 + LINES <= lines) & (place0 + LENGTH <= length):
        pack_tile(
            base,
            trained,
            w64,
            d64,
            w16,
            d16,
            line0,
            place0,
            lines,
            length,
            source_line,
            source_place,
            trained_line,
            trained_place,
            pitch,
            plane,
            WIDE,
            VISIBLE,
            ACROSS,
            SOURCE_UNIT,
            TRAINED_UNIT,
            W_PIECES,
            D_PIECES,
            True,
            LINES,
            LENGTH,
        )
    else:
        pack_tile(
            base,
            trained,
            w64,
            d64,
            w16,
            d16,
            line0,
            place0,
            lines,
            length,
            source_line,
            source_place,
            trained_line,
            trained_place,
            pitch,
            plane,
            WIDE,
            VISIBLE,
            ACROSS,
            SOURCE_UNIT,
            TRAINED_UNIT,
            W_PIECES,
            D_PIECES,
            False,
            LINES,
            LENGTH,
        )


@triton.jit
def add_tile(out, tile, i, j, n):
    """Adds a tile of one share to its matrix, fp64 [shares, n, n]."""
    n = n.to(tl.int64)
    at = out + tl.program_id(2) * n * n + i[:, None] * n + j[None, :]
    inside = (i[:, None] < n) & (j[None, :] < n)
    tl.store(at, tl.load(at, inside, 0.0) + tile, inside)


@triton.jit(do_not_specialize=["rows", "share", "block", "n", "pitch", "plane"])
def multiply_blocks(
    x,
    y,
    out,
    rows,
    share,
    block,
    n,
    pitch,
    plane,
    X_PIECES: tl.constexpr,
    Y_PIECES: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x^T y of bf16 pieces, in fp32 over a block of rows and in fp64 over the blocks of one share."""
    pitch, plane = multiple(pitch, 64), multiple(plane, 64)
    i = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    j = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    first = tl.program_id(2) * share
    total = tl.zeros([SIDE, SIDE], tl.float64)
    for top in range(first, tl.minimum(first + share, rows), block):
        end = tl.minimum(top + block, rows)
        part = tl.zeros([SIDE, SIDE], tl.float32)
        for start in range(top, end, DEPTH):
            row = start + tl.arange(0, DEPTH)[:, None]
            for p in tl.static_range(X_PIECES):
                a = tl.trans(tl.load(x + p * plane + row * pitch + i[None, :], row < end, 0.0))
                for q in tl.static_range(Y_PIECES):
                    if p + q < 3:
                        b = tl.load(y + q * plane + row * pitch + j[None, :], row < end, 0.0)
                        part = tl.dot(a, b, part)
        total += part.to(tl.float64)
    add_tile(out, total, i, j, n)


def whole(size: int, unit: int) -> int:
    """The least multiple of unit that holds size."""
    return triton.cdiv(size, unit) * unit


def pieces(dtype: torch.dtype, visible: bool) -> tuple[int, int]:
    """bf16 pieces of W and of delta."""
    return (1 if visible or dtype == torch.bfloat16 else 3), (1 if visible else 3)


def gram_(base: torch.Tensor, trained: torch.Tensor, parts: int, visible: bool, block: int, out: torch.Tensor) -> None:
    """The operator, for matrices of one device with any strides."""
    rows, n = base.shape
    wide = torch.float64 in (base.dtype, trained.dtype) and not visible
    block = 0 if wide else block
    for start in range(0, rows if n else 0, step := ROWS // block * block if block else ROWS):
        size = min(step, rows - start)
        add_rows(base.narrow(0, start, size), trained.narrow(0, start, size), parts, visible, wide, block, out)


def add_rows(
    base: torch.Tensor, trained: torch.Tensor, parts: int, visible: bool, wide: bool, block: int, out: torch.Tensor
) -> None:
    """Packs rows and adds their products to the matrices asked for."""
    (rows, n), device = base.shape, base.device
    height, pitch = whole(rows, PACK_LENGTH), whole(n, PACK_LENGTH)
    in_blocks = bool(block and parts & 2)
    in_fp64 = parts & 5 or not in_blocks
    w_pieces, d_pieces = pieces(base.dtype, visible)

    def fp64(wanted):
        return torch.empty(height, pitch, dtype=torch.float64, device=device) if wanted else None

    def bf16(count):
        return torch.empty(count, height, pitch, dtype=torch.bfloat16, device=device) if in_blocks else None

    w64, d64 = fp64(in_fp64 and parts & (1 if in_blocks else 3)), fp64(in_fp64 and parts & (4 if in_blocks else 6))
    w16, d16 = bf16(w_pieces), bf16(d_pieces)
    pack_rows(base, trained, w64, d64, w16, d16, visible, wide, w_pieces, d_pieces)

    for matrix, part in zip(out, (p for p in (1, 2, 4) if parts & p), strict=True):
        if part == 2 and in_blocks:
            tiles = triton.cdiv(n, SIDE)
            share = whole(triton.cdiv(rows, max(1, SHARES // tiles**2)), block)
            shares = triton.cdiv(rows, share)
            target = matrix if shares == 1 else matrix.new_zeros(shares, n, n)
            launch.run(
                multiply_blocks,
                (tiles, tiles, shares),
                w16,
                d16,
                target,
                rows,
                share,
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
            x, y = (d64 if part == 4 else w64), (w64 if part == 1 else d64)
            assert x is not None
            assert y is not None
            add_product(matrix, x.narrow(0, 0, rows), y.narrow(0, 0, rows), panel=n if part == 2 else PANEL)


def add_product(matrix: torch.Tensor, x: torch.Tensor, y: torch.Tensor, panel: int) -> None:
    """Adds x^T y in fp64, in panels of columns that each end at the diagonal."""
    for start in range(0, len(matrix), panel):
        stop = min(start + panel, len(matrix))
        part = x.narrow(1, 0, stop).T @ y.narrow(1, start, stop - start)
        matrix.narrow(0, 0, stop).narrow(1, start, stop - start).add_(part)


def pack_rows(base, trained, w64, d64, w16, d16, visible: bool, wide: bool, w_pieces: int, d_pieces: int) -> None:
    across = base.stride(1) != 1 and base.stride(0) == 1
    a, b = (base.T, trained.T) if across else (base, trained)
    lines, length = a.shape
    aligned = all(t.stride(0) % 16 == 0 for t in (a, b))
    packed = w64 if w64 is not None else d64 if d64 is not None else w16
    height, pitch = packed.shape[-2:]
    columns = (
        triton.cdiv(pitch if across else height, PACK_LINES),
        triton.cdiv(height if across else pitch, PACK_LENGTH),
    )
    launch.run(
        pack,
        columns,
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
        SOURCE_UNIT=a.stride(1) == 1,
        TRAINED_UNIT=b.stride(1) == 1,
        ALIGNED=aligned,
        W_PIECES=w_pieces,
        D_PIECES=d_pieces,
        LINES=PACK_LINES,
        LENGTH=PACK_LENGTH,
    )
