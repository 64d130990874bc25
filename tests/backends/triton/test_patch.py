"""`patch` in Triton's interpreter: positions, values and digests of the reference, and what is refused, exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opdkernels.backends.triton import launch
from opdkernels.backends.triton import patch as kernels
from opdkernels.ops import patch as ops
from opdkernels.ops.patch import BLOCK, Changes, Room, bits
from tests.ops.test_patch import by_reference, hostile, make_bits, plain

WIDTHS = (torch.uint8, torch.int16, torch.int32, torch.int64)


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    """The interpreter takes its time a program and a tile, not an element."""
    for name, size in (("TILE_BYTES", 1 << 16), ("CHUNK", 4096), ("ROWS", 16), ("STEPS", 1)):
        monkeypatch.setattr(kernels, name, size)


def gather(w, v, difference=False) -> tuple[Changes, torch.Tensor]:
    room = Room.of(w.numel(), w.itemsize)
    digests = torch.empty(2, len(room.counts), 2, dtype=torch.int64)
    kernels.patch_gather_(w, v, difference, room.counts, room.positions, room.values, digests)
    used = ops.position_bytes
    lengths = [used(count, min(BLOCK, w.numel() - block * BLOCK)) for block, count in enumerate(room.counts.tolist())]
    return Changes(room.counts, room.positions[: sum(lengths)], room.values[: int(room.counts.sum())]), digests


def scatter(w, changes, difference=False, out=None) -> tuple[int, torch.Tensor, torch.Tensor]:
    out = torch.empty_like(w) if out is None else out
    digests = torch.empty(len(changes.counts), 2, dtype=torch.int64)
    status = kernels.patch_scatter_(w, changes.counts, changes.positions, changes.values, difference, out, digests)
    return int(status), out, digests


def check(changes, n) -> int:
    return int(kernels.patch_check(changes.counts, changes.positions, n, changes.values.numel()))


def assert_there_and_back(w, v, difference) -> None:
    expected, digests = by_reference(w, v, difference)
    changes, found = gather(w, v, difference)
    assert plain(changes) == plain(expected)
    assert torch.equal(found, digests)
    status, out, after = scatter(w, changes, difference)
    assert status == -1
    assert torch.equal(out, v)
    assert torch.equal(after, digests[1])


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize("n", [0, 1, 31, 1023, 1025, 70_001])
def test_every_width_and_size(dtype, n):
    cases = ((0.17, False), (0.01, True))
    for density, difference in cases if n * dtype.itemsize < 1 << 18 else cases[1:]:  # a unit of a digest is a step of the interpreter
        assert_there_and_back(*make_bits(n, dtype, density), difference)
    v = make_bits(min(n, 5000), dtype, 0)[1]
    assert torch.equal(kernels.patch_digest(v), ops.reference_digest(v))


@pytest.mark.parametrize("density", [0.0, 1 / 16, 1.0])
def test_every_density(density):
    assert_there_and_back(*make_bits(2 * BLOCK + 77, torch.int16, density), False)


def test_many_tiles_a_block_and_many_programs(monkeypatch):
    """As on a GPU: tiles are taken in turn, values and positions begin where earlier tiles end."""
    for name, size in (("TILE_BYTES", 1 << 14), ("CHUNK", 1024), ("ROWS", 2), ("STEPS", 8)):
        monkeypatch.setattr(kernels, name, size)
    monkeypatch.setattr(launch, "PROGRAMS_PER_PROCESSOR", 3)
    w, v = make_bits(2 * BLOCK + 5000, torch.int16, 0.02)
    v[: BLOCK // 2] = ~w[: BLOCK // 2]  # a block with a mask, one with offsets, one with a tile in which nothing changed
    v[2 * BLOCK :] = w[2 * BLOCK :]
    v[-3] ^= 5
    assert_there_and_back(w, v, True)


def test_bits_count_not_values():
    """A NaN of another payload and a zero of another sign are changes; a NaN is equal to itself."""
    w, v = (torch.tensor(side, dtype=torch.int32).to(torch.int16) for side in ([0x7FC0, 0x7FC0, 0, 0x8000, 0x3F80], [0x7FC0, 0x7FC1, 0x8000, 0x8000, 0x3F80]))
    changes, _ = gather(w, v)
    assert changes.values.tolist() == [0x7FC1, -0x8000]
    assert changes.positions.tolist() == [0b00110]


def test_the_shorter_form_of_positions_is_taken():
    """At one in sixteen both are equal, and the mask is taken; one fewer makes offsets."""
    w = torch.zeros(BLOCK, dtype=torch.int16)
    for changed, expected in ((BLOCK // 16, BLOCK // 8), (BLOCK // 16 - 1, 2 * (BLOCK // 16 - 1))):
        v = w.clone()
        v[-changed:] = 1
        changes, _ = gather(w, v)
        assert changes.positions.numel() == expected
        assert scatter(w, changes)[0] == -1


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_nothing_beyond_misaligned_views_is_touched(dtype):
    n = 5003
    w, v = make_bits(n + 8, dtype, 0.3)
    a, b = w[3 : 3 + n], v[1 : 1 + n]
    room, untouched = (make_bits(n + 40, dtype, 0, seed=9)[0] for _ in range(2))
    counts, positions, digests = torch.full((3,), 7, dtype=torch.int32), torch.full((n,), 7, dtype=torch.uint8), torch.full((3, 1, 2), 7)
    kernels.patch_gather_(a, b, False, counts[1:2], positions[3 : 3 + (n + 7) // 8], room[5 : 5 + n], digests[:2])
    expected, expected_digests = by_reference(a, b, False)
    used, changed = len(expected.positions), expected.changed
    assert counts.tolist() == [7, *expected.counts.tolist(), 7]
    assert torch.equal(positions[3 : 3 + used], expected.positions)
    assert set(positions[:3].tolist() + positions[3 + used :].tolist()) == {7}
    assert torch.equal(room[5 : 5 + changed], expected.values)
    for part in (slice(0, 5), slice(5 + changed, None)):
        assert torch.equal(room[part], untouched[part])
    assert torch.equal(digests[:2], expected_digests)
    assert set(digests[2].flatten().tolist()) == {7}

    room.copy_(untouched)
    found = Changes(counts[1:2], positions[3 : 3 + used], expected.values)
    assert scatter(a, found, out=room[7 : 7 + n])[0] == -1
    assert torch.equal(room[7 : 7 + n], b)
    for part in (slice(0, 7), slice(7 + n, None)):
        assert torch.equal(room[part], untouched[part])


def test_the_source_may_be_what_is_written():
    for difference in (False, True):
        w, v = make_bits(BLOCK + 77, torch.int16, 0.17)
        changes, _ = gather(w, v, difference)
        assert scatter(w, changes, difference, out=w)[0] == -1
        assert torch.equal(w, v)


@pytest.mark.parametrize("n", [999, BLOCK + 1001])
@pytest.mark.parametrize("density", [0.01, 0.3])
def test_changes_that_no_gather_gives_are_refused(n, density):
    w, v = (bits(side) for side in make_bits(n, torch.bfloat16, density))
    changes = by_reference(w, v, False)[0]
    for name, bad in hostile(changes, n):
        expected = int(ops.reference_check(bad.counts, bad.positions, n, bad.values.numel()))
        assert check(bad, n) == expected, name
        out = torch.zeros_like(w)
        assert scatter(w, bad, out=out)[0] == expected, name
        if expected >= 0:
            assert not out.any()


@pytest.mark.parametrize("offsets", [[5, 5], [7, 3], [5, 999], [5, 65535], [5, 998]], ids=["repeated", "unsorted", "beyond", "far beyond", "last"])
def test_offsets_out_of_order_or_range_are_refused(offsets):
    coded = torch.tensor([byte for offset in offsets for byte in (offset & 255, offset >> 8)], dtype=torch.uint8)
    bad = Changes(torch.tensor([2], dtype=torch.int32), coded, torch.zeros(2, dtype=torch.int16))
    assert check(bad, 999) == scatter(torch.zeros(999, dtype=torch.int16), bad)[0] == int(ops.reference_check(bad.counts, coded, 999, 2))


def test_offsets_are_compared_across_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 16)
    offsets = torch.arange(0, 40, dtype=torch.int16)
    for at in (15, 16, 17):
        bad = offsets.clone()
        bad[at] = bad[at - 1]
        for coded, expected in ((offsets, -1), (bad, 0)):
            assert check(Changes(torch.tensor([40], dtype=torch.int32), coded.view(torch.uint8), offsets), 999) == expected


def test_a_mask_with_bits_beyond_the_end_is_refused():
    for last, expected in ((0b100000, 0), (0b10000, -1)):
        changes = Changes(torch.tensor([2], dtype=torch.int32), torch.tensor([1, last], dtype=torch.uint8), torch.zeros(2, dtype=torch.int16))
        assert scatter(torch.zeros(13, dtype=torch.int16), changes)[0] == expected


def test_the_first_bad_block_is_named():
    w, v = make_bits(4 * BLOCK, torch.uint8, 0.3)
    changes = by_reference(w, v, False)[0]
    positions = changes.positions.clone()
    for block in (3, 1, 2):
        positions[block * BLOCK // 8] ^= 1
    assert check(replace(changes, positions=positions), 4 * BLOCK) == 1


def test_the_kernels_and_the_reference_hold_one_secret():
    assert kernels.SECRET == ops.SECRET
    assert kernels.START == ops.START
