"""The page of an experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opdkernels.report import charts, svg, typography
from opdkernels.report.figures import Figure, value_rows
from opdkernels.report.glossary import glossary
from opdkernels.report.tables import Cell, Column, build
from opdkernels.report.typography import percent

Row = Mapping[str, Any]
COLUMNS = [
    Column(key, "percent")
    for key in (
        "score",
        "gain_retained",
        "update_fraction",
        "trained",
        "mask_recall",
        "changed_visible",
        "changed_null",
        "changed_stored",
        "relative_norm",
        "near_zero_coverage_10pct",
    )
]


def page_context(result: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of experiment.html; `result` is the content of results.json."""
    rows = result["rows"]
    columns = [column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)]
    return {
        "title": f"Experiment {result['experiment']}",
        "sides": [
            ("student", typography.location(result["student"])),
            ("teacher", typography.location(result["teacher"] or "none")),
            ("task", typography.location(result["task"])),
        ],
        "headline": headline(result),
        "detail": result["about"],
        "interpretation": interpretation(result),
        "scores": interval_figures(
            rows, "score", "Score.", "Greedy completions of held-out prompts; the bars are 95 % intervals."
        ),
        "gains": interval_figures(
            rows,
            "gain_retained",
            "Fraction of the gain retained.",
            f"Relative to the gain of {result['reference_arm']}.",
        ),
        "table": build("arms", "Arms", [Column("arm"), *columns], [{"": cells(row)} for row in rows]),
        "curves": curves(result["snapshots"]),
        "reference_arm": result["reference_arm"],
        "analysis": result.get("analysis"),
        "run": {"command": f"experiment {result['experiment']}"},
        "run_info": [
            ("seeds", str(result["seeds"])),
            ("held-out prompts", typography.count(result["prompts"])),
            ("steps", typography.count(result["steps"])),
            ("density", percent(result["density"]) if result["density"] else "all visible changes"),
            *((name, typography.location(str(value))) for name, value in result["options"].items()),
        ],
        "glossary": glossary(["stored", "visible", *(column.key for column in columns)]),
    }


def cells(row: Row) -> dict[str, Any]:
    """A row of the table; score and gain with their intervals."""
    values = {column.key: row.get(column.key) for column in COLUMNS}
    for name in ("score", "gain_retained"):
        if row.get(name) is not None:
            values[name] = Cell(interval(row, name), typography.sort_value(row[name]))
    return values | {"arm": row["arm"]}


def interval(row: Row, name: str) -> str:
    """A value with its interval: 80 % (70 % to 90 %)."""
    value, low, high = (percent(row[key]) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} ({low} to {high})"


def interval_figures(rows: Sequence[Row], name: str, heading: str, note: str) -> list[Figure]:
    """A metric of all arms that have it, with intervals; empty where no arm has it."""
    known = [
        (row["arm"], row[name], row[f"{name}_low"], row[f"{name}_high"]) for row in rows if row.get(name) is not None
    ]
    if not known:
        return []
    arms, values, low, high = zip(*known, strict=True)
    axis = name.replace("_", " ")
    drawings = [charts.interval_chart(known, percent, heading.replace(".", ":"), axis, frame) for frame in svg.FRAMES]
    table = value_rows(("arm", None, arms), (axis, percent, values), ("low", percent, low), ("high", percent, high))
    return [Figure(heading, note, [], drawings, table)]


def curves(snapshots: Sequence[Row]) -> list[Figure]:
    """What changed along one run, at each snapshot."""
    if len(snapshots) < 2:
        return []
    steps = [row["step"] for row in snapshots]
    figures = []
    for heading, note, lines in (
        (
            "What has changed.",
            "Fraction of the coordinates that differ from the start.",
            [("visible", "in bf16", "changed_visible"), ("stored", "as stored", "changed_stored")],
        ),
        (
            "The final set.",
            "Recall: how much of what is changed in bf16 at the end was changed at a step. Precision: how much of what "
            "was changed at a step is changed at the end.",
            [("visible", "recall", "recall_vs_final"), ("stored", "precision", "precision_vs_final")],
        ),
    ):
        known = [
            (style, name, [row.get(key) for row in snapshots])
            for style, name, key in lines
            if any(row.get(key) is not None for row in snapshots)
        ]
        if known:
            figures.append(charts.step_figure(heading, note, steps, known, percent))
    return figures


