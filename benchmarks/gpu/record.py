"""Results: one JSON file per machine, and its Markdown tables."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
UNMEASURED = "Not measured on a GPU yet; `make gpu` measures and writes this table."
MARKS = {"passed": "yes", "failed": "**failed**", "inconclusive": "inconclusive", "not reached": "not reached"}


CUDA = (
    "csrc/common/numeric.h",
    "csrc/{0}/{0}.h",
    "csrc/common/cuda/grid.h",
    "csrc/common/cuda/active.h",
    "csrc/{0}/cuda.cu",
    "opdkernels/ops/{0}/cuda.py",
)
KERNELS = {
    "CUDA library": CUDA,
    "NVRTC": (*CUDA, "opdkernels/backends/cuda/launch.py"),
    "Triton": (
        "opdkernels/ops/{0}/triton.py",
        "opdkernels/backends/triton/numeric.py",
        "opdkernels/backends/triton/launch.py",
    ),
}  # the files from which an implementation of a family is compiled
CHANGED = "†"


def sources_of(family: str, implementation: str, root: Path = ROOT) -> str:
    """A digest of the kernel sources that were timed; "" for eager PyTorch."""
    files = [root / name.format(family) for name in KERNELS.get(implementation, ())]
    return (
        hashlib.blake2b(b"".join(path.read_bytes() for path in files if path.exists()), digest_size=8).hexdigest()
        if files
        else ""
    )


def slug(name: str) -> str:
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(folder: Path, results: dict[str, Any]) -> Path:
    """Writes the JSON of a machine. Units that this run left out keep their earlier results."""
    path = folder / f"{slug(results['machine']['name'])}.json"
    if path.exists():
        ran = {group for unit in results["units"] for group in [unit["group"]]}
        results = {
            **results,
            "units": [unit for unit in json.loads(path.read_text())["units"] if unit["group"] not in ran]
            + results["units"],
        }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def checks_table(units: list[dict[str, Any]]) -> list[str]:
    """One row per family and backend, one column per check."""
    checks = [unit for unit in units if unit["group"] == "check"]
    names = list(dict.fromkeys(unit["name"] for unit in checks))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for unit in checks:
        rows.setdefault((unit["workload"], unit["backend"]), {})[unit["name"]] = MARKS[unit["status"]]
    lines = [
        f"| family | backend | {' | '.join(name.replace('_', ' ') for name in names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    lines += [
        f"| {family} | {backend} | {' | '.join(marks.get(name, '') for name in names)} |"
        for (family, backend), marks in rows.items()
    ]
    return lines if checks else []


def checks_line(units: list[dict[str, Any]]) -> list[str]:
    """How many checks passed, and the names of those that failed, were inconclusive or were not reached."""
    checks = [unit for unit in units if unit["group"] != "time"]
    parts = [f"{sum(unit['status'] == 'passed' for unit in checks)} of {len(checks)} checks passed"]
    for status, mark in list(MARKS.items())[1:]:
        what = dict.fromkeys(
            f"{unit['name'].replace('_', ' ')} ({unit['backend']})" for unit in checks if unit["status"] == status
        )
        parts += [f"{mark}: {', '.join(what)}"] if what else []
    return [f"{'; '.join(parts)} ([list](gpu.md))."] if checks else []


def timings_table(units: list[dict[str, Any]]) -> list[str]:
    """One row per workload and implementation, compared with eager PyTorch."""
    rows = [row for unit in units for row in unit.get("rows", []) if "workload" in row]
    eager = {row["workload"]: row["median_s"] for row in rows if row["implementation"] == "eager PyTorch"}
    lines = [
        "| workload | implementation | median | rate | fraction of limit | speedup over eager | extra memory |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    order, marked = list(dict.fromkeys(row["workload"] for row in rows)), False
    for row in sorted(rows, key=lambda row: order.index(row["workload"])):
        rate = (
            f"{row['bytes_per_s'] / 1e9:.4g} GB/s"
            if "bytes_per_s" in row
            else f"{row['flops_per_s'] / 1e12:.3g} TFLOP/s"
        )
        times = f"{eager[row['workload']] / row['median_s']:.3g}" if row["workload"] in eager else ""
        memory = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:,.0f} MB"
        mark = CHANGED if row["sources"] != sources_of(row["family"], row["implementation"]) else ""
        marked = marked or bool(mark)
        cells = [
            row["workload"],
            f"{row['implementation']}{mark}",
            f"{1000 * row['median_s']:.4g} ms",
            rate,
            f"{100 * row['fraction_of_limit']:.0f} %",
            times,
            memory,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    late = [
        f"{unit['workload']} ({unit['name']})"
        for unit in units
        if unit["group"] == "time" and unit["status"] == "not reached"
    ]
    lines += [f"\n{CHANGED} The kernels or their shared code have changed since this measurement."] if marked else []
    return (lines if rows else []) + ([f"\nNot reached in time: {', '.join(late)}."] if late else [])


def table(results: dict[str, Any], checks: Callable[[list[dict[str, Any]]], list[str]] = checks_table) -> str:
    """Markdown: machine, limits, checks and timings."""
    units, machine = results["units"], results["machine"]
    limits = {row["limit"]: row["per_s"] for unit in units for row in unit.get("rows", []) if "limit" in row}
    about = f"{machine['name']}, torch {machine['torch']}, CUDA {machine['cuda'] or 'none'}"
    if limits:
        products = [f"{limits[name] / 1e12:.3g} TFLOP/s by a product in {name.split()[0]}" for name in list(limits)[1:]]
        about += f"; limits: {limits['copy'] / 1e9:.4g} GB/s by a copy, {' and '.join(products)}"
    parts = [checks(units), timings_table(units)]
    return "\n".join([about, *(line for part in parts if part for line in ("", *part))])
