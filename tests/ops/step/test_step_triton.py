"""`step` in Triton's interpreter: weights and state are bit-identical to the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from opdkernels.backends.triton import launch
from opdkernels.ops import step as ops
from opdkernels.ops.step import adamw_scalars
from opdkernels.ops.step import triton as kernels
from tests.ops.conformance import MISALIGNED, backend_kernel, check_case
from tests.ops.step.cases import FAMILY, changed_cases, copy_cases, million, special_cases, stochastic_cases

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """The interpreter rounds a fused product and sum twice."""

    def fma(self, *factors):
        shape = np.broadcast_shapes(*(np.shape(x.data) for x in factors))
        a, b, c = (torch.from_numpy(np.array(np.broadcast_to(x.data, shape))) for x in factors)
        return interpreter.TensorHandle(ops.fma(a, b, c).numpy(), tl.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """The interpreter's time grows with programs and tiles, not with elements."""
    monkeypatch.setattr(kernels, "TILE", 2048)


KERNEL = backend_kernel("triton")
SIZES = (31, 2049, 2048)


@pytest.mark.parametrize("case", special_cases(SIZES), ids=str)
def test_matches_reference(case):
    check_case(case, KERNEL)


@pytest.mark.parametrize("tile", [512, 2048])
@pytest.mark.parametrize(
    "case",
    [*FAMILY.collect(special=True, only="frozen"), *changed_cases((31, 2049)), *copy_cases((0, 1, 31, 2049, 5000))],
    ids=str,
)
def test_misaligned(monkeypatch, case, tile):
    monkeypatch.setattr(kernels, "TILE", tile)
    check_case(case, KERNEL, offsets=MISALIGNED)


@pytest.mark.parametrize("case", FAMILY.collect(special=True, only="mixed"), ids=str)
def test_one_launch_for_each_kind_of_tensors(monkeypatch, case):
    launched, run = [], launch.run
    monkeypatch.setattr(
        launch, "run", lambda *arguments, **options: launched.append(options) or run(*arguments, **options)
    )
    monkeypatch.setattr(launch, "PROGRAMS_PER_SM", 2)
    check_case(case, KERNEL)
    assert len(launched) == 4  # bf16 and fp32 bitmaps; int64 indices and initial values; int32 indices and step groups


@pytest.mark.parametrize("tile", [512, 1024])
@pytest.mark.parametrize("case", stochastic_cases(), ids=str)
def test_many_tiles_per_block_and_many_programs(monkeypatch, case, tile):
    monkeypatch.setattr(kernels, "TILE", tile)
    monkeypatch.setattr(launch, "PROGRAMS_PER_SM", 3)
    check_case(case, KERNEL)


def test_places_beyond_two_billion(monkeypatch):
    """Of a tensor whose pages are never touched but for a few."""
    n = 2**31 + 4099
    places = torch.tensor([5, 2**31 - 1, 2**31, 2**31 + 1, n - 1])
    expected = torch.tensor([1.0, 2, 3, 4, 5])
    m, v, gradients = torch.zeros(5), torch.zeros(5), torch.tensor([1.0, -2, 3, -4, 5])
    param = torch.empty(n, dtype=BF16)
    param[places] = expected.to(BF16)
    scalars = adamw_scalars([1], 0.1, (0.9, 0.99), 1e-8, 0.1)
    none = torch.zeros(0, dtype=torch.int64)
    common = ([], [], [], [], scalars, [0], [0], [0], None, None, None, False, 0, 0)
    kernels.masked_adamw_([param], [gradients], [places], [none], [m], [v], [], *common)
    taken = torch.empty(5)
    kernels.masked_gather_(param, places, none, taken, False)
    small = expected.to(BF16)
    ops.reference_adamw(
        [small], [gradients], [torch.arange(5)], [none], [torch.zeros(5)], [torch.zeros(5)], [], *common
    )
    assert torch.equal(param[places], small)
    assert torch.equal(taken, small.float())


def test_a_million_coordinates(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 1 << 17)
    check_case(million(), KERNEL)
