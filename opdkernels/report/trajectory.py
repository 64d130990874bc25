"""The page of a `trajectory` run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdkernels.analysis.trajectory import Trajectory
from opdkernels.analysis.trajectory_tables import mean
from opdkernels.errors import printable
from opdkernels.metrics.similarity import TOP
from opdkernels.metrics.trajectory import SIMILARITY
from opdkernels.metrics.verdict import AS, LESS, MORE, words
from opdkernels.report import charts, typography
from opdkernels.report.figures import Figure
from opdkernels.report.glossary import glossary, term
from opdkernels.report.run_info import Item, coverage, files, non_empty, run_info, section, tensor
from opdkernels.report.tables import MODULE_ORDER, Cell, Column, build, columns_of
from opdkernels.report.typography import measure, percent, times

DENSE = 0.5  # fraction of changed coordinates above which any two sets share most of their coordinates
SETTLED = 0.9  # recall of the final set at which it counts as found
RECALL, PRECISION = "recall_vs_final", "precision_vs_final"


def metric_columns() -> list[Column]:
    """The registered metrics of the page, and the similarity after the cosine."""
    columns = columns_of("trajectory")
    similarity = term("similarity")
    after = next(i for i, column in enumerate(columns) if column.key == "cosine_final") + 1
    return [*columns[:after], Column("similarity", similarity.format, "stored", similarity.section), *columns[after:]]


def page_context(result: Trajectory) -> dict[str, Any]:
    """The variables of trajectory.html."""
    summary, run = result.summary, result.run
    steps = [join_views(step["views"], step["label"], step["path"]) for step in summary["steps"]]
    axis = [step["step"] for step in summary["steps"]]
    columns = metric_columns()
    return {
        "title": "How a run changed its weights",
        "sides": [
            ("base", typography.location(summary["base"])),
            *((title(s), typography.location(s["path"])) for s in (summary["steps"][0], summary["steps"][-1])),
        ],
        "headline": headline(steps, summary["atol"]),
        "interpretation": interpretation(steps),
        "charts": metric_charts(steps, axis),
        "reports": reports(result),
        "table": build("checkpoints", "Checkpoints, whole model", [Column("step"), *columns], steps),
        "modules": build(
            "modules", "Modules at each checkpoint", [Column("module"), Column("step"), *columns], by_module(result)
        ),
        "coverage": coverage(summary),
        "left_out": left_out(summary),
        "run": run,
        "files": files(run),
        "run_info": run_info(run),
        "glossary": glossary(["stored", "visible", "step", *(column.key for column in columns)]),
    }


def reports(result: Trajectory) -> list[tuple[str, str]]:
    """The title of each checkpoint that has a report, and the link to it from this page."""
    links = [(title(step), f"steps/{step['folder']}/report.html") for step in result.summary["steps"] if step["folder"]]
    return [(name, link) for name, link in links if result.path is not None and (result.path / link).is_file()]


def join_views(views: dict[str, Any], label: str, path: str = "", **labels: Any) -> dict[str, Any]:
    """Both views of a checkpoint as a row of a table."""
    stored, visible = (dict(views.get(view, {})) for view in ("stored", "visible"))
    stored["similarity"] = mean([stored.get(name) for name in SIMILARITY])
    return {
        "": {"step": Cell(typography.name(label), label, typography.location(path)), **labels},
        "stored": stored,
        "visible": visible,
        "title": f"step {label}" if label.isdecimal() else typography.name(label),
    }


def by_module(result: Trajectory) -> list[dict[str, Any]]:
    """One row per module and checkpoint."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    position: dict[str, int] = {}
    for row in result.table.to_pylist():
        if row["by"] == "module":
            position.setdefault(row["label"], len(position))
            rows.setdefault((row["module"], row["label"]), {})[row["view"]] = row
    order = sorted(rows, key=lambda key: (MODULE_ORDER.get(key[0], len(MODULE_ORDER)), key[0], position[key[1]]))
    return [join_views(rows[key], key[1], module=key[0]) for key in order]


