"""What the page of a `trajectory` run holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from opdkernels.analysis.trajectory import Trajectory, mean
from opdkernels.errors import printable
from opdkernels.metrics.similarity import TOP
from opdkernels.metrics.trajectory import SIMILARITY
from opdkernels.report import charts, typography
from opdkernels.report.facts import MOST_LISTED, files
from opdkernels.report.glossary import glossary
from opdkernels.report.order import MODULE_ORDER
from opdkernels.report.overlap import facts
from opdkernels.report.tables import Cell, Column, build

CROWDED = 0.5  # share of changed coordinates from which any two sets share most
SETTLED = 0.9  # coverage of the final set from which it is called found

FIGURES = [
    Column("frac_zero", "percent", "stored"),
    Column("relative_norm", "percent", "stored"),
    Column("stable_rank", "measure", "stored"),
    Column("principal_coverage_10pct", "percent", "stored"),
    Column("frac_zero", "percent", "visible"),
    Column("near_zero_coverage_10pct", "percent", "visible"),
    Column("changed_over_null", "times", "visible"),
    Column("cosine_final", "measure", "stored", span="with the last checkpoint"),
    Column("similarity", "measure", "stored", span="with the last checkpoint"),
    Column("coverage_final", "percent", "visible", span="with the last checkpoint"),
    Column("coverage_step", "percent", "visible", span="with the last checkpoint"),
    Column("shared_over_magnitude", "times", "visible", span="with the last checkpoint"),
    Column("frac_changed_since_previous", "percent", "visible", span="from step to step"),
    Column("relative_norm_since_previous", "percent", "stored", span="from step to step"),
]


def content(result: Trajectory) -> dict[str, Any]:
    """The template's variables."""
    summary, run = result.summary, result.run
    steps = [joined(step["views"], step["step"], step["path"]) for step in summary["steps"]]
    modules = by_module(result)
    return {
        "title": "How a run changed its weights",
        "sides": [
            ("source", typography.name(summary["source"])),
            *((f"step {s['step']}", typography.name(s["path"])) for s in (summary["steps"][0], summary["steps"][-1])),
        ],
        "headline": headline(steps, summary["atol"]),
        "reading": reading(steps),
        "charts": drawings(steps),
        "table": build("checkpoints", "Checkpoints, whole model", [Column("step"), *FIGURES], steps),
        "modules": build(
            "modules", "Modules, checkpoint by checkpoint", [Column("module"), Column("step"), *FIGURES], modules
        ),
        "left_out": left_out(summary),
        "run": run,
        "files": files(run),
        "facts": facts(run),
        "glossary": glossary(["stored", "visible", "step", *(c.key for c in FIGURES)]),
    }


def joined(views: dict[str, Any], number: int, path: str = "", **about: Any) -> dict[str, Any]:
    """Both views of a checkpoint as a table takes them."""
    stored, visible = (dict(views.get(view, {})) for view in ("stored", "visible"))
    stored["similarity"] = mean([stored.get(name) for name in SIMILARITY])
    return {
        "": {"step": Cell(str(number), str(number), typography.name(path)), **about},
        "stored": stored,
        "visible": visible,
        "step": number,
    }


def by_module(result: Trajectory) -> list[dict[str, Any]]:
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for row in result.table.to_pylist():
        if row["by"] == "module":
            rows.setdefault((row["module"], row["step"]), {})[row["view"]] = row
    order = sorted(rows, key=lambda key: (MODULE_ORDER.get(key[0], 99), *key))
    return [joined(rows[key], key[1], module=key[0]) for key in order]


def line(steps: Sequence[dict[str, Any]], kind: str, name: str, view: str, key: str) -> charts.Line:
    return kind, name, [step[view].get(key) for step in steps]


