"""Kernels through NVRTC: the calls of CuPy, recorded."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opdkernels.backends.cuda import launch, sources
from opdkernels.backends.cuda.sources import family_source


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The calls of a fake CuPy that records them."""
    log = SimpleNamespace(compiled=[], launches=[])

    class Function:
        max_dynamic_shared_size_bytes = 0

        def __init__(self, name):
            self.name = name

        def __call__(self, grid, block, arguments, *, shared_mem):
            assert shared_mem <= self.max_dynamic_shared_size_bytes
            log.launches.append((self.name, grid, block, arguments, shared_mem))

    def compile_using_nvrtc(source, options, filename):
        log.compiled.append(options)
        return source.encode(), {}

    def module(path):
        assert "delta_count_bf16" in Path(path).read_text()
        return SimpleNamespace(get_function=Function)

    class Device(contextlib.nullcontext):
        compute_capability = "90"

    nvrtc = SimpleNamespace(getVersion=lambda: (13, 0))
    here = SimpleNamespace(Device=Device, ExternalStream=lambda stream, index: contextlib.nullcontext(), nvrtc=nvrtc)
    modules = {
        "cupy": SimpleNamespace(RawModule=module, cuda=here),
        "cupy.cuda.compiler": SimpleNamespace(compile_using_nvrtc=compile_using_nvrtc),
    }
    monkeypatch.setattr(launch.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    launch.cache_dir.cache_clear()
    yield log
    launch.cache_dir.cache_clear()


def test_kernel_is_compiled_once_and_gets_8_byte_arguments(started):
    """By NVRTC itself: CuPy's own compilation of a module adds an option that flushes subnormals to zero."""
    kernels = launch.NvrtcKernels()
    for n in (5, 6):
        kernels.launch("delta_count_bf16", [n, 0], 3, 64, 70_000, torch.device("cuda", 0))
    launches = started.launches
    assert started.compiled == [launch.OPTIONS]
    assert "--fmad=false" in launch.OPTIONS
    assert [launch[:3] for launch in launches] == [("delta_count_bf16", (3,), (64,))] * 2
    assert [type(a) for a in launches[0][3]] == [np.int64] * 2
    assert launches[1][3] == (6, 0)
    assert launches[1][4] == 70_000


def test_compiled_kernels_are_cached_for_other_processes(started):
    for _ in range(2):
        launch.NvrtcKernels().launch("delta_count_bf16", [1, 0], 1, 32, 0, torch.device("cuda", 0))
    assert len(started.compiled) == 1
    assert len(started.launches) == 2
    assert [path.suffix for path in launch.cache_dir().iterdir()] == [".cubin"]


def test_without_a_writable_cache_a_process_has_its_own(started, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    launch.NvrtcKernels().launch("delta_count_bf16", [1, 0], 1, 32, 0, torch.device("cuda", 0))
    (kept,) = launch.process_dir().glob("delta-*.cubin")
    assert "delta_count_bf16" in kept.read_text()
    assert len(started.launches) == 1


@pytest.mark.parametrize("family", [path.parent.name for path in sorted(sources.source_dir().glob("*/cuda.cu"))])
def test_source_includes_everything_the_cache_key_must_cover(family):
    source = family_source(family)
    assert not re.search(r'^#include "', source, flags=re.MULTILINE)
    assert source.count("float_to_bf16(float x) {") == 1
    assert f"{family}_" in source
