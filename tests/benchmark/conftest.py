"""A benchmark's result with handwritten numbers."""

from __future__ import annotations

from typing import Any


def timing(
    median_s: float, work: float, limit: float, ours_s: float | None = None, extra_bytes: int | None = None
) -> dict[str, Any]:
    return {
        "median_s": median_s,
        "fastest_s": 0.9 * median_s,
        "slowest_s": 1.5 * median_s,
        "rounds": 7,
        "per_s": work / median_s,
        "fraction_of_limit": work / median_s / limit,
        "speedup": median_s / ours_s if ours_s else None,
        "extra_bytes": extra_bytes,
    }


def make_result(**changes: Any) -> dict[str, Any]:
    """Of three workloads: one faster than plain PyTorch, one slower, one that failed."""
    rows = [
        {
            "workload": "delta of a bf16 pair",
            "family": "delta",
            "size": "1,000 coordinates",
            "compared_with": "sums and counts",
            "backend": "cpu",
            "work": 4e6,
            "unit": "bytes",
            "limit": "read",
            "timings": {
                "opdkernels": timing(0.001, 4e6, 8e9, extra_bytes=2_000_000),
                "eager": timing(0.0425, 4e6, 8e9, 0.001, 1_500_000_000),
                "compile": timing(0.003, 4e6, 8e9, 0.001),
            },
            "errors": {},
        },
        {
            "workload": "gram of a bf16 pair",
            "family": "gram",
            "size": "[4,864, 896]",
            "compared_with": "fp64 products",
            "backend": "cpu",
            "work": 3e10,
            "unit": "operations",
            "limit": "fp64 product",
            "timings": {"opdkernels": timing(1.5, 3e10, 5e10), "eager": timing(1.2, 3e10, 5e10, 1.5)},
            "errors": {},
        },
        {
            "workload": "scatter of a bf16 pair",
            "family": "patch",
            "size": "1,000 coordinates",
            "compared_with": "clone and index_copy_",
            "backend": "cpu",
            "work": 4e6,
            "unit": "bytes",
            "limit": "read",
            "timings": {"eager": timing(0.002, 4e6, 8e9)},
            "errors": {"opdkernels": "the result differs"},
        },
    ]
    return {
        "format": "opdkernels benchmark",
        "schema_version": 1,
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": 61.0,
        "machine": {
            "processor": "Some CPU",
            "instruction_set": "avx2",
            "cores": 2,
            "threads": 2,
            "load_average": 0.1,
            "gpu": None,
            "torch": "2.11.0",
            "python": "3.12.1",
            "opdkernels": "0.1.0",
        },
        "options": {"device": "cpu", "against": ["eager", "compile"], "family": [], "threads": None, "quick": False},
        "limits": {"read": {"unit": "bytes", "per_s": 8e9}, "fp64 product": {"unit": "operations", "per_s": 5e10}},
        "rows": rows,
        **changes,
    }
