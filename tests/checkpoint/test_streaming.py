"""Slices of matched tensors: they cover every element once, in bounded memory, and hold what the files hold."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from opdkernels.backends.staging import ALIGNMENT, StagingBuffer
from opdkernels.checkpoint import streaming
from opdkernels.checkpoint.match import open_pair
from tests.analysis.conftest import pair, save  # noqa: F401

CPU = torch.device("cpu")
GB = 10**9


def matches_of(*sizes: int, dtype: str = "bf16") -> list:
    info = SimpleNamespace(dtype=dtype)
    return [(i, SimpleNamespace(numel=n, base=info, trained=info)) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("max_bytes", [1, 1 << 18, 1 << 30])
def test_slices_cover_every_element_once_and_empty_tensors(max_bytes):
    sizes = (0, 1, 65_536, 65_537, 200_000)
    ranges: dict[int, list[tuple[int, int]]] = {}
    for item in streaming.split_matches(matches_of(*sizes), max_bytes):
        ranges.setdefault(item.index, []).append((item.begin, item.end))
        assert (item.end - item.begin) * 4 <= max(max_bytes, streaming.min_slice_bytes(matches_of(*sizes)))
    for index, n in enumerate(sizes):
        assert [begin for begin, _ in ranges[index]] == [0, *(end for _, end in ranges[index][:-1])]
        assert ranges[index][-1][1] == n


def test_slices_for_a_gpu_have_bounded_bytes():
    gpu = torch.device("cuda", 0)
    assert streaming.slice_limit(4 * GB, gpu) == streaming.MAX_SLICE_BYTES
    assert 3 * streaming.slice_limit(64 * 10**6, gpu) <= 32 * 10**6
    assert streaming.slice_limit(4 * GB, CPU) == 2 * GB


@pytest.mark.parametrize("io", ["mmap", "read"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.bfloat16)], ids=str)
def test_staged_slices_equal_the_files(tmp_path, io, dtypes):
    """Odd sizes and two dtypes: every tensor is aligned in its buffer."""
    shapes = [(1,), (70_001,), (0, 8), (131_073,), (5,)]
    sides = [{f"w{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)} for dtype in dtypes]
    paths = [save(tmp_path / name, tensors) for name, tensors in zip("ab", sides, strict=True)]
    with contextlib.closing(open_pair(*paths, io=io)) as opened:
        matches = list(enumerate(opened.matches))
        slices = list(streaming.split_matches(matches, 1))
        assert len(slices) > len(matches)
        for item, tensors in streaming.stage_slices(opened, slices, streaming.min_slice_bytes(matches), CPU):
            for tensor, expected in zip(tensors(), sides, strict=True):
                assert tensor.data_ptr() % ALIGNMENT == 0
                assert torch.equal(tensor, expected[item.match.name].view(-1)[item.begin : item.end])


def test_a_slice_is_released_only_when_the_next_is_requested(monkeypatch, tmp_path):
    log: list[str] = []
    monkeypatch.setattr(StagingBuffer, "acquire", lambda buffer: log.append("acquire"))
    monkeypatch.setattr(StagingBuffer, "release", lambda buffer: log.append("release"))
    paths = [save(tmp_path / name, {"w": torch.ones(200_000)}) for name in "ab"]
    with contextlib.closing(open_pair(*paths)) as opened:
        matches = list(enumerate(opened.matches))
        slices = streaming.split_matches(matches, 1)
        for _, tensors in streaming.stage_slices(opened, slices, streaming.min_slice_bytes(matches), CPU):
            tensors()
            log.append("count")
    assert log == ["acquire", "count", "release"] * 4
