"""`overlap` in Triton's interpreter: the joint counts of the reference, exactly."""

from __future__ import annotations

import itertools

import pytest
import torch

from opdkernels.backends import gpu
from opdkernels.ops.delta import DTYPES
from opdkernels.ops.overlap import DEFAULT_THRESHOLD_BITS, Overlap
from opdkernels.ops.overlap import triton as kernels
from tests.ops.overlap.test_overlap import by_reference, make_runs

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    """The interpreter takes its time a program and a tile, not an element."""
    monkeypatch.setattr(kernels, "TILE", 16384)


def by_kernel(base, runs, threshold_bits=DEFAULT_THRESHOLD_BITS) -> Overlap:
    found = Overlap.empty(len(runs), threshold_bits)
    kernels.overlap_(base, runs, threshold_bits, *(torch.from_numpy(array) for array in found.arrays))
    return found


@pytest.mark.parametrize(("base", "trained"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_pair_of_dtypes(base, trained):
    for n in (0, 1, 31, 1023, 1025):
        tensors = make_runs(n, (base, trained, base), seed=n, hostile=n % 2 == 1)
        assert by_kernel(*tensors) == by_reference(*tensors)


@pytest.mark.parametrize("n_runs", [2, 3, 4, 5, 16])
def test_many_runs(n_runs):
    tensors = make_runs(70_001, (BF16,) * (n_runs + 1))
    assert by_kernel(*tensors) == by_reference(*tensors)


def test_every_cut_of_few_bits_rounds_as_the_definition():
    """Differences at, beside and half way between bf16 neighbours: the kernel compares before rounding."""
    base = torch.tensor([1.0, 256.0], dtype=BF16).repeat(512)
    steps = torch.arange(512).repeat_interleave(2)
    runs = [base + steps * 2.0**-7, base - steps * 1.0, base * (1 + steps * 2.0**-9)]
    for threshold_bits in (0, 1, 0x3B80, 0x3B81, *range(0x3F7E, 0x3F84), 0x42FF, 0x7F7F):
        assert by_kernel(base, runs, threshold_bits) == by_reference(base, runs, threshold_bits)


def test_copies_and_slices_change_no_count(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 512)
    monkeypatch.setattr(kernels, "COORDINATES_A_COPY", 512)
    monkeypatch.setattr(gpu, "SLICE", 2048)
    for n_runs in (2, 5):
        tensors = make_runs(5001, (BF16,) * (n_runs + 1))
        assert by_kernel(*tensors) == by_reference(*tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_views(dtype):
    base, runs = make_runs(3000, (dtype,) * 3)
    views = base[3:2504], [runs[0][1:2502], runs[1][5:2506]]
    assert by_kernel(*views) == by_reference(*views)


def test_it_adds_to_what_is_there():
    base, runs = make_runs(2000)
    found = by_kernel(base[:700], [run[:700] for run in runs])
    kernels.overlap_(
        base[700:],
        [run[700:] for run in runs],
        DEFAULT_THRESHOLD_BITS,
        *(torch.from_numpy(array) for array in found.arrays),
    )
    assert found == by_reference(base, runs)


def test_a_million_coordinates(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 1 << 17)
    tensors = make_runs(1_000_003)
    assert by_kernel(*tensors) == by_reference(*tensors)
