"""A finished run in a few lines, for the terminal."""

from __future__ import annotations

from typing import Any

from opdkernels.analysis.result import Analysis
from opdkernels.errors import printable
from opdkernels.formatting import byte_size, measure, percent, times

MOST_LISTED = 10


def spectral(spectra: dict[str, Any] | None) -> list[str]:
    """Medians over matrices, and what chance would show."""
    if not spectra or not spectra["metrics"]:
        return []
    metrics = {name: centre["median"] for name, centre in spectra["metrics"].items()}
    rows = [
        ("stable rank, and of a random update", "stable_rank", measure, metrics["stable_rank_null"]),
        ("energy of the 16 top directions", "energy_16", percent, metrics["energy_16_null"]),
        ("energy within the top tenths of W", "projection_10pct", percent, metrics.get("projection_10pct_chance")),
        ("principal coverage at 10 %", "principal_coverage_10pct", percent, 0.1),
    ]
    known = spectra["matrices"] - sum(spectra["without"].values())
    text = [f"{f'median over {known} matrices':34}{'stored':>12}{'by chance':>12}"]
    return text + [
        f"{label:34}{show(metrics[key]):>12}{show(chance):>12}" for label, key, show, chance in rows if key in metrics
    ]


def format_text(result: Analysis) -> list[str]:
    """Both views side by side, what rounding alone would show, and what was left out."""
    summary, views = result.summary, result.summary["views"]
    names = {record.index: record.name for record in result.records}
    matched = summary["matched"]
    text = [f"{matched['tensors']} tensors, {matched['parameters']:,} parameters"]
    if views:
        stored, visible = views["stored"], views["visible"]
        if summary["identical"]:
            text.append("identical: every coordinate has the same bits")
        else:
            text.append(
                f"{stored['bit_equal_tensors']} of {stored['tensors']} tensors are bit-identical, and {percent(stored['bit_equal'] / max(1, stored['numel']))} of the coordinates"
            )
            text.append(f"{'':34}{'stored':>12}{'visible':>12}   (visible: both rounded to bf16)")
            for label, key, show in (
                ("unchanged", "frac_zero", percent),
                ("|delta| <= 1e-5", "frac_le_1e-5", percent),
                ("relative norm", "relative_norm", percent),
                ("energy of the top 1 %", "top_energy_1pct", percent),
                ("near-zero coverage at 10 %", "near_zero_coverage_10pct", percent),
            ):
                text.append(f"{label:34}{show(stored[key]):>12}{show(visible[key]):>12}")
            kinds = ", ".join(f"{kind} in {count}" for kind, count in summary["null_kinds"].items())
            text.append(
                f"{'changed, over rounding alone':34}{'':>12}{times(visible['changed_over_null']):>12}   (nearest null: {kinds} tensors)"
            )
            text.append(
                f"{'near-zero coverage, the same':34}{'':>12}{times(visible['near_zero_coverage_10pct_over_null']):>12}"
            )
    text += spectral(summary.get("spectra"))
    for title, items in (
        ("excluded", [f"{u['name']} ({u['side']}): {u['reason']}" for u in summary["excluded"]]),
        ("not in both", [f"{u['name']} ({u['side']}): {u['reason']}" for u in summary["unmatched"]]),
        ("failed", [f"{f['name']}: {f['reason']}" for f in summary["failed"]]),
        ("without spectra", [f"{names[r.index]}: {r.reason}" for r in result.uncomputed]),
        ("NaN or Inf", [f"{f['name']}: {f['coordinates']} coordinates left out" for f in summary["nonfinite"]]),
        ("note", summary["notes"]),
    ):
        text += [f"{title}: {printable(item)}" for item in items[:MOST_LISTED]]
        if len(items) > MOST_LISTED:
            text.append(f"{title}: {len(items) - MOST_LISTED} more in summary.json")
    if result.path is not None:
        size = sum(fact["bytes"] for side in result.run["inputs"].values() for fact in side["files"])
        text.append(f"{byte_size(size)} in {result.run['seconds']:.2f} s; written to {printable(str(result.path))}")
    return text
