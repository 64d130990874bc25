"""The table of an experiment as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opdkernels.formatting import percent

COLUMNS = {
    "update_fraction": "update fraction",
    "trained": "trained",
    "mask_recall": "mask recall",
    "changed_visible": "changed in bf16",
    "changed_null": "expected from bf16 rounding alone",
    "changed_stored": "changed as stored",
    "relative_norm": "relative norm",
    "near_zero_coverage_10pct": "near-zero coverage at 10 %",
}
DERIVED_ONLY = ("update_fraction", "mask_recall")  # only arms that are derived from another arm's run have these


def markdown(result: Mapping[str, Any]) -> str:
    """An experiment's question, sizes and table."""
    plural = "s" if result["seeds"] > 1 else ""
    intervals = "95 % intervals" + ("" if result["seeds"] > 1 else " over prompts only")
    sizes = f"{result['seeds']} seed{plural}, {result['prompts']:,} eval prompts, {result['steps']} steps; {intervals}"
    return "\n".join([result["about"], "", sizes, "", *table(result["rows"])]) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of the table.

    Uninformative columns are dropped: those that at most one arm reports (except the columns of derived arms), the
    trained fraction if every arm trains all weights, and the stored change if it equals the visible one.
    """
    uninformative = set()
    if all(row.get("trained") in (1, None) for row in rows):
        uninformative.add("trained")
    if all(row.get("changed_stored") == row.get("changed_visible") for row in rows):
        uninformative.add("changed_stored")

    def is_shown(column: str) -> bool:
        least = 1 if column in DERIVED_ONLY else min(2, len(rows) - 1)
        return column not in uninformative and sum(row.get(column) is not None for row in rows) >= least

    columns = [column for column in COLUMNS if is_shown(column)]
    header = ["arm", "score", "gain retained", *(COLUMNS[column] for column in columns)]
    lines = [f"| {' | '.join(header)} |", "|---|---|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = [
            row["arm"].replace("|", r"\|"),
            with_interval(row, "score", "{:.3f}".format),
            with_interval(row, "gain_retained", lambda value: percent(value, 0)),
            *(cell(column, row.get(column)) for column in columns),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def cell(column: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2g} %" if column == "relative_norm" else percent(value, 1)


def with_interval(row: Mapping[str, Any], name: str, text: Callable[[float], str]) -> str:
    """A value and its interval, such as `12 % (10 to 14)`; empty if the row has none."""
    if row.get(name) is None:
        return ""
    value, low, high = (text(row[name + end]) for end in ("", "_low", "_high"))
    return f"{value} ({low.removesuffix(' %')} to {high.removesuffix(' %')})"
