"""Fixtures: each compiled instruction set, thread counts; and the summary of what the tests of GPU kernels show."""

from __future__ import annotations

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # read when torch is loaded: waiting threads must not spin on a busy machine

import pytest
import torch

from tests.backends import summary

try:
    from opdkernels import native
except ImportError:
    native = None

ISAS = native.available_isas() if native else []


@pytest.fixture(params=ISAS or [pytest.param("none", marks=pytest.mark.skip(reason="no compiled kernels"))])
def isa(request):
    before = native.current_isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """With pytest-xdist, a worker sends to the controller what its tests of GPU kernels covered."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["kernels"] = summary.to_builtins()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if error is None:
        summary.add(node.workeroutput["kernels"])


def pytest_terminal_summary(terminalreporter):
    for line in summary.summary_lines(report.nodeid for report in terminalreporter.getreports("passed")):
        terminalreporter.write_line(line)
    if not torch.cuda.is_available():
        terminalreporter.write_line(
            "not tested without a GPU: speed, races, the order of atomics, launches through a driver (docs/gpu.md)"
        )
