"""The lines at the end of the tests say what was shown of each family, and only that."""

from __future__ import annotations

from collections import Counter

from tests.backends import shown
from tests.backends.shown import Code

PASSED = [
    "tests/ops/delta/test_delta_cuda.py::test_cuts[0]",
    "tests/ops/delta/test_delta_cuda.py::test_a_missing_barrier_is_caught[0]",
    "tests/ops/delta/test_delta_cuda.py::test_divergent_threads_are_refused[shuffle]",
    "tests/ops/delta/test_delta.py::test_a_missing_argument_is_refused",
]


def test_a_line_a_family(monkeypatch):
    code = [
        Code("delta", "nvcc", "sm_80", 64, 0, 4),
        Code("delta", "nvcc", "sm_90", 122, 0, 0),
        Code("gram", "Triton", "sm_80", 90, 3, 0),
    ]
    monkeypatch.setattr(shown, "CODE", code)
    monkeypatch.setattr(shown, "INTERPRETED", Counter({"delta": 39}))
    assert shown.lines(PASSED) == [
        "delta: 39 tests in Triton's interpreter; nvcc for sm_80, sm_90: at most 122 registers, no spills, 16-byte loads; "
        "1 tests of CUDA C++ on fibers; 2 of spoilt kernels",
        "gram: Triton for sm_80: at most 90 registers, 3 spills, no 16-byte loads",
    ]


def test_nothing_is_said_of_what_did_not_run(monkeypatch):
    monkeypatch.setattr(shown, "CODE", [])
    monkeypatch.setattr(shown, "INTERPRETED", Counter())
    assert shown.lines([]) == []
