"""Kernels without a library: what is handed to CuPy, of which only NVRTC could be here."""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opdkernels.backends import cuda
from opdkernels.backends.cuda import launch
from opdkernels.backends.cuda.sources import source_of


@pytest.fixture
def started(monkeypatch):
    """What a CuPy that only writes down was asked for."""
    log = SimpleNamespace(modules=[], launches=[])

    class Function:
        max_dynamic_shared_size_bytes = 0

        def __init__(self, name):
            self.name = name

        def __call__(self, grid, block, arguments, *, shared_mem):
            assert shared_mem <= self.max_dynamic_shared_size_bytes
            log.launches.append((self.name, grid, block, arguments, shared_mem))

    def module(**options):
        log.modules.append(options)
        return SimpleNamespace(get_function=Function)

    here = SimpleNamespace(Device=lambda index: contextlib.nullcontext(), ExternalStream=lambda stream, index: contextlib.nullcontext())
    monkeypatch.setattr(launch.importlib, "import_module", lambda name: SimpleNamespace(RawModule=module, cuda=here))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return log


def test_a_kernel_is_compiled_once_and_started_with_eight_byte_arguments(started):
    kernels = launch.Compiled()
    for n in (5, 6):
        kernels.launch("delta_carry", [n, 0], 3, 64, 70_000, torch.device("cuda", 0))
    ((module,), launches) = started.modules, started.launches
    assert module["options"] == launch.OPTIONS
    assert "--fmad=false" in launch.OPTIONS
    assert [launch[:3] for launch in launches] == [("delta_carry", (3,), (64,))] * 2
    assert [type(a) for a in launches[0][3]] == [np.int64] * 2
    assert launches[1][3] == (6, 0)
    assert launches[1][4] == 70_000


@pytest.mark.parametrize("family", sorted(set(cuda.FAMILIES.values())))
def test_the_source_is_one_text_so_that_a_cache_sees_every_change(family):
    source = source_of(family)
    assert not re.search(r'^#include "', source, flags=re.MULTILINE)
    assert source.count("float_to_bf16(float x) {") == 1
    assert f"{family}_" in source
