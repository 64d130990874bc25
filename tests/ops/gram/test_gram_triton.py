"""`gram` in Triton's interpreter, within the same error bound as the CPU kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from opdkernels.ops.gram import symmetric
from opdkernels.ops.gram import triton as kernels
from tests.ops.conformance import MISALIGNED, backend_kernel, check_case
from tests.ops.gram.cases import FAMILY, assert_close, make_matrices, shape_cases, transposed

FP64 = torch.float64


SHAPES = ((1, 1), (3, 7), (700, 1), (1025, 25), (65, 140))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """The interpreter's time grows with programs and steps, not with elements."""
    for name, size in (
        ("SIDE", 128),
        ("DEPTH", 64),
        ("PANEL", 16),
        ("PACK_LINES", 256),
        ("PACK_LENGTH", 256),
        ("SPLITS", 2),
    ):
        monkeypatch.setattr(kernels, name, size)


@pytest.fixture(autouse=True)
def multiply_bf16(monkeypatch):
    """The interpreter holds bf16 as integers and multiplies those."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def to_fp32(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, to_fp32(a), to_fp32(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def gram(base, trained, parts=7, visible=False, block=0, out=None):
    n = base.shape[1]
    out = torch.zeros(parts.bit_count(), n, n, dtype=FP64) if out is None else out
    kernels.gram_(base, trained, parts, visible, block, out)
    return out


@pytest.mark.parametrize("case", [*shape_cases(SHAPES, (0, 64)), *FAMILY.collect([31, 1025], special=True)], ids=str)
def test_exact_to_rounding(case):
    check_case(case, backend_kernel("triton"))


@pytest.mark.parametrize("case", FAMILY.collect([1025]), ids=str)
def test_misaligned(case):
    check_case(case, backend_kernel("triton"), offsets=MISALIGNED)


@pytest.mark.parametrize("block", [0, 48])
def test_shares_and_rows_packed_apart(block, monkeypatch):
    base, trained = make_matrices((500, 140))
    monkeypatch.setattr(kernels, "ROWS", 256)
    monkeypatch.setattr(kernels, "SPLITS", 12)
    result = gram(base, trained, block=block)
    assert_close(result, base, trained, block=block)
    assert torch.equal(result, gram(base, trained, block=block))


@pytest.mark.parametrize("block", [0, 64])
def test_parts_are_those_of_the_whole(block):
    base, trained = make_matrices((100, 130))
    full = gram(base, trained, visible=True, block=block)
    for parts in range(1, 7):
        result = gram(base, trained, parts, visible=True, block=block)
        for one, k in zip(result, (k for k in range(3) if parts >> k & 1), strict=True):
            assert torch.equal(one.triu() if k != 1 else one, full[k].triu() if k != 1 else full[k])


def test_strides_change_no_bit():
    base, trained = make_matrices((150, 70))
    expected = symmetric(gram(base, trained, block=64))
    across = transposed([base, trained])
    apart = torch.cat([base, base], 1)[:, :70], torch.stack([trained, trained], 2)[:, :, 1]
    for w, v in (across, apart, (base, across[1]), (across[0], trained)):
        assert torch.equal(symmetric(gram(w, v, block=64)), expected)
