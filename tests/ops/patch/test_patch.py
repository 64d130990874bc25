"""`patch`: positions and values of changed bits; kernels and reference equal an oracle that loops over coordinates."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdkernels.ops import patch as ops
from opdkernels.ops.patch import Changes, GatherBuffers, bits, check, digest, gather, scatter
from opdkernels.ops.patch.layout import BLOCK, HASH_SECRET, blocks_of
from tests.conftest import ISAS
from tests.ops.conformance import MILLION, MISALIGNED, SIZES, check_case, dispatched, make_pair, zero_pages
from tests.ops.patch.cases import FAMILY, MALFORMED, make_bits

DTYPES = (
    torch.uint8,
    torch.float8_e4m3fn,
    torch.bool,
    torch.bfloat16,
    torch.int16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.complex64,
)
DENSITIES = (0.0, 0.01, 1 / 16, 0.17, 1.0)
MASK = (1 << 64) - 1


class Xxh3:
    """XXH3-128 of long inputs, seed 0, computed as in the specification, stripe by stripe and word by word."""

    P32 = (2654435761, 2246822519, 3266489917)
    P64 = (11400714785074694791, 14029467366897019727, 1609587929392839161, 9650029242287828579, 2870177450012600261)

    def __init__(self, secret: bytes):
        self.secret = secret

    def word(self, data: bytes, at: int) -> int:
        return struct.unpack_from("<Q", data, at)[0]

    def accumulate(self, state: list[int], data: bytes, at: int, key: int) -> None:
        for lane in range(8):
            value = self.word(data, at + 8 * lane)
            mixed = value ^ self.word(self.secret, key + 8 * lane)
            state[lane ^ 1] = (state[lane ^ 1] + value) & MASK
            state[lane] = (state[lane] + (mixed & 0xFFFFFFFF) * (mixed >> 32)) & MASK

    def finish(self, state: list[int], key: int, start: int) -> int:
        total = start
        for pair in range(4):
            low = state[2 * pair] ^ self.word(self.secret, key + 16 * pair)
            high = state[2 * pair + 1] ^ self.word(self.secret, key + 16 * pair + 8)
            product = low * high
            total += (product & MASK) ^ (product >> 64)
        total &= MASK
        total ^= total >> 37
        total = total * 0x165667919E3779F9 & MASK
        return total ^ (total >> 32)

    def __call__(self, data: bytes) -> tuple[int, int]:
        assert len(data) > 240
        state = [self.P32[2], self.P64[0], self.P64[1], self.P64[2], self.P64[3], self.P32[1], self.P64[4], self.P32[0]]
        stripes_in_block = (len(self.secret) - 64) // 8
        blocks = (len(data) - 1) // (64 * stripes_in_block)
        for block in range(blocks):
            for stripe in range(stripes_in_block):
                self.accumulate(state, data, 64 * (block * stripes_in_block + stripe), 8 * stripe)
            for lane in range(8):
                value = state[lane] ^ state[lane] >> 47 ^ self.word(self.secret, len(self.secret) - 64 + 8 * lane)
                state[lane] = value * self.P32[0] & MASK
        begun = 64 * blocks * stripes_in_block
        for stripe in range((len(data) - 1 - begun) // 64):
            self.accumulate(state, data, begun + 64 * stripe, 8 * stripe)
        self.accumulate(state, data, len(data) - 64, len(self.secret) - 64 - 7)
        size = len(data)
        return (
            self.finish(state, 11, size * self.P64[0] & MASK),
            self.finish(state, len(self.secret) - 64 - 11, ~(size * self.P64[1]) & MASK),
        )


def oracle_digests(tensor: torch.Tensor) -> list[list[int]]:
    data, size = tensor.contiguous().view(torch.uint8).numpy().tobytes(), BLOCK * tensor.element_size()
    hasher, digests = Xxh3(HASH_SECRET), []
    for at in range(0, len(data), size):
        block = data[at : at + size]
        block += bytes(-len(block) % 1024)
        digests.append([word - (1 << 64) if word >> 63 else word for word in hasher(block)])
    return digests


def oracle(w: torch.Tensor, v: torch.Tensor, difference: bool) -> tuple[list[int], bytes, list[int]]:
    """Counts, positions and stored values, one coordinate at a time."""
    width = w.element_size()
    old, new = (np.frombuffer(side.view(torch.uint8).numpy().tobytes(), f"<u{width}") for side in (w, v))
    counts, positions, stored = [], b"", []
    for start in range(0, len(old), BLOCK):
        a, b = old[start : start + BLOCK].tolist(), new[start : start + BLOCK].tolist()
        changed = [i for i in range(len(a)) if a[i] != b[i]]
        as_offsets = b"".join(struct.pack("<H", i) for i in changed)
        mask = bytearray((len(a) + 7) // 8)
        for i in changed:
            mask[i // 8] |= 1 << i % 8
        counts.append(len(changed))
        positions += as_offsets if len(as_offsets) < len(mask) else bytes(mask)
        stored += [(b[i] - a[i] if difference else b[i]) % (1 << 8 * width) for i in changed]
    return counts, positions, stored


def as_unsigned(values: torch.Tensor) -> list[int]:
    return np.frombuffer(values.numpy().tobytes(), f"<u{values.element_size()}").tolist()


def plain(changes: Changes) -> tuple[list[int], bytes, list[int]]:
    return changes.counts.tolist(), changes.positions.numpy().tobytes(), as_unsigned(changes.values)


def by_reference(w: torch.Tensor, v: torch.Tensor, difference: bool) -> tuple[Changes, torch.Tensor]:
    w, v = bits(w), bits(v)
    buffers = GatherBuffers.of(w.numel(), w.element_size())
    digests = torch.empty(2, len(buffers.counts), 2, dtype=torch.int64)
    ops.reference_gather(w, v, difference, buffers.counts, buffers.positions, buffers.values, digests)
    used = sum(min(2 * c, (min(BLOCK, w.numel() - b * BLOCK) + 7) // 8) for b, c in enumerate(buffers.counts.tolist()))
    return Changes(buffers.counts, buffers.positions[:used], buffers.values[: int(buffers.counts.sum())]), digests


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_reference_equals_oracle(dtype, n):
    for density in DENSITIES:
        w, v = make_bits(n, dtype, density)
        for difference in (False, True):
            changes, _ = by_reference(w, v, difference)
            assert plain(changes) == oracle(w, v, difference)
            out, after = torch.empty_like(bits(w)), torch.empty(len(changes.counts), 2, dtype=torch.int64)
            status = ops.reference_scatter(
                bits(w), changes.counts, changes.positions, changes.values, difference, out, after
            )
            assert int(status) == -1
            assert torch.equal(out, bits(v))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_digests_are_xxh3_of_padded_blocks(dtype, n):
    w, v = make_bits(n, dtype, 0.17)
    _, digests = by_reference(w, v, False)
    assert digests.tolist() == [oracle_digests(w), oracle_digests(v)]
    assert digest(v).tolist() == oracle_digests(v)


def test_digests_equal_the_xxhash_library():
    """The digests of 1,024 zero bytes and of 0 .. 255 sixteen times, from `xxhsum -H2`."""
    known = {
        bytes(1024): "0717191e67688313de5f15ab6daf7941",
        bytes(range(256)) * 16: "03916578969f7a66eb4b7c3707879151",
    }
    for data, expected in known.items():
        low, high = digest(torch.frombuffer(bytearray(data), dtype=torch.uint8))[0].tolist()
        assert f"{high & MASK:016x}{low & MASK:016x}" == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [*SIZES, 3 * BLOCK + 77])
def test_kernel_equals_reference(isa, threads, dtype, n):
    for density in DENSITIES:
        w, v = make_bits(n, dtype, density)
        for difference in (False, True):
            expected, digests = by_reference(w, v, difference)
            changes, gathered_digests = gather(w, v, difference=difference)
            assert plain(changes) == plain(expected)
            assert torch.equal(gathered_digests, digests)
            check(changes, n)
            out, after = scatter(w, changes, difference=difference)
            assert torch.equal(bits(out), bits(v))
            assert torch.equal(after, digests[1])
            assert torch.equal(digest(v), digests[1])
            in_place = w.clone()
            assert scatter(in_place, changes, difference=difference, out=in_place)[0] is in_place
            assert torch.equal(bits(in_place), bits(v))


def test_bits_are_compared_not_values(isa):
    """A NaN of another payload and a zero of another sign are changes; a NaN is equal to itself."""
    w = torch.tensor([0x7FC0, 0x7FC0, 0x0000, 0x8000, 0x3F80], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    v = torch.tensor([0x7FC0, 0x7FC1, 0x8000, 0x8000, 0x3F80], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    changes, _ = gather(w, v)
    assert as_unsigned(changes.values) == [0x7FC1, 0x8000]
    assert changes.positions.tolist() == [0b00110]


@pytest.mark.parametrize("n", [BLOCK, 3 * BLOCK + 77])
def test_shorter_form_of_positions_is_used(isa, n):
    """At a density of 1/16 both have the same length and the mask is used; with one change less, offsets are used."""
    w = torch.zeros(n, dtype=torch.int16)
    for changed, expected in (
        (BLOCK // 16, BLOCK // 8),
        (BLOCK // 16 - 1, 2 * (BLOCK // 16 - 1)),
        (0, 0),
        (BLOCK, BLOCK // 8),
    ):
        v = w.clone()
        v[:changed] = 1
        changes, _ = gather(w, v)
        assert changes.positions.numel() == expected
        assert torch.equal(scatter(w, changes)[0], v)


def test_values_are_not_read_beyond_their_end(isa, tmp_path):
    """The values end at a page boundary, and the next page is not readable."""
    import ctypes
    import mmap

    n, page = 40_000, mmap.PAGESIZE
    w, v = make_bits(n, torch.bfloat16, 0.17)
    changes, _ = gather(w, v)
    size = 2 * changes.changed
    mapped = (size + page - 1) // page * page
    memory = mmap.mmap(-1, mapped + page)
    block = (ctypes.c_uint8 * (mapped + page)).from_buffer(memory)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(ctypes.addressof(block) + mapped), page, 0):
        pytest.skip("memory cannot be protected here")
    view = torch.frombuffer(block, dtype=torch.int16, count=changes.changed, offset=mapped - size)
    view.copy_(changes.values)
    out, _ = scatter(w, replace(changes, values=view))
    assert torch.equal(bits(out), bits(v))
    assert libc.mprotect(ctypes.c_void_p(ctypes.addressof(block) + mapped), page, 3) == 0


@settings(max_examples=80, deadline=None)
@given(
    width=st.sampled_from(sorted(ops.BITS)),
    pairs=st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), max_size=200),
    repeat=st.integers(1, 40),
    difference=st.booleans(),
)
def test_any_pair_round_trips(width, pairs, repeat, difference):
    old, new = (
        torch.tensor([pair[side] for pair in pairs] * repeat, dtype=torch.uint8).repeat_interleave(width)
        for side in (0, 1)
    )
    w, v = old.view(ops.BITS[width]), new.view(ops.BITS[width])
    changes, digests = gather(w, v, difference=difference)
    assert plain(changes) == oracle(w, v, difference)
    out, after = scatter(w, changes, difference=difference)
    assert torch.equal(out, v)
    assert torch.equal(after, digests[1])


def test_buffers_are_reused(isa):
    w, v = make_bits(BLOCK + 5, torch.bfloat16, 0.2)
    buffers = GatherBuffers.of(2 * BLOCK, 2)
    first, _ = gather(w, v, buffers=buffers)
    assert first.values.data_ptr() == buffers.values.data_ptr()
    expected = plain(gather(w[:99], v[:99])[0])
    assert plain(gather(w[:99], v[:99], buffers=buffers)[0]) == expected


@pytest.mark.parametrize("n", [999, BLOCK + 1001])
@pytest.mark.parametrize("density", [0.01, 0.3])
def test_malformed_changes_are_rejected(isa, threads, n, density):
    w, v = make_bits(n, torch.bfloat16, density)
    changes, _ = gather(w, v)
    for name, make_malformed in MALFORMED.items():
        bad = make_malformed(changes)
        if name == "a bit flipped" and density < 0.1:
            continue  # an offset of another value may still be in order
        for call in (lambda bad=bad: check(bad, n), lambda bad=bad: scatter(w, bad)):
            with pytest.raises(ValueError):
                call()
        status = ops.reference_check(bad.counts, bad.positions, n, bad.values.numel())
        assert int(status) >= 0, name


@pytest.mark.parametrize(
    "offsets", [[5, 5], [7, 3], [5, 999], [5, 65535]], ids=["repeated", "unsorted", "beyond", "far beyond"]
)
def test_offsets_out_of_order_or_range_are_rejected(isa, offsets):
    n = 999
    coded = torch.tensor([byte for offset in offsets for byte in (offset & 255, offset >> 8)], dtype=torch.uint8)
    bad = Changes(torch.tensor([2], dtype=torch.int32), coded, torch.zeros(2, dtype=torch.int16))
    for call in (lambda: check(bad, n), lambda: scatter(torch.zeros(n, dtype=torch.int16), bad)):
        with pytest.raises(ValueError, match="block 0 has positions out of range, repeated, out of order"):
            call()
    assert int(ops.reference_check(bad.counts, bad.positions, n, 2)) == 0


def test_mask_with_bits_beyond_the_end_is_rejected(isa):
    w = torch.zeros(13, dtype=torch.int16)
    bad = Changes(
        torch.tensor([2], dtype=torch.int32),
        torch.tensor([1, 0b100000], dtype=torch.uint8),
        torch.zeros(2, dtype=torch.int16),
    )
    with pytest.raises(ValueError, match="block 0"):
        scatter(w, bad)
    assert int(ops.reference_check(bad.counts, bad.positions, 13, 2)) == 0


def test_error_names_the_first_invalid_block_for_any_thread_count(isa, threads):
    n = 6 * BLOCK
    w, v = make_bits(n, torch.bfloat16, 0.3)
    changes, _ = gather(w, v)
    positions = changes.positions.clone()
    for block in (5, 2, 3):
        positions[block * BLOCK // 8] ^= 1
    with pytest.raises(ValueError, match="block 2"):
        check(replace(changes, positions=positions), n)


def test_mismatched_arguments_are_rejected():
    a = torch.zeros(4)
    with pytest.raises(TypeError, match=r"base is torch.float32, trained torch.int32"):
        gather(a, a.int())
    with pytest.raises(ValueError, match=r"shapes differ: base \(4,\), trained \(5,\)"):
        gather(a, torch.zeros(5))
    with pytest.raises(ValueError, match="base is on cpu, trained on meta"):
        gather(a, torch.zeros(4, device="meta"))
    with pytest.raises(TypeError, match="no coordinates of 1, 2, 4 or 8 bytes"):
        gather(a.to(torch.complex128), a.to(torch.complex128))
    with pytest.raises(ValueError, match="buffers are for 3"):
        gather(a, a, buffers=GatherBuffers.of(3, 4))
    changes, _ = gather(a, a + 1)
    with pytest.raises(TypeError, match="the values are"):
        scatter(a.double(), changes)
    with pytest.raises(ValueError, match="out must be"):
        scatter(a, changes, out=torch.zeros(5))
    with pytest.raises(ValueError, match="1 counts do not fit"):
        scatter(torch.zeros(BLOCK + 1), changes)
    with pytest.raises(TypeError, match=r"counts are torch\.int64"):
        check(replace(changes, counts=changes.counts.long()), 4)
    with pytest.raises(ValueError, match="positions must be contiguous"):
        check(replace(changes, positions=changes.positions[:, None]), 4)


def test_operators_are_registered_as_torch_expects():
    w, v = (bits(side) for side in make_pair(1000))
    buffers = GatherBuffers.of(1000, 2)
    torch.library.opcheck(
        torch.ops.opdkernels.patch_gather_.default,
        (w, v, False, buffers.counts, buffers.positions, buffers.values, torch.empty(2, 1, 2, dtype=torch.int64)),
    )
    changes, _ = gather(w, v)
    stored = (changes.counts, changes.positions)
    torch.library.opcheck(
        torch.ops.opdkernels.patch_scatter_.default,
        (w, *stored, changes.values, False, torch.empty_like(w), torch.empty(1, 2, dtype=torch.int64)),
    )
    torch.library.opcheck(torch.ops.opdkernels.patch_check.default, (*stored, 1000, changes.changed))
    torch.library.opcheck(torch.ops.opdkernels.patch_digest.default, (w,))

    def restore(base, counts, positions, values, out, digests):
        torch.ops.opdkernels.patch_scatter_(base, counts, positions, values, False, out, digests)
        return out + 0

    compiled = torch.compile(restore, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(w, *stored, changes.values, torch.empty_like(w), torch.empty(1, 2, dtype=torch.int64)), v
    )


def test_examples_of_the_docstrings():
    import doctest

    assert doctest.testmod(ops).failed == 0


@pytest.mark.slow
@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
def test_more_than_two_billion_coordinates():
    """Beyond 2^31: a few coordinates differ, the rest is untouched zero pages of a sparse mapping."""
    n = 2**31 + 11
    with zero_pages(n, n, n) as (zeros, edges, values):
        base, trained = (torch.frombuffer(m, dtype=torch.uint8) for m in (zeros, edges))
        trained[0] = trained[2**31] = trained[n - 1] = 1
        buffers = GatherBuffers(
            torch.empty(blocks_of(n), dtype=torch.int32),
            torch.empty((n + 7) // 8, dtype=torch.uint8),
            torch.frombuffer(values, dtype=torch.uint8),
        )
        changes, digests = gather(base, trained, buffers=buffers)
        assert changes.changed == int(changes.counts.sum()) == 3
        assert changes.positions.numel() == 4  # an offset, and a mask of 11 bits
        _, after = scatter(base, changes, out=base)
        assert torch.equal(after, digests[1])
        assert base[[0, 1, 2**31, n - 1]].tolist() == [1, 0, 1, 1]
        del base, trained, buffers, changes


@pytest.mark.parametrize("case", FAMILY.collect(SIZES, special=True), ids=str)
def test_matches_reference(isa, threads, case):
    check_case(case, dispatched)


@pytest.mark.parametrize("case", FAMILY.collect([5003]), ids=str)
def test_misaligned(isa, case):
    check_case(case, dispatched, offsets=MISALIGNED)


@pytest.mark.parametrize("case", FAMILY.collect([MILLION], only="int16 1000003 changed 0.17"), ids=str)
def test_a_million_coordinates(isa, threads, case):
    check_case(case, dispatched)
