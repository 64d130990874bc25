"""Runs the benchmarks, writes benchmarks/results/<machine>.json, updates the pages that quote them, prints a table.

Arguments are passed to pytest. If they select some of the benchmarks, the earlier results of the others are kept.

    python benchmarks/run.py --paper-checkout CHECKOUT --paper-python PYTHON
    python benchmarks/run.py benchmarks/bench_step.py
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import harness, pages
from benchmarks.tables import table
from opdkernels.benchmark.machine import instruction_set
from opdkernels.runs.run_dir import processor

RESULTS = Path(__file__).parent / "results"


def merge_results(before: list[dict], now: list[dict]) -> list[dict]:
    """Every benchmark once, with its latest results, in the order of first appearance."""
    latest = {row["name"]: row for row in (*before, *now)}
    return list(latest.values())


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        status = pytest.main(
            [
                *([] if any(a.startswith("benchmarks/") for a in sys.argv[1:]) else ["benchmarks"]),
                "-o",
                "python_files=bench_*.py",
                "-p",
                "no:randomly",
                f"--benchmark-json={raw}",
                "--benchmark-disable-gc",
                *sys.argv[1:],
            ]
        )
        if not raw.exists() or not raw.stat().st_size:
            return int(status)
        measured = json.loads(raw.read_text())["benchmarks"]
    name = re.sub(r"[^a-z0-9]+", "-", f"{processor()}-{instruction_set()}".lower()).strip("-")
    path = RESULTS / f"{name}.json"
    results = {
        "machine": harness.machine_line(),
        "read_bandwidth_bytes_per_s": {str(t): harness.read_bandwidth(t) for t in (1, os.cpu_count() or 1)},
        "benchmarks": [
            {
                "name": re.sub(r"^test_", "", b["name"]).replace("_", " "),
                "median_s": b["stats"]["median"],
                "rounds": b["stats"]["rounds"],
                "metrics": b["extra_info"],
            }
            for b in measured
        ],
    }
    if path.exists():
        results["benchmarks"] = merge_results(json.loads(path.read_text())["benchmarks"], results["benchmarks"])
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    pages.update()
    print(table(results))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
