"""`gram` in Triton's interpreter, as right to its rounding as the CPU's kernel must be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from opdkernels.ops import gram as ops
from opdkernels.ops.delta import DTYPES
from opdkernels.ops.gram import symmetric
from opdkernels.ops.gram import triton as kernels
from tests.ops.gram.test_gram import assert_close, make_matrices

FP64 = torch.float64


SHAPES = ((1, 1), (3, 7), (700, 1), (1025, 25), (65, 140))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """The interpreter takes its time a program and a step, not an element."""
    for name, size in (
        ("SIDE", 128),
        ("DEPTH", 64),
        ("PANEL", 16),
        ("PACK_LINES", 256),
        ("PACK_LENGTH", 256),
        ("SHARES", 2),
    ):
        monkeypatch.setattr(kernels, name, size)


@pytest.fixture(autouse=True)
def multiply_bf16(monkeypatch):
    """The interpreter holds bf16 as integers and multiplies those."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def gram(base, trained, parts=7, visible=False, block=0, out=None):
    n = base.shape[1]
    out = torch.zeros(parts.bit_count(), n, n, dtype=FP64) if out is None else out
    kernels.gram_(base, trained, parts, visible, block, out)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("visible", [False, True])
@pytest.mark.parametrize("block", [0, 64])
def test_right_to_its_rounding(shape, visible, block):
    base, trained = make_matrices(shape)
    assert_close(gram(base, trained, visible=visible, block=block), base, trained, visible=visible, block=block)


@pytest.mark.parametrize(("a", "b"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_pair_of_dtypes(a, b):
    base, trained = make_matrices((130, 37), a, b)
    for visible, block in ((False, 0 if FP64 in (a, b) else 50), (True, 50)):
        assert_close(gram(base, trained, visible=visible, block=block), base, trained, visible=visible, block=block)


@pytest.mark.parametrize("block", [1, 100, 256])
def test_any_block(block):
    base, trained = make_matrices((2 * block + 5, 33), torch.float32)
    assert_close(gram(base, trained, block=block), base, trained, block=block)


@pytest.mark.parametrize("block", [0, 48])
def test_shares_and_rows_packed_apart(block, monkeypatch):
    base, trained = make_matrices((500, 140))
    monkeypatch.setattr(kernels, "ROWS", 256)
    monkeypatch.setattr(kernels, "SHARES", 12)
    found = gram(base, trained, block=block)
    assert_close(found, base, trained, block=block)
    assert torch.equal(found, gram(base, trained, block=block))


@pytest.mark.parametrize("block", [0, 64])
def test_parts_are_those_of_the_whole(block):
    base, trained = make_matrices((100, 130))
    whole = gram(base, trained, visible=True, block=block)
    for parts in range(1, 7):
        found = gram(base, trained, parts, visible=True, block=block)
        for one, k in zip(found, (k for k in range(3) if parts >> k & 1), strict=True):
            assert torch.equal(one.triu() if k != 1 else one, whole[k].triu() if k != 1 else whole[k])


def test_strides_change_no_bit():
    base, trained = make_matrices((150, 70))
    expected = symmetric(gram(base, trained, block=64))
    across = [t.T.contiguous().T for t in (base, trained)]
    apart = torch.cat([base, base], 1)[:, :70], torch.stack([trained, trained], 2)[:, :, 1]
    for w, v in (across, apart, (base, across[1]), (across[0], trained)):
        assert torch.equal(symmetric(gram(w, v, block=64)), expected)


def test_it_adds_to_what_is_there_and_nothing_beyond():
    base, trained = make_matrices((200, 23))
    room = torch.full((3 * 23 * 23 + 2,), 7.0, dtype=FP64)
    out = room[1:-1].view(3, 23, 23).zero_()
    gram(base[:128], trained[:128], out=out)
    gram(base[128:], trained[128:], out=out)
    assert_close(out, base, trained)
    assert room[0] == room[-1] == 7


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_of_nothing_is_zero(shape):
    empty = torch.empty(shape, dtype=torch.bfloat16)
    assert torch.equal(gram(empty, empty), torch.zeros(3, shape[1], shape[1], dtype=FP64))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 3.4e38])
def test_extremes_keep_their_scale(scale):
    base = torch.full((4, 2), scale)
    trained = base / 2
    for block in (0, 4) if 1e-20 < scale < 1e20 else (0,):
        assert_close(gram(base, trained, block=block), base, trained, block=block)


@pytest.mark.parametrize("block", [0, 16])
def test_what_is_not_finite_spreads_where_the_reference_says(block):
    base, trained = make_matrices((40, 5), torch.float32)
    base[3, 1], trained[7, 2] = float("nan"), float("inf")
    expected = torch.zeros(3, 5, 5, dtype=FP64)
    ops.reference(base, trained, 7, False, block, expected)
    found = gram(base, trained, block=block)
    for a, b in ((found[0].triu(), expected[0].triu()), (found[1], expected[1]), (found[2].triu(), expected[2].triu())):
        assert torch.equal(a.isfinite(), b.isfinite())
