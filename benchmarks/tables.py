"""Markdown tables of the CPU benchmarks, from the JSON that `benchmarks/run.py` writes."""

from __future__ import annotations

from typing import Any

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
    """A metric of a benchmark with its unit."""
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


def table(results: dict[str, Any]) -> str:
    """One row per benchmark of a machine."""
    rows = [f"{results['machine']}", "", "| benchmark | median | metrics |", "|---|---:|---|"]
    for row in results["benchmarks"]:
        metrics = ", ".join(format_metric(name, value) for name, value in row["metrics"].items())
        rows.append(f"| {row['name']} | {1000 * row['median_s']:.4g} ms | {metrics} |")
    return "\n".join(rows)