def metric_charts(steps: Sequence[dict[str, Any]], axis: Sequence[int | None]) -> list[Figure]:
    """One chart per question; charts without a known value are left out."""
    categories = [step["title"] for step in steps] if None in axis else None
    numbers = list(range(len(steps))) if categories else [number for number in axis if number is not None]
    chance = mean([steps[-1]["stored"].get(f"{name}_chance") for name in SIMILARITY])

    def line(style: str, name: str, view: str, key: str) -> charts.Line:
        return style, name, [step[view].get(key) for step in steps]

    specifications = [
        (
            "Unchanged coordinates.",
            "Fraction with Δ = 0 relative to the base.",
            percent,
            [
                line("visible", "visible", "visible", "frac_zero"),
                line("stored", "stored", "stored", "frac_zero"),
            ],
        ),
        (
            "Size of the update.",
            "Relative norm ‖Δ‖ / ‖W‖.",
            percent,
            [
                line("stored", "relative to the base", "stored", "relative_norm"),
                line("null", "relative to the previous checkpoint", "stored", "relative_norm_since_previous"),
            ],
        ),
        (
            "Stable rank.",
            "Mean over matrices, and that of a random update of the same shapes.",
            measure,
            [
                line("stored", "update", "stored", "stable_rank"),
                line("null", "random", "stored", "stable_rank_null"),
            ],
        ),
        (
            f"The top {TOP} directions.",
            "Sim₁₆ to those of the last checkpoint: 1 when training only continues along directions it already has.",
            measure,
            [
                line("stored", "Sim₁₆", "stored", "similarity"),
                ("null", "by chance", [chance] * len(steps)),
                line("visible", "cosine of the update with the last one", "stored", "cosine_final"),
            ],
        ),
        (
            "The final set of changed coordinates.",
            "Recall: how much of the final set is changed at a step. Precision: how much of what is changed at a step "
            "is in the final set.",
            percent,
            [
                line("visible", "recall", "visible", RECALL),
                line("stored", "precision", "visible", PRECISION),
            ],
        ),
        (
            "From checkpoint to checkpoint.",
            "Fraction of the coordinates that differ visibly from the previous checkpoint.",
            percent,
            [line("visible", "changed since the previous checkpoint", "visible", "frac_changed_since_previous")],
        ),
    ]
    entries = []
    for heading, note, text, lines in specifications:
        known = [line for line in lines if any(value is not None for value in line[2])]
        if len(known) == 2 and {known[0][1], known[1][1]} == {"visible", "stored"} and known[0][2] == known[1][2]:
            known = [("visible", "both views", known[0][2])]
        if any(style != "null" for style, *_ in known):
            entries.append(charts.step_figure(heading, note, numbers, known, text, categories))
    return entries


def title(step: dict[str, Any]) -> str:
    """A checkpoint in a sentence: step 20, or its name."""
    return typography.name(step["label"]) if step["step"] is None else f"step {step['step']}"


def headline(steps: Sequence[dict[str, Any]], atol: float) -> str:
    """The recall of the final set at the first checkpoint, as a sentence."""
    first, last = steps[0]["visible"].get(RECALL), steps[-1]["title"].removeprefix("step ")
    if steps[-1]["visible"].get("frac_zero") == 1:
        return "Nothing changed visibly by the end"
    if first is None:
        return "The checkpoints cannot be compared with the last"
    return (
        f"At {steps[0]['title']} of {last}, {percent(first)} of the coordinates that the run changes by more than "
        f"{measure(atol)} had changed"
    )


def interpretation(steps: Sequence[dict[str, Any]]) -> list[str]:
    """What the run did, in sentences."""
    first, last = steps[0], steps[-1]
    zero = [step["visible"].get("frac_zero") for step in (first, last)]
    norms = [step["stored"].get("relative_norm") for step in (first, last)]
    sentences = []
    if None not in zero:
        sentences.append(
            f"From {first['title']} to {last['title'].removeprefix('step ')} the fraction of visibly unchanged "
            "coordinates went from "
            f"{percent(zero[0])} to {percent(zero[1])}, and the relative norm of the update from "
            f"{percent(norms[0])} to {percent(norms[1])}."
        )
    settled = next((step for step in steps if (step["visible"].get(RECALL) or 0) >= SETTLED), None)
    if settled is not None and settled is not last:
        sentences.append(
            f"By {settled['title']}, {percent(SETTLED)} of the final set had changed; "
            f"{percent(settled['visible'][PRECISION])} of what had changed by then stays changed."
        )
    over_chance = first["visible"].get("shared_over_magnitude")
    if over_chance is not None and max(1 - z for z in zero if z is not None) < DENSE:
        conclusion = {
            MORE: "more than the magnitudes of the weights explain: part of the set is chosen early.",
            AS: "it follows from the magnitudes of the weights.",
            LESS: "less than the magnitudes of the weights explain.",
        }[words(over_chance)]
        sentences.append(
            f"{first['title'].capitalize()} and the end share {times(over_chance)} the changed coordinates of the "
            f"magnitude-conditioned chance level: {conclusion}"
        )
    similarity = first["stored"].get("similarity")
    if similarity is not None:
        sentences.append(
            f"The top {TOP} directions of the update at {first['title']} contain {percent(similarity)} of those at "
            f"the end (Sim₁₆); the cosine of the two updates is {measure(first['stored'].get('cosine_final'))}."
        )
    return sentences


def left_out(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What the metrics of the run do not cover, and why."""
    incomplete = [step for step in summary["steps"] if step["exit_status"]]
    return non_empty(
        section(
            "Excluded",
            "Not in every checkpoint in the same shape; the run ends with status 3.",
            [tensor(entry["name"], entry["reason"]) for entry in summary["excluded"]],
        ),
        section(
            "Incomplete checkpoints",
            "Tensors were excluded, failed or contain NaN or Inf; the reports of the checkpoints name them.",
            [Item(typography.location(step["path"]), title(step)) for step in incomplete],
        ),
        section("Notes", "", [Item(reason=printable(note)) for note in summary["notes"]]),
    )