def drawings(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One figure a question, those without a known value left out."""
    numbers = [step["step"] for step in steps]
    chance = mean([steps[-1]["stored"].get(f"{name}_chance") for name in SIMILARITY])
    charts_of: list[tuple[str, str, Callable[[float | None], str], list[charts.Line]]] = [
        (
            "Unchanged coordinates.",
            "Share with Δ = 0 against the source.",
            typography.percent,
            [
                line(steps, "visible", "visible", "visible", "frac_zero"),
                line(steps, "stored", "stored", "stored", "frac_zero"),
            ],
        ),
        (
            "Size of the update.",
            "Relative norm ‖Δ‖ / ‖W‖.",
            typography.percent,
            [
                line(steps, "stored", "against the source", "stored", "relative_norm"),
                line(steps, "null", "against the checkpoint before", "stored", "relative_norm_since_previous"),
            ],
        ),
        (
            "Stable rank.",
            "Mean over matrices, beside that of a random update of the same shapes.",
            typography.measure,
            [
                line(steps, "stored", "update", "stored", "stable_rank"),
                line(steps, "null", "random", "stored", "stable_rank_null"),
            ],
        ),
        (
            f"The top {TOP} directions.",
            "Sim₁₆ to those of the last checkpoint: 1 once training only goes further along directions it has found.",
            typography.measure,
            [
                line(steps, "stored", "Sim₁₆", "stored", "similarity"),
                ("null", "by chance", [chance] * len(steps)),
                line(steps, "visible", "cosine of the whole update", "stored", "cosine_final"),
            ],
        ),
        (
            "The final set of changed coordinates.",
            "How much of it is changed at a step, and how much of what is changed then stays so.",
            typography.percent,
            [
                line(steps, "visible", "of the final set, changed so far", "visible", "coverage_final"),
                line(steps, "stored", "of what is changed, kept to the end", "visible", "coverage_step"),
            ],
        ),
        (
            "From step to step.",
            "Share of the coordinates visibly other than at the checkpoint before.",
            typography.percent,
            [line(steps, "visible", "changed since the checkpoint before", "visible", "frac_changed_since_previous")],
        ),
    ]
    found = []
    for heading, note, text, lines in charts_of:
        shown = [one for one in lines if any(v is not None for v in one[2])]
        if all(kind == "null" for kind, *_ in shown):
            continue
        found.append(
            {
                "heading": heading,
                "note": note,
                "keys": [(kind, name) for kind, name, _ in shown],
                "drawings": [charts.step_curve(numbers, shown, text, heading, frame) for frame in charts.FRAMES],
            }
        )
    return found


def headline(steps: Sequence[dict[str, Any]], atol: float) -> str:
    first, last = steps[0]["visible"].get("coverage_final"), steps[-1]["step"]
    if steps[-1]["visible"].get("frac_zero") == 1:
        return "Nothing changed visibly by the end"
    if first is None:
        return "The checkpoints cannot be compared with the last"
    return f"At step {steps[0]['step']} of {last}, {typography.percent(first)} of the coordinates that the run changes by more than {atol:g} were changed"


def reading(steps: Sequence[dict[str, Any]]) -> list[str]:
    """What the run did, in sentences."""
    first, last = steps[0], steps[-1]
    zero = [step["visible"].get("frac_zero") for step in (first, last)]
    found = []
    if None not in zero:
        found.append(
            f"From step {first['step']} to {last['step']} the share of visibly unchanged coordinates went from {typography.percent(zero[0])} to {typography.percent(zero[1])}, "
            f"the relative norm of the update from {typography.percent(first['stored'].get('relative_norm'))} to {typography.percent(last['stored'].get('relative_norm'))}."
        )
    covered = next((s for s in steps if (s["visible"].get("coverage_final") or 0) >= SETTLED), None)
    if covered is not None and covered is not last:
        kept = covered["visible"]["coverage_step"]
        found.append(
            f"{typography.percent(SETTLED)} of the final set is changed by step {covered['step']}; of what is changed there, {typography.percent(kept)} stays changed."
        )
    over = first["visible"].get("shared_over_magnitude")
    if over is not None and max(1 - z for z in zero if z is not None) < CROWDED:
        found.append(
            f"What step {first['step']} and the end share is {typography.times(over)} what independent changes of the same weights' sizes would: "
            + ("the set is chosen early." if over > 1.5 else "most of it follows from the sizes of the weights.")
        )
    alike = first["stored"].get("similarity")
    if alike is not None:
        found.append(
            f"The {TOP} top directions of the update at step {first['step']} hold {typography.percent(alike)} of those at the end (Sim₁₆); the cosine of the whole update is {typography.measure(first['stored'].get('cosine_final'))}."
        )
    return found


def left_out(summary: dict[str, Any]) -> list[dict[str, Any]]:
    lists = [
        (
            "Excluded",
            "Not in every checkpoint in the same shape; the run ends with status 3.",
            [(typography.name(e["name"]), "", printable(e["reason"])) for e in summary["excluded"]],
        ),
        (
            "Checkpoints with gaps",
            "Tensors were excluded, failed or hold NaN or Inf; their own reports name them.",
            [(typography.name(s["path"]), f"step {s['step']}", "") for s in summary["steps"] if s["exit_status"]],
        ),
        ("Notes", "", [("", "", note) for note in summary["notes"]]),
    ]
    return [
        {"heading": h, "note": n, "total": len(r), "rows": r[:MOST_LISTED], "more": len(r) - len(r[:MOST_LISTED])}
        for h, n, r in lists
        if r
    ]
