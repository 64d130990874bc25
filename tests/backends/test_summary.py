"""The summary at the end of the tests lists what was covered for each family, and nothing else."""

from __future__ import annotations

from collections import Counter

from tests.backends import summary
from tests.backends.summary import CompiledKernel

PASSED = [
    "tests/ops/delta/test_delta_cuda.py::test_cuts[0]",
    "tests/ops/delta/test_delta_cuda.py::test_missing_barrier_is_detected[0]",
    "tests/ops/delta/test_delta_cuda.py::test_divergent_threads_are_detected[shuffle]",
    "tests/ops/delta/test_delta.py::test_missing_argument_is_detected",
]


def test_one_line_per_family(monkeypatch):
    code = [
        CompiledKernel("delta", "nvcc", "sm_80", 64, 0, 4),
        CompiledKernel("delta", "nvcc", "sm_90", 122, 0, 0),
        CompiledKernel("gram", "Triton", "sm_80", 90, 3, 0),
    ]
    monkeypatch.setattr(summary, "COMPILED", code)
    monkeypatch.setattr(summary, "INTERPRETED", Counter({"delta": 39}))
    assert summary.summary_lines(PASSED) == [
        "delta: 39 tests in Triton's interpreter; "
        "nvcc for sm_80, sm_90: at most 122 registers, no spills, 16-byte loads; "
        "1 tests of CUDA C++ on fibers; 2 of broken kernels",
        "gram: Triton for sm_80: at most 90 registers, 3 spills, no 16-byte loads",
    ]


def test_no_line_without_results(monkeypatch):
    monkeypatch.setattr(summary, "COMPILED", [])
    monkeypatch.setattr(summary, "INTERPRETED", Counter())
    assert summary.summary_lines([]) == []
