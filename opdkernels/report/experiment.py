"""What the page of an experiment holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opdkernels.report import charts, typography
from opdkernels.report.glossary import glossary
from opdkernels.report.tables import Cell, Column, build

COLUMNS = [
    Column("score", "percent"),
    Column("gain_retained", "percent"),
    Column("update_fraction", "percent"),
    Column("trained", "percent"),
    Column("mask_recall", "percent"),
    Column("changed_visible", "percent"),
    Column("changed_null", "percent"),
    Column("changed_stored", "percent"),
    Column("relative_norm", "percent"),
    Column("near_zero_coverage_10pct", "percent"),
]


def content(result: Mapping[str, Any]) -> dict[str, Any]:
    """The template's variables."""
    rows, along = result["rows"], result["snapshots"]
    columns = [column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)]
    return {
        "title": f"Experiment {result['experiment']}",
        "sides": [
            ("student", typography.name(result["student"])),
            ("teacher", typography.name(result["teacher"] or "none")),
            ("task", typography.name(result["task"])),
        ],
        "headline": headline(result),
        "about": result["about"],
        "reading": reading(result),
        "scores": [
            charts.interval_chart(
                [(row["arm"], row["score"], row["score_low"], row["score_high"]) for row in rows],
                typography.percent,
                "Scores:",
                "score",
                frame,
            )
            for frame in charts.FRAMES
        ],
        "kept": kept(rows),
        "table": build("arms", "Arms", [Column("arm"), *columns], [{"": told(row)} for row in rows]),
        "curves": curves(along),
        "reference_arm": result["reference_arm"],
        "analysis": result.get("analysis"),
        "run": {"command": f"experiment {result['experiment']}"},
        "facts": [
            ("seeds", str(result["seeds"])),
            ("held-out prompts", typography.count(result["prompts"])),
            ("steps", typography.count(result["steps"])),
            ("density", typography.percent(result["density"]) if result["density"] else "what shows in bf16"),
            *((name, typography.name(str(value))) for name, value in result["options"].items()),
        ],
        "glossary": glossary(["stored", "visible", *(column.key for column in columns)]),
    }


