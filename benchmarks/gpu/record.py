"""Results: one JSON file per machine, and its Markdown tables."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.predictions import TOLERANCE, is_missed

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
UNMEASURED = "Not measured on a GPU yet; `make gpu` measures and writes this table."
NOT_CAPTURABLE = "not capturable"  # by a CUDA graph
MARKS = {
    "passed": "yes",
    "failed": "**failed**",
    NOT_CAPTURABLE: NOT_CAPTURABLE,
    "inconclusive": "inconclusive",
    "not reached": "not reached",
}


CUDA = (
    "csrc/common/numeric.h",
    "csrc/{0}/{0}.h",
    "csrc/common/cuda/grid.h",
    "csrc/common/cuda/active.h",
    "csrc/common/cuda/packed.h",
    "csrc/common/cuda/queue.h",
    "csrc/{0}/cuda.cu",
    "csrc/{0}/cuda_pair.inl",
    "opdkernels/ops/{0}/cuda.py",
)
KERNELS = {
    "CUDA library": CUDA,
    "NVRTC": (*CUDA, "opdkernels/backends/cuda/launch.py"),
    "Triton": (
        "opdkernels/ops/{0}/triton.py",
        "opdkernels/backends/triton/numeric.py",
        "opdkernels/backends/triton/launch.py",
        "opdkernels/backends/triton/tables.py",
    ),
}  # the files from which an implementation of a family is compiled
CHANGED, MISSED = "†", "‡"


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


def rows_of(units: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows that have a key: "workload" for timings, "limit", "instruction" or "pair" for others."""
    return [row for unit in units for row in unit.get("rows", []) if key in row]


def range_text(bounds: list[float], scale: float = 1) -> str:
    """A predicted range, or one number."""
    return "–".join(dict.fromkeys(f"{scale * bound:.3g}" for bound in bounds))


def prediction_cell(expected: list[float] | None, measured: float, scale: float = 1, unit: str = "") -> str:
    """What is predicted, with a mark where it is missed."""
    if not expected:
        return ""
    return f"{range_text(expected, scale)}{unit}{MISSED if is_missed(measured, expected) else ''}"


def graph_reason(row: dict[str, Any]) -> str:
    """Says that a call has no time in a graph because it cannot be captured; "" for other reasons."""
    return NOT_CAPTURABLE if row.get("graph_note", "").startswith(NOT_CAPTURABLE) else ""


def timing_cells(row: dict[str, Any], eager: dict[str, float], with_graphs: bool, with_predictions: bool) -> list[str]:
    """The cells of a row of the timings."""
    rate = (
        f"{row['bytes_per_s'] / 1e9:.4g} GB/s" if "bytes_per_s" in row else f"{row['flops_per_s'] / 1e12:.3g} TFLOP/s"
    )
    mark = CHANGED if row["sources"] != sources_of(row["family"], row["implementation"]) else ""
    graph_s = row.get("graph_s")
    graph = f"{1000 * graph_s:.4g} ms, {100 * row['graph_fraction_of_limit']:.0f} %" if graph_s else graph_reason(row)
    prediction = prediction_cell(row.get("expected_s"), graph_s or row["median_s"], 1000, " ms")
    return [
        row["workload"],
        f"{row['implementation']}{mark}",
        f"{1000 * row['median_s']:.4g} ms",
        *([graph] if with_graphs else []),
        *([prediction] if with_predictions else []),
        rate,
        f"{100 * row['fraction_of_limit']:.0f} %",
        f"{eager[row['workload']] / row['median_s']:.3g}" if row["workload"] in eager else "",
        "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:,.0f} MB",
    ]


def table_lines(names: list[str], num_text: int, rows: list[list[str]]) -> list[str]:
    """A Markdown table whose first columns are text, the others numbers."""
    rule = "|".join("---" if i < num_text else "---:" for i in range(len(names)))
    header, *body = (f"| {' | '.join(cells)} |" for cells in (names, *rows))
    return [header, f"|{rule}|", *body]


def timings_table(units: list[dict[str, Any]]) -> list[str]:
    """One row per workload and implementation, compared with eager PyTorch."""
    rows = rows_of(units, "workload")
    eager = {row["workload"]: row["median_s"] for row in rows if row["implementation"] == "eager PyTorch"}
    with_graphs = any(row.get("graph_s") or graph_reason(row) for row in rows)
    with_predictions = any(row.get("expected_s") for row in rows)
    names = ["workload", "implementation", "median"]
    names += ["in a graph"] * with_graphs + ["predicted"] * with_predictions
    names += ["rate", "fraction of limit", "speedup over eager", "extra memory"]
    order = list(dict.fromkeys(row["workload"] for row in rows))
    cells = [
        timing_cells(row, eager, with_graphs, with_predictions)
        for row in sorted(rows, key=lambda row: order.index(row["workload"]))
    ]
    lines = table_lines(names, 2, cells) if rows else []
    lines += footnotes(lines)
    late = [
        f"{unit['workload']} ({unit['name']})"
        for unit in units
        if unit["group"] == "time" and unit["status"] == "not reached"
    ]
    return lines + ([f"\nNot reached in time: {', '.join(late)}."] if late else [])


def footnotes(lines: list[str]) -> list[str]:
    """What the marks in a table mean."""
    texts = {
        CHANGED: "The kernels or their shared code have changed since this measurement.",
        MISSED: f"More than {100 * TOLERANCE:.0f} % outside the predicted range.",
    }
    return [f"\n{mark} {text}" for mark, text in texts.items() if any(mark in line for line in lines)]


def atomics_table(units: list[dict[str, Any]]) -> list[str]:
    """Cycles of instructions on shared memory, next to what the model of the kernels predicts."""
    cells = [
        [
            f"{row['instruction']}, {row['pattern']}",
            f"{row['cycles']:.3g}",
            f"{row['wavefronts']:.3g}",
            prediction_cell(row["predicted_cycles"], row["cycles"]),
        ]
        for row in rows_of(units, "instruction")
    ]
    names = ["instruction of a warp on shared memory", "cycles", "wavefronts", "predicted cycles"]
    lines = table_lines(names, 1, cells) if cells else []
    return lines + footnotes(lines)


def pair_lines(units: list[dict[str, Any]]) -> list[str]:
    """The pair of a large model, in a sentence."""
    return [
        f"{row['pair']}, {row['coordinates'] / 1e9:.3g} G coordinates, {100 * row['changed']:.0f} % changed: analysed "
        f"from host memory in {row['analyze_s']:.3g} s, {row['bytes_per_s'] / 1e9:.3g} GB/s; generated on the device "
        f"and copied to the host in {row['generate_s']:.3g} s."
        for row in rows_of(units, "pair")
    ]


def table(results: dict[str, Any], checks: Callable[[list[dict[str, Any]]], list[str]] = checks_table) -> str:
    """Markdown: machine, limits, checks and timings."""
    units, machine = results["units"], results["machine"]
    limits = {row["limit"]: row["per_s"] for row in rows_of(units, "limit")}
    about = f"{machine['name']}, torch {machine['torch']}, CUDA {machine['cuda'] or 'none'}"
    if limits:
        products = [f"{limits[name] / 1e12:.3g} TFLOP/s by a product in {name.split()[0]}" for name in list(limits)[1:]]
        about += f"; limits: {limits['copy'] / 1e9:.4g} GB/s by a copy, {' and '.join(products)}"
    parts = [checks(units), atomics_table(units), timings_table(units), pair_lines(units)]
    return "\n".join([about, *(line for part in parts if part for line in ("", *part))])
