"""Runs the benchmarks, writes benchmarks/results/<machine>.json, updates the README and prints the machine's table.

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
from benchmarks import harness

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
UNITS = {
    "pairs_per_s": ("G pairs/s", 1e9),
    "coordinates_per_s": ("G coordinates/s", 1e9),
    "values_per_s": ("G values/s", 1e9),
    "bytes_per_s": ("GB/s", 1e9),
    "flops_per_s": ("GFLOP/s", 1e9),
    "anonymous_bytes": ("MB anonymous", 1e6),
    "paper_script_bytes": ("MB paper script", 1e6),
    "extra_bytes": ("MB extra", 1e6),
    "peak_bytes": ("MB at most", 1e6),
    "trl_bytes": ("MB TRL's", 1e6),
    "full_logits_bytes": ("MB with full logits", 1e6),
    "checkpoint_bytes": ("GB in two checkpoints", 1e9),
    "largest_bytes": ("GB for the largest matrix", 1e9),
}


def format_metric(name: str, value: float) -> str:
    if name in UNITS:
        unit, scale = UNITS[name]
        return f"{value / scale:.3g} {unit}"
    if "fraction_of_" in name:
        what, limit = name.split("fraction_of_")
        return f"{what.replace('_', ' ')}{100 * value:.0f} % of {limit} bandwidth"
    if name.endswith("_bytes_per_s"):
        return f"{name.removesuffix('_bytes_per_s').replace('_', ' ')} {value / 1e9:.3g} GB/s"
    if name.startswith("error_of_"):
        return f"error of {name.removeprefix('error_of_').replace('_', ' ')} {100 * value:.3g} %"
    if name.startswith("over_"):
        return f"{value:.3g} × {name.removeprefix('over_').replace('_', ' ')}"
    if name.endswith("_s"):
        return f"{name.removesuffix('_s').replace('_', ' ')} {value:.3g} s"
    return f"{name} {value:.4g}"


def table(results: dict) -> str:
    """A Markdown table with one row per benchmark."""
    rows = [f"{results['machine']}", "", "| benchmark | median | metrics |", "|---|---:|---|"]
    for row in results["benchmarks"]:
        metrics = ", ".join(format_metric(k, v) for k, v in row["metrics"].items())
        rows.append(f"| {row['name']} | {1000 * row['median_s']:.4g} ms | {metrics} |")
    return "\n".join(rows)


def update_readme() -> None:
    """Writes the tables of all measured machines into the README, between its markers."""
    before, rest = README.read_text().split("<!-- benchmarks -->")
    after = rest.split("<!-- /benchmarks -->")[1]
    tables = "\n\n".join(table(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json")))
    README.write_text(f"{before}<!-- benchmarks -->\n{tables}\n<!-- /benchmarks -->{after}")


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
    name = re.sub(r"[^a-z0-9]+", "-", f"{harness.processor()}-{harness.instruction_set()}".lower()).strip("-")
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
    update_readme()
    print(table(results))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