def headline(result: Mapping[str, Any]) -> str:
    """The main result in one sentence, from the arms that were run, and the number of seeds."""
    rows = {row["arm"]: row for row in result["rows"]}
    sentence = HEADLINES.get(result["experiment"], sweep_headline)(rows)
    reference = result["reference_arm"]
    gain = f"{percent(rows['start']['score'])} to {percent(rows[reference]['score'])}"
    seeds = "one seed" if result["seeds"] == 1 else f"{result['seeds']} seeds"
    if not sentence:
        return f"{reference}: from {gain} on held-out prompts, {seeds}"
    return f"{sentence} ({reference}: {gain}; {seeds})"


def has(row: Row, *metrics: str) -> bool:
    """Whether a row has these metrics."""
    return all(row.get(metric) is not None for metric in metrics)


def masks_headline(rows: Mapping[str, Row]) -> str:
    """The gain of training the coordinates that the full run changed most."""
    changed = rows.get("changed", {})
    if not has(changed, "gain_retained", "trained"):
        return ""
    return (
        f"Training {percent(changed['trained'])} of the weights, those that the full run changed most, retains "
        f"{interval(changed, 'gain_retained')} of its gain"
    )


def trajectory_headline(rows: Mapping[str, Row]) -> str:
    """How much of the final mask the earliest mask contains."""
    first = next((row for row in rows.values() if row["arm"].startswith("mask at")), None)
    if first is None or not has(first, "mask_recall", "trained"):
        return ""
    return (
        f"The {first['arm']} contains {percent(first['mask_recall'])} of the final one; by chance it would contain "
        f"{percent(first['trained'])}"
    )


def grafts_headline(rows: Mapping[str, Row]) -> str:
    """The gain of the largest changes, and of all others."""
    largest, others = rows.get("largest alone", {}), rows.get("all but the largest", {})
    if not has(largest, "gain_retained", "update_fraction") or not has(others, "gain_retained"):
        return ""
    return (
        f"The largest {percent(largest['update_fraction'])} of the changes alone retain "
        f"{interval(largest, 'gain_retained')} of the gain, all others {interval(others, 'gain_retained')}"
    )


def changes_headline(rows: Mapping[str, Row]) -> str:
    """The fraction of coordinates that each arm changed."""
    known = {arm: row["changed_stored"] for arm, row in rows.items() if has(row, "changed_stored")}
    changes = [f"{percent(changed)} with {arm}" for arm, changed in known.items()]
    return f"Changed as stored: {', '.join(changes)}"


def sweep_headline(rows: Mapping[str, Row]) -> str:
    """The score of each method at the best of its learning rates."""
    best: dict[str, Row] = {}
    for arm, row in rows.items():
        method, _, rate = arm.partition(" lr ")
        if rate and (method not in best or row["score"] > best[method]["score"]):
            best[method] = row
    scores = ", ".join(f"{method} {percent(row['score'])}" for method, row in best.items())
    return f"At the best learning rate: {scores}" if best else ""


HEADLINES: dict[str, Callable[[Mapping[str, Row]], str]] = {
    "masks": masks_headline,
    "trajectory": trajectory_headline,
    "grafts": grafts_headline,
    "on-policy": changes_headline,
    "precision": changes_headline,
}


def interpretation(result: Mapping[str, Any]) -> list[str]:
    """What the intervals say about each arm, relative to the reference arm."""
    rows = {row["arm"]: row for row in result["rows"]}
    reference = result["reference_arm"]
    if rows[reference].get("gain_retained") is None:
        return [
            f"The gain of {reference} may be zero at this number of seeds and prompts, so fractions of it are not "
            "given."
        ]
    sentences = []
    for arm, row in rows.items():
        if arm in ("start", reference) or row.get("gain_retained") is None:
            continue
        comparison = (
            "less than all of it"
            if row["gain_retained_high"] < 1
            else "more than all of it"
            if row["gain_retained_low"] > 1
            else "not distinguishable from all of it"
        )
        sentences.append(f"{arm}: retains {interval(row, 'gain_retained')} of the gain, {comparison}.")
    if result["seeds"] == 1:
        sentences.append(
            "One seed: the intervals cover the held-out prompts only, and another seed may be outside them."
        )
    changed, matched = rows.get("changed", {}), rows.get("magnitude-matched", {})
    if changed.get("gain_retained") is not None and matched.get("gain_retained") is not None:
        differ = (
            changed["gain_retained_low"] > matched["gain_retained_high"]
            or changed["gain_retained_high"] < matched["gain_retained_low"]
        )
        sentences.append(
            "The changed set and a random one of the same |W| "
            + (
                "differ: it matters which coordinates are trained."
                if differ
                else "are not distinguishable by these intervals: size and |W| may be all that matters."
            )
        )
    return sentences
