"""`patch` in CUDA C++ on fibers: positions, values and digests of the reference, and what is refused, exactly, in every order of threads."""

from __future__ import annotations

import re

import pytest
import torch

from opdkernels.ops import patch as ops
from opdkernels.ops.patch import BLOCK
from opdkernels.ops.patch import cuda as patch
from tests.backends.cuda.host import ORDERS, compiled, needs_compiler, run_on, source_of
from tests.ops.patch.test_patch import BAD_OFFSETS, Operators, by_reference, make_bits, plain

pytestmark = needs_compiler
WIDTHS = (torch.uint8, torch.int16, torch.int32, torch.int64)
by = Operators(patch)


@pytest.fixture(autouse=True)
def fibers(monkeypatch):
    """Blocks of two warps: a fiber costs more than a coordinate."""
    run_on(monkeypatch, compiled("patch"))
    monkeypatch.setattr(patch, "THREADS", 64)
    monkeypatch.setattr(patch, "QUEUE_THREADS", 64)


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize("n", [0, 1, 31, 1023, 1025, 2048, 70_001])
def test_every_width_and_size(dtype, n):
    for density, difference in ((0.17, False), (0.01, True)):
        by.assert_there_and_back(*make_bits(n, dtype, density), difference)
    v = make_bits(n, dtype, 0)[1]
    assert torch.equal(patch.patch_digest(v), ops.reference_digest(v))


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_no_order_of_threads_shows(monkeypatch, dtype, order):
    run_on(monkeypatch, compiled("patch"), order=order, processors=1 + order)
    w, v = make_bits(BLOCK + 5000, dtype, 0.02)
    v[: BLOCK // 2] = ~w[: BLOCK // 2]  # a block with a mask, then one with offsets
    by.assert_there_and_back(w, v, True)


@pytest.mark.parametrize("density", [0.0, 1 / 16, 1.0])
def test_every_density(density):
    by.assert_there_and_back(*make_bits(2 * BLOCK + 77, torch.int16, density), False)


def test_a_million_coordinates_in_blocks_as_large_as_on_a_device(monkeypatch):
    monkeypatch.setattr(patch, "THREADS", 512)
    monkeypatch.setattr(patch, "QUEUE_THREADS", 256)
    by.assert_there_and_back(*make_bits(1_000_003, torch.int16, 0.17), False)


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


def test_a_mask_with_bits_beyond_the_end_is_refused():
    by.assert_a_mask_beyond_the_end_is_refused()


def test_the_first_bad_block_is_named():
    by.assert_the_first_bad_block_is_named()


BARRIER, MEETING = "__syncthreads();", "__syncwarp();"


def of_two_bytes(source: str) -> str:
    """Without the kernels of other widths, which a spoilt source need not compile."""
    return re.sub(r"^OPD_PATCH_WIDTH\((?!2,).*$", "", source, flags=re.MULTILINE)


def spoilt_at(text: str, which: int, of: int) -> str:
    """The source without one of its barriers."""
    parts = of_two_bytes(source_of("patch")).split(text)
    assert len(parts) == of + 1
    return text.join(parts[: which + 1]) + text.join(parts[which + 1 :])


def gathered(w, v) -> tuple:
    changes, digests = by.gather(w, v)
    return plain(changes), digests.tolist()


def scattered(w, changes) -> tuple:
    status, out, digests = by.scatter(w, changes)
    return status, out.tolist(), digests.tolist()


def digested(w) -> list:
    return patch.patch_digest(w).tolist()


# What a kernel leaves, of which each barrier is a part.
LEFT = {
    "queue": (MEETING, 0, gathered),
    "compared": (BARRIER, 0, gathered),
    "zeros before offsets": (BARRIER, 1, scattered),
    "offsets before counts": (BARRIER, 2, scattered),
    "counts before their sum": (BARRIER, 3, scattered),
    "restored": (BARRIER, 4, scattered),
    "digested": (BARRIER, 5, digested),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_missing_barrier_is_caught(monkeypatch, name):
    """Without it some order of threads leaves something else. (The second meeting of a warp only orders memory.)"""
    text, which, left = LEFT[name]
    w, v = make_bits(9000, torch.int16, 0.3 if left is gathered else 0.02)
    arguments = {gathered: (w, v), scattered: (w, by_reference(w, v, False)[0]), digested: (w,)}[left]
    expected = left(*arguments)
    kernels = compiled("patch", spoilt_at(text, which, 2 if text == MEETING else 6))
    found = []
    for order in ORDERS:
        run_on(monkeypatch, kernels, order=order)
        found.append(left(*arguments))
    assert any(one != expected for one in found)


@pytest.mark.parametrize(
    ("text", "spoilt", "said"),
    [
        ("even += __shfl_xor_sync", "if (lane & 4) even += __shfl_xor_sync", "different places|a lane of the mask"),
        ("bits |= __shfl_xor_sync", "if (bits) bits |= __shfl_xor_sync", "different places|a lane of the mask"),
        (BARRIER, "if (threadIdx.x >= 32) __syncthreads();", "barrier"),
    ],
    ids=["sums", "bits", "barrier"],
)
def test_divergent_threads_are_refused(monkeypatch, text, spoilt, said):
    source = of_two_bytes(source_of("patch"))
    assert text in source
    run_on(monkeypatch, compiled("patch", source.replace(text, spoilt, 1)), order=2)
    with pytest.raises(
        RuntimeError, match=rf"patch_compare_2 did not start on cpu: block \d+, thread \d+, line \d+: .*({said})"
    ):
        by.gather(*make_bits(9000, torch.int16, 0.02))
