"""Writes the column tables of docs/outputs.md from the registry: `python -m opdkernels.metrics.docs`."""

from __future__ import annotations

import re
from pathlib import Path

from opdkernels.metrics.catalog import metrics_of
from opdkernels.metrics.registry import VIEWS, Metric

PAGE = Path(__file__).parents[2] / "docs" / "outputs.md"
BLOCK = re.compile(r"<!-- metrics: (\w+) -->\n.*?<!-- /metrics -->", re.DOTALL)
HEADER = "| column | view | definition | range | in groups | source |\n|---|---|---|---|---|---|"


def row(members: list[Metric]) -> str:
    """The line of a metric, or of the metrics of one family."""
    first = members[0]
    names = (first.family or first.name).split(" ")
    rules = dict.fromkeys(metric.aggregation.description for metric in members)
    cells = [
        " ".join(name if name == "…" else f"`{name}`" for name in names),
        "both" if first.views == VIEWS else first.views[0],
        first.family_definition or first.definition,
        first.range,
        first.aggregation.description
        if len(rules) == 1
        else ", ".join(f"`{m.name}`: {m.aggregation.description}" for m in members if m.aggregation.description),
        first.source,
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table(name: str) -> str:
    """The metrics of a table as Markdown, one line per metric or family."""
    families: dict[str, list[Metric]] = {}
    for metric in metrics_of(name):
        families.setdefault(metric.family or metric.name, []).append(metric)
    return "\n".join([HEADER, *map(row, families.values())])


def render(page: str) -> str:
    """The page with every block between `<!-- metrics: TABLE -->` and `<!-- /metrics -->` generated again."""
    return BLOCK.sub(lambda block: f"<!-- metrics: {block[1]} -->\n{table(block[1])}\n<!-- /metrics -->", page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
