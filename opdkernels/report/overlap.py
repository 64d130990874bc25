"""The page of an `overlap` run."""

from __future__ import annotations

from typing import Any

from opdkernels.analysis.overlap import Overlaps
from opdkernels.errors import printable
from opdkernels.metrics.catalog import METRICS
from opdkernels.metrics.verdict import AS, LESS, MORE, words
from opdkernels.report import heat_map, typography
from opdkernels.report.glossary import glossary
from opdkernels.report.run_info import Item, coverage, files, non_empty, nonfinite, run_info, section, tensor
from opdkernels.report.tables import Column, build, columns_of, layer_cell, sorted_modules
from opdkernels.report.typography import measure, percent, times

MAX_ROWS, MAX_LAYERS = 2000, 200
CONCLUSIONS = {
    MORE: "So the runs share more than the magnitudes of the weights explain.",
    AS: "So the overlap follows from the magnitudes, not from a choice that the runs share.",
    LESS: "So the runs share less than the magnitudes of the weights explain.",
}
STRATA = ("row", "column")


def metric_columns(strata: list[str], model: bool = False) -> list[Column]:
    """The registered metrics of the page; with those of the strata that the run has, and of the whole model."""
    absent = tuple(f"_{name}" for name in STRATA if name not in strata)
    columns = [column for column in columns_of("overlap") if not column.key.endswith(absent)]
    if model:
        metric = METRICS["over_uniform_global"]
        first = next(i for i, column in enumerate(columns) if column.section)
        columns.insert(first, Column(metric.name, metric.format, "", metric.section))
    return columns


def page_context(result: Overlaps) -> dict[str, Any]:
    """The variables of overlap.html."""
    summary, run = result.summary, result.run
    rows = result.tensors.to_pylist()
    strata = [name for name in STRATA if any(f"over_{name}" in pair for pair in summary["pairs"])]
    columns, pair = metric_columns(strata), Column("pair")
    by_size = sorted(rows, key=lambda row: -row["changed_both"])[:MAX_ROWS]
    layers = [{**row, "layer": layer_cell(row["layer"])} for row in summary["by_layer"]]
    tables = {
        "pairs": build(
            "pairs",
            "Pairs of runs, whole model",
            [pair, *metric_columns(strata, model=True)],
            with_pair(summary["pairs"]),
        ),
        "modules": build("modules", "By module", [Column("module"), pair, *columns], with_pair(summary["by_module"])),
        "layers": build("layers", "By layer", [Column("layer"), pair, *columns], with_pair(layers)),
        "tensors": build(
            "tensors",
            "Tensors, largest overlap first",
            [Column("name"), pair, Column("numel", "count"), *columns],
            with_pair(by_size),
            len(rows) - len(by_size),
        ),
    }
    return {
        "title": "What runs changed together",
        "sides": [
            ("base", typography.location(summary["base"])),
            *((f"run {name}", typography.location(path)) for name, path in summary["runs"].items()),
        ],
        "headline": headline(summary),
        "detail": f"{typography.count(summary['coordinates'])} coordinates in "
        f"{typography.plural(summary['tensors'], 'tensor')}; changed means visible |Δ| > {measure(summary['atol'])}.",
        "interpretation": interpretation(summary, strata),
        "run_counts": run_counts(summary),
        "maps": maps(rows),
        "coverage": coverage(summary),
        "left_out": left_out(summary),
        "run": run,
        "files": files(run),
        "run_info": run_info(run),
        "glossary": glossary(["visible", *(column.key for table in tables.values() for column in table.columns)]),
        **tables,
    }


def with_pair(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a table, each with the names of its two runs."""
    return [{"": {**row, "pair": f"{row['run_a']} {row['run_b']}"}} for row in rows]


def headline(summary: dict[str, Any]) -> str:
    """The coverage of the first pair, as a sentence."""
    first = summary["pairs"][0]
    if first["coverage_a"] is None or first["coverage_b"] is None:
        return "A run changed nothing"
    return f"{percent(first['coverage_a'])} of what run {first['run_a']} changed, run {first['run_b']} changed too"


def interpretation(summary: dict[str, Any], strata: list[str]) -> list[str]:
    """How to read the metrics of the first pair, in sentences."""
    pair = summary["pairs"][0]
    if pair["over_magnitude"] is None:
        return ["No coordinate changed that both runs could share."]
    z = pair["z_magnitude"]
    deviation = abs(pair["over_magnitude"] - 1) / abs(z) if z else 0.0
    conclusion = CONCLUSIONS[words(pair["over_magnitude"], deviation)]
    return [
        f"That is {times(pair['over_uniform_global'])} uniform chance, the paper's baseline. But in bf16 only small "
        "weights change visibly, so two unrelated runs overlap as well: relative to the magnitude-conditioned chance "
        f"level it is {times(pair['over_magnitude'])}, z = {measure(pair['z_magnitude'])}.",
        conclusion,
        *(
            f"Within the {name}s of each matrix, conditioned on |W|: {times(pair[f'over_{name}'])}, "
            f"z = {measure(pair[f'z_{name}'])}."
            for name in strata
            if pair.get(f"over_{name}") is not None
        ),
    ]


def run_counts(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Coordinates by the number of runs that changed them, and their fraction."""
    total = summary["coordinates"] or 1
    return [
        (typography.plural(int(runs), "run"), typography.count(n), percent(n / total))
        for runs, n in summary["changed_in_exactly"].items()
    ]


def maps(rows: list[dict[str, Any]]) -> list[heat_map.MapFigure]:
    """For each pair the overlap relative to the magnitude-conditioned chance level, by layer and module."""
    layers = sorted({row["layer"] for row in rows})[:MAX_LAYERS]
    modules = sorted_modules(row["module"] for row in rows)
    entries: list[heat_map.MapFigure] = []
    for pair in dict.fromkeys((row["run_a"], row["run_b"]) for row in rows):
        sums: dict[tuple[str, int], list[float]] = {}
        for row in rows:
            if (row["run_a"], row["run_b"]) == pair:
                total = sums.setdefault((row["module"], row["layer"]), [0.0, 0.0])
                total[0] += row["changed_both"]
                total[1] += row["expected_magnitude"]
        cells = {cell: both / expected if expected else None for cell, (both, expected) in sums.items()}
        if any(cells.values()) and layers[-1] >= 0:
            heading = f"Overlap of {pair[0]} and {pair[1]} relative to the magnitude-conditioned chance level"
            note = "1× is explained by magnitudes alone; orange is more, blue is less."
            entries += heat_map.map_figures(heading, note, {"": cells}, heat_map.ratio_scale, modules, layers)
    return entries


def left_out(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What the metrics of the run do not cover, and why."""
    return non_empty(
        section(
            "Excluded",
            "Not in every run in the same shape; the run ends with status 3.",
            [tensor(entry["name"], entry["reason"]) for entry in summary["excluded"]],
        ),
        nonfinite(summary["nonfinite"]),
        section("Notes", "", [Item(reason=printable(note)) for note in summary["notes"]]),
    )
