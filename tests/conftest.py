"""Fixtures: each compiled instruction set, and pairs of tensors that hold every kind of value."""

from __future__ import annotations

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # read when torch is loaded; on a busy machine waiting threads must not spin

import numpy as np
import pytest
import torch

from tests.backends import shown

try:
    from opdkernels import _C
except ImportError:
    _C = None

ISAS = _C.available_isas() if _C else []


@pytest.fixture(params=ISAS or [pytest.param("none", marks=pytest.mark.skip(reason="no compiled kernels"))])
def isa(request):
    before = _C.current_isa()
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_pair(n: int, source_dtype=torch.bfloat16, trained_dtype=None, *, seed=0, hostile=True):
    """A pair like a small update of a weight matrix; `hostile` sprinkles NaN, Inf, signed zeros, subnormals and extremes."""
    rng = np.random.default_rng(seed)
    source = rng.normal(0, 0.02, n) * np.exp(rng.normal(0, 1, n))
    trained = source + 1e-5 * rng.normal(0, 1, n) * np.exp(2 * rng.normal(0, 1, n))
    trained[::2] = source[::2]
    if hostile:
        for side in (source, trained):
            for start, step, value in (
                (0, 97, np.nan),
                (5, 101, np.inf),
                (6, 103, -np.inf),
                (7, 89, 0.0),
                (8, 93, -0.0),
                (9, 91, 3.3e38),
                (10, 95, -3.3e38),
                (11, 87, 1e-40),
                (12, 85, 1.0),
                (13, 83, 2.0**-7),
            ):
                side[start::step] = value
            rng.shuffle(side[: n // 3])

    def as_tensor(x, dtype):
        return torch.from_numpy(x.copy()).to(dtype)

    return as_tensor(source, source_dtype), as_tensor(trained, trained_dtype or source_dtype)


def pytest_terminal_summary(terminalreporter):
    for line in shown.lines(report.nodeid for report in terminalreporter.getreports("passed")):
        terminalreporter.write_line(line)
    if not torch.cuda.is_available():
        terminalreporter.write_line(
            "not proved here, for want of a GPU: speed, races between threads, the order of atomics, launches through a driver (docs/gpu.md)"
        )
