"""`gram`: the three Gram matrices, by every instruction set and by the reference, against exact arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch

from opdkernels.ops import gram as ops
from opdkernels.ops.gram import gram, symmetric
from tests.conftest import ISAS
from tests.ops.conformance import MISALIGNED, SIZES, check_case, dispatched, reference
from tests.ops.gram.cases import FAMILY, make_matrices, shape_cases

SHAPES = ((1, 1), (3, 7), (1, 31), (700, 1), (1025, 25), (130, 97), (513, 48), (257, 240))


CASES = [*shape_cases(SHAPES, (0, 1, 64, 256)), *FAMILY.collect(SIZES, special=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_to_rounding(isa, case):
    check_case(case, dispatched)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_exact_to_rounding(case):
    check_case(case, reference)


@pytest.mark.parametrize("case", FAMILY.collect([4800]), ids=str)
def test_misaligned(isa, case):
    check_case(case, dispatched, offsets=MISALIGNED)


@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
@pytest.mark.parametrize("block", [0, 64])
def test_threads_strides_and_instruction_sets_change_no_bit_of_bf16(block):
    """Products of bf16 are exact, and all kernels sum in one order. The visible delta is bf16."""
    from opdkernels import native

    base, trained = make_matrices((1500, 130))
    before, threads = native.current_isa(), torch.get_num_threads()
    result = []
    for name, count in itertools.product(native.available_isas(), (1, 2, 3)):
        native.use_isa(name)
        torch.set_num_threads(count)
        result.append(gram(base, trained, visible=True, block=block))
        result.append(gram(base.T.contiguous().T, trained.T.contiguous().T, visible=True, block=block))
        result.append(gram(torch.cat([base, base], 1)[:, :130], trained, visible=True, block=block))
    native.use_isa(before)
    torch.set_num_threads(threads)
    for other in result[1:]:
        assert torch.equal(symmetric(result[0].clone()), symmetric(other))


def test_row_blocks_add_up(isa):
    base, trained = make_matrices((1024, 60))
    full = gram(base, trained)
    parts = gram(base[:512], trained[:512])
    assert gram(base[512:], trained[512:], out=parts) is parts
    assert torch.equal(symmetric(full), symmetric(parts))


@pytest.mark.parametrize("block", [0, 64])
@pytest.mark.parametrize(
    "parts", [parts for count in (1, 2) for parts in itertools.combinations(ops.PARTS, count)], ids="+".join
)
def test_parts_equal_those_of_the_full_result(isa, parts, block):
    base, trained = make_matrices((700, 60))
    full = dict(zip(ops.PARTS, symmetric(gram(base, trained, visible=True, block=block)), strict=True))
    result = symmetric(gram(base, trained, parts=parts, visible=True, block=block), parts)
    assert len(result) == len(parts)
    for part, matrix in zip(parts, result, strict=True):
        assert torch.equal(matrix, full[part])
    by_definition = torch.zeros_like(result)
    ops.reference(base, trained, sum(1 << ops.PARTS.index(part) for part in parts), True, block, by_definition)
    torch.testing.assert_close(symmetric(by_definition, parts), result, rtol=1e-5, atol=1e-9)


def test_of_one_matrix_it_is_its_own(isa):
    base, _ = make_matrices((300, 37))
    (result,) = symmetric(gram(base))
    torch.testing.assert_close(result, base.double().T @ base.double(), rtol=1e-13, atol=0)


def test_symmetric_fills_the_lower_triangles():
    base, trained = make_matrices((50, 30), torch.float64)
    a, b, c = symmetric(gram(base, trained))
    d = trained - base
    for result, exact in ((a, base.T @ base), (b, base.T @ d), (c, d.T @ d)):
        torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-25)
    assert torch.equal(a, a.T)
    assert torch.equal(c, c.T)


def test_nothing_beyond_the_result_is_written(isa):
    base, trained = make_matrices((70, 23))
    room = torch.full((3 * 23 * 23 + 2,), 7.0, dtype=torch.float64)
    out = room[1:-1].view(3, 23, 23).zero_()
    gram(base, trained, block=64, out=out)
    assert room[0] == room[-1] == 7


def test_extremes_keep_their_scale(isa):
    """fp64 holds the squares of every fp32 value, subnormal ones too."""
    for scale in (1e-40, 1e-30, 1e30):
        base = torch.full((4, 2), scale)
        assert gram(base, 2 * base)[2][0, 0].item() == pytest.approx(4 * float(base[0, 0]) ** 2, rel=1e-12)


def test_bad_input_is_refused_by_name():
    good = torch.zeros(4, 3)
    for call, error, message in (
        (lambda: gram(good.int(), good), TypeError, "base is torch.int32"),
        (lambda: gram(good, good[:3]), ValueError, "one shape"),
        (lambda: gram(good[0], good[0]), ValueError, "matrices"),
        (lambda: gram(good, good, block=257), ValueError, "block must be in"),
        (lambda: gram(good, good, block=-1), ValueError, "block must be in"),
        (lambda: gram(good.double(), good, block=64), ValueError, "block=0"),
        (lambda: gram(good, parts=["delta"]), ValueError, "parts must be names"),
        (lambda: gram(good, good, parts=["delta", "base"]), ValueError, "in this order"),
        (lambda: gram(good, good, parts=[]), ValueError, "parts must be names"),
        (lambda: gram(good, good, out=torch.zeros(3, 3, 4)), ValueError, "out must be"),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("block", [0, 64])
def test_operator_is_registered_as_torch_wants_it(block):
    base, trained = make_matrices((40, 9))
    out = torch.zeros(3, 9, 9, dtype=torch.float64)
    torch.library.opcheck(torch.ops.opdkernels.gram_, (base, trained, 7, False, block, out))
