"""`overlap` in CUDA C++ on fibers: the joint counts of the reference, exactly, in every order of threads."""

from __future__ import annotations

import itertools

import pytest
import torch

from opdkernels.backends import gpu
from opdkernels.ops.delta import DTYPES
from opdkernels.ops.overlap import DEFAULT_THRESHOLD_BITS, Overlap
from opdkernels.ops.overlap import cuda as overlap
from tests.backends.cuda.host import ORDERS, compiled, needs_compiler, run_on, source_of
from tests.ops.overlap.test_overlap import by_reference, make_runs

pytestmark = needs_compiler
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def fibers(monkeypatch):
    """Blocks of two warps: a fiber costs more than a coordinate."""
    run_on(monkeypatch, compiled("overlap"))
    monkeypatch.setattr(overlap, "THREADS", 64)


def by_kernel(base, runs, threshold_bits=DEFAULT_THRESHOLD_BITS) -> Overlap:
    found = Overlap.empty(len(runs), threshold_bits)
    overlap.overlap_(base, runs, threshold_bits, *(torch.from_numpy(array) for array in found.arrays))
    return found


@pytest.mark.parametrize(("base", "trained"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_pair_of_dtypes(base, trained):
    for n in (0, 1, 31, 1023, 1025):
        tensors = make_runs(n, (base, trained, base), seed=n, hostile=n % 2 == 1)
        assert by_kernel(*tensors) == by_reference(*tensors)


@pytest.mark.parametrize("n_runs", [2, 3, 4, 5, 16])
def test_many_runs(n_runs):
    tensors = make_runs(20_001, (BF16,) * (n_runs + 1))
    assert by_kernel(*tensors) == by_reference(*tensors)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_runs", [2, 5])
def test_no_order_of_threads_shows(monkeypatch, n_runs, order):
    run_on(monkeypatch, compiled("overlap"), order=order, processors=1 + order)
    tensors = make_runs(5001, (BF16,) * (n_runs + 1))
    assert by_kernel(*tensors) == by_reference(*tensors)


def test_a_million_coordinates_in_blocks_as_large_as_on_a_device(monkeypatch):
    monkeypatch.setattr(overlap, "THREADS", 1024)
    tensors = make_runs(1_000_003)
    assert by_kernel(*tensors) == by_reference(*tensors)


@pytest.mark.parametrize("kib", [48, 99, 163])
def test_parts_of_little_shared_memory_count_the_same(monkeypatch, kib):
    run_on(monkeypatch, compiled("overlap"), shared_bytes=kib << 10)
    base, runs = make_runs(3000)
    base[::3] *= 1000  # magnitudes beyond the tables in shared memory
    assert by_kernel(base, runs) == by_reference(base, runs)


def test_every_cut_of_few_bits_rounds_as_the_definition():
    """Differences at, beside and half way between bf16 neighbours: the kernel compares before rounding."""
    base = torch.tensor([1.0, 256.0], dtype=BF16).repeat(512)
    steps = torch.arange(512).repeat_interleave(2)
    runs = [base + steps * 2.0**-7, base - steps * 1.0, base * (1 + steps * 2.0**-9)]
    for threshold_bits in (0, 1, 0x3B80, 0x3B81, *range(0x3F7E, 0x3F84), 0x42FF, 0x7F7F):
        assert by_kernel(base, runs, threshold_bits) == by_reference(base, runs, threshold_bits)


@pytest.mark.parametrize("n_runs", [2, 5])
def test_slices_change_no_count(monkeypatch, n_runs):
    monkeypatch.setattr(gpu, "SLICE", 2048)
    tensors = make_runs(5001, (BF16, FP32, *(BF16,) * (n_runs - 1)))
    assert by_kernel(*tensors) == by_reference(*tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_views(dtype):
    base, runs = make_runs(3000, (dtype,) * 3)
    views = base[3:2504], [runs[0][1:2502], runs[1][5:2506]]
    assert by_kernel(*views) == by_reference(*views)


def test_it_adds_to_what_is_there():
    base, runs = make_runs(2000)
    found = by_kernel(base[:700], [run[:700] for run in runs])
    overlap.overlap_(
        base[700:],
        [run[700:] for run in runs],
        DEFAULT_THRESHOLD_BITS,
        *(torch.from_numpy(array) for array in found.arrays),
    )
    assert found == by_reference(base, runs)


BARRIER = "__syncthreads();"


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_barrier_is_caught(monkeypatch, which):
    parts = source_of("overlap").split(BARRIER)
    assert len(parts) == 3
    kernels = compiled("overlap", BARRIER.join(parts[: which + 1]) + BARRIER.join(parts[which + 1 :]))
    tensors = make_runs(3000)
    found = []
    for order in ORDERS:
        run_on(monkeypatch, kernels, order=order)
        found.append(by_kernel(*tensors))
    assert any(counts != by_reference(*tensors) for counts in found)


def test_a_divergent_shuffle_is_refused(monkeypatch):
    line = "lost = warp_sum(lost);"
    assert line in source_of("overlap")
    run_on(monkeypatch, compiled("overlap", source_of("overlap").replace(line, f"if (threadIdx.x & 1) {line}")))
    with pytest.raises(
        RuntimeError, match=r"overlap_count did not start on cpu: .*(different places|a lane of the mask|barrier)"
    ):
        by_kernel(*make_runs(3000))