def told(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the table takes it: values with their intervals."""
    found = dict(row)
    for name in ("score", "gain_retained"):
        if row.get(name) is not None:
            found[name] = Cell(interval(row, name), typography.sort_value(row[name]))
    return {column.key: found.get(column.key) for column in COLUMNS} | {"arm": row["arm"]}


def interval(row: Mapping[str, Any], name: str) -> str:
    """A value with its interval, in words."""
    value, low, high = (typography.percent(row[key]) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} ({low} to {high})"


def kept(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    known = [
        (row["arm"], row["gain_retained"], row["gain_retained_low"], row["gain_retained_high"])
        for row in rows
        if row.get("gain_retained") is not None
    ]
    return (
        [
            charts.interval_chart(known, typography.percent, "Share of the gain kept:", "share of the gain kept", frame)
            for frame in charts.FRAMES
        ]
        if known
        else []
    )


def curves(along: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What changed along one run, mark by mark."""
    if len(along) < 2:
        return []
    steps = [row["step"] for row in along]
    found = []
    for heading, note, lines in (
        (
            "What has changed.",
            "Share of the coordinates other than at the start.",
            [("visible", "in bf16", "changed_visible"), ("stored", "as stored", "changed_stored")],
        ),
        (
            "The final set.",
            "How much of what is changed in bf16 at the end was changed at a step, and how much of what was changed then stays so.",
            [("visible", "of the final set", "recall_vs_final"), ("stored", "stays changed", "precision_vs_final")],
        ),
    ):
        drawn = [
            (kind, name, [row[key] for row in along])
            for kind, name, key in lines
            if any(row[key] is not None for row in along)
        ]
        if drawn:
            found.append(
                {
                    "heading": heading,
                    "note": note,
                    "keys": [(kind, name) for kind, name, _ in drawn],
                    "drawings": [
                        charts.step_curve(steps, drawn, typography.percent, heading, frame) for frame in charts.FRAMES
                    ],
                }
            )
    return found


def headline(result: Mapping[str, Any]) -> str:
    """What an experiment found, in one sentence; of its arms alone that were run."""
    rows = {row["arm"]: row for row in result["rows"]}
    told = {
        "masks": told_masks,
        "trajectory": told_trajectory,
        "grafts": told_grafts,
        "on-policy": told_changes,
        "precision": told_changes,
    }
    sentence = told[result["experiment"]](rows) if result["experiment"] in told else told_best(rows)
    gain = (
        f"{typography.percent(rows['start']['score'])} to {typography.percent(rows[result['reference_arm']]['score'])}"
    )
    return (
        f"{sentence} ({result['reference_arm']}: {gain})"
        if sentence
        else f"{result['reference_arm']}: from {gain} on held-out prompts"
    )


def told_masks(rows: Mapping[str, Mapping[str, Any]]) -> str:
    found = rows.get("changed", {})
    if found.get("gain_retained") is None:
        return ""
    return f"Training {typography.percent(found['trained'])} of the weights, those that the full run changed most, keeps {typography.percent(found['gain_retained'])} of its gain"


def told_trajectory(rows: Mapping[str, Mapping[str, Any]]) -> str:
    first = next((row for row in rows.values() if row["arm"].startswith("mask at")), None)
    return (
        f"The {first['arm']} holds {typography.percent(first['mask_recall'])} of the final one; by chance it would hold {typography.percent(first['trained'])}"
        if first
        else ""
    )


def told_grafts(rows: Mapping[str, Mapping[str, Any]]) -> str:
    alone, rest = rows.get("largest alone", {}), rows.get("all but the largest", {})
    if alone.get("gain_retained") is None or rest.get("gain_retained") is None:
        return ""
    return f"The largest {typography.percent(alone['update_fraction'])} of the changes alone keep {typography.percent(alone['gain_retained'])} of the gain, all others {typography.percent(rest['gain_retained'])}"


def told_changes(rows: Mapping[str, Mapping[str, Any]]) -> str:
    return "Changed as stored: " + ", ".join(
        f"{typography.percent(row['changed_stored'])} with {arm}"
        for arm, row in rows.items()
        if "changed_stored" in row
    )


def told_best(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The best rate of each way that was swept over rates."""
    best: dict[str, Mapping[str, Any]] = {}
    for arm, row in rows.items():
        way, _, rate = arm.partition(" lr ")
        if rate and (way not in best or row["score"] > best[way]["score"]):
            best[way] = row
    return (
        "At the best of its rates: "
        + ", ".join(f"{way} {typography.percent(row['score'])}" for way, row in best.items())
        if best
        else ""
    )


def reading(result: Mapping[str, Any]) -> list[str]:
    """What the intervals say of each arm beside the one that all are measured against."""
    rows = {row["arm"]: row for row in result["rows"]}
    if rows[result["reference_arm"]].get("gain_retained") is None:
        return [
            f"The gain of {result['reference_arm']} may be nothing at this number of seeds and prompts, so that no share of it is given."
        ]
    found = []
    for arm, row in rows.items():
        if arm in ("start", result["reference_arm"]) or row.get("gain_retained") is None:
            continue
        verdict = (
            "less than all"
            if row["gain_retained_high"] < 1
            else "more than all"
            if row["gain_retained_low"] > 1
            else "not told apart from all"
        )
        found.append(f"{arm}: keeps {interval(row, 'gain_retained')} of the gain, {verdict} of it.")
    if result["seeds"] == 1:
        found.append(
            "One seed: the intervals are those of the held-out prompts alone, and another seed may lie outside them."
        )
    ours, like = rows.get("changed", {}), rows.get("magnitude-matched", {})
    if ours.get("gain_retained") is not None and like.get("gain_retained") is not None:
        apart = (
            ours["gain_retained_low"] > like["gain_retained_high"]
            or ours["gain_retained_high"] < like["gain_retained_low"]
        )
        found.append(
            "The found set and a random one of the same |W| "
            + (
                "differ: which coordinates are trained matters."
                if apart
                else "are not told apart by these intervals: size and |W| may be all that matters."
            )
        )
    return found
