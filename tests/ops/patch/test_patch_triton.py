"""`patch` in Triton's interpreter: positions, values and digests of the reference, and what is refused, exactly."""

from __future__ import annotations

import pytest
import torch

from opdkernels.backends.triton import launch
from opdkernels.ops import patch as ops
from opdkernels.ops.patch import BLOCK, Changes
from opdkernels.ops.patch import triton as kernels
from tests.ops.patch.test_patch import BAD_OFFSETS, Operators, make_bits

WIDTHS = (torch.uint8, torch.int16, torch.int32, torch.int64)


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    """The interpreter takes its time a program and a tile, not an element."""
    for name, size in (("TILE_BYTES", 1 << 16), ("CHUNK", 4096), ("ROWS", 16), ("STEPS", 1)):
        monkeypatch.setattr(kernels, name, size)


by = Operators(kernels)


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize("n", [0, 1, 31, 1023, 1025, 70_001])
def test_every_width_and_size(dtype, n):
    cases = ((0.17, False), (0.01, True))
    for density, difference in (
        cases if n * dtype.itemsize < 1 << 18 else cases[1:]
    ):  # a unit of a digest is a step of the interpreter
        by.assert_there_and_back(*make_bits(n, dtype, density), difference)
    v = make_bits(min(n, 5000), dtype, 0)[1]
    assert torch.equal(kernels.patch_digest(v), ops.reference_digest(v))


@pytest.mark.parametrize("density", [0.0, 1 / 16, 1.0])
def test_every_density(density):
    by.assert_there_and_back(*make_bits(2 * BLOCK + 77, torch.int16, density), False)


def test_many_tiles_a_block_and_many_programs(monkeypatch):
    """As on a GPU: tiles are taken in turn, values and positions begin where earlier tiles end."""
    for name, size in (("TILE_BYTES", 1 << 14), ("CHUNK", 1024), ("ROWS", 2), ("STEPS", 8)):
        monkeypatch.setattr(kernels, name, size)
    monkeypatch.setattr(launch, "PROGRAMS_PER_SM", 3)
    w, v = make_bits(2 * BLOCK + 5000, torch.int16, 0.02)
    v[: BLOCK // 2] = ~w[
        : BLOCK // 2
    ]  # a block with a mask, one with offsets, one with a tile in which nothing changed
    v[2 * BLOCK :] = w[2 * BLOCK :]
    v[-3] ^= 5
    by.assert_there_and_back(w, v, True)


def test_bits_count_not_values():
    by.assert_bits_count()


def test_the_shorter_form_of_positions_is_taken():
    by.assert_the_shorter_form_is_taken()


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_nothing_beyond_misaligned_views_is_touched(dtype):
    by.assert_nothing_beyond_views_is_touched(dtype)


def test_the_source_may_be_what_is_written():
    by.assert_the_source_may_be_written()


@pytest.mark.parametrize("n", [999, BLOCK + 1001])
@pytest.mark.parametrize("density", [0.01, 0.3])
def test_changes_that_no_gather_gives_are_refused(n, density):
    by.assert_refuses(n, density)


@pytest.mark.parametrize("offsets", BAD_OFFSETS, ids=BAD_OFFSETS.get)
def test_offsets_out_of_order_or_range_are_refused(offsets):
    by.assert_refuses_offsets(offsets)


def test_offsets_are_compared_across_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 16)
    offsets = torch.arange(0, 40, dtype=torch.int16)
    for at in (15, 16, 17):
        bad = offsets.clone()
        bad[at] = bad[at - 1]
        for coded, expected in ((offsets, -1), (bad, 0)):
            assert (
                by.check(Changes(torch.tensor([40], dtype=torch.int32), coded.view(torch.uint8), offsets), 999)
                == expected
            )


def test_a_mask_with_bits_beyond_the_end_is_refused():
    by.assert_a_mask_beyond_the_end_is_refused()


def test_the_first_bad_block_is_named():
    by.assert_the_first_bad_block_is_named()


def test_the_kernels_and_the_reference_hold_one_secret():
    assert kernels.SECRET == ops.SECRET
    assert kernels.START == ops.START


def test_a_million_coordinates():
    by.assert_there_and_back(*make_bits(1_000_003, torch.int16, 0.17), False)
