"""Update the tables in docs/experiments.md from the results of experiments under benchmarks/results/experiments.

python -m benchmarks.experiments                        # regenerate the page
python -m benchmarks.experiments addition-sgd=FOLDER    # take the results of `opdkernels experiment` in FOLDER first
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from opdkernels.experiments.table import table
from opdkernels.formatting import percent

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
PAGE = ROOT / "docs" / "experiments.md"


SNAPSHOT_COLUMNS = {
    "changed_visible": "changed",
    "changed_any": "changed at any snapshot",
    "recall_vs_final": "recall of the final set",
    "precision_vs_final": "precision for the final set",
    "sqrt_v_cv": "coefficient of variation of √v",
    "gradient_momentum_cosine": "cosine of gradient and momentum",
}
RATIOS = ("sqrt_v_cv", "gradient_momentum_cosine")


def snapshot_table(snapshots: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: what had changed at each snapshot of the reference arm's first seed."""
    lines = [
        f"| step | {' | '.join(SNAPSHOT_COLUMNS.values())} |",
        "|---:" * (1 + len(SNAPSHOT_COLUMNS)) + "|",
    ]

    def cell(column: str, value: float | None) -> str:
        return "" if value is None else f"{value:.2f}" if column in RATIOS else percent(value, 1)

    for row in snapshots:
        lines.append(f"| {row['step']} | {' | '.join(cell(column, row[column]) for column in SNAPSHOT_COLUMNS)} |")
    return lines


def render() -> str:
    """The page with every table regenerated."""

    def regenerate(match: re.Match[str]) -> str:
        results = json.loads((RESULTS / f"{match[2]}.json").read_text())
        lines = snapshot_table(results["snapshots"]) if match[3] else table(results["rows"])
        return "\n".join([f"<!-- {match[1]} -->", *lines, f"<!-- /{match[1]} -->"])

    pattern = r"<!-- (([\w-]+)( snapshots)?) -->\n(?:.*?\n)?<!-- /\1 -->"
    return re.sub(pattern, regenerate, PAGE.read_text(), flags=re.DOTALL)


def store(name: str, folder: Path) -> None:
    """Copy an experiment's results, without the paths of the machine that ran it."""
    results = json.loads((folder / "results.json").read_text())
    for side in ("student", "teacher"):
        results[side] = Path(results[side]).name
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    for name, _, folder in (argument.partition("=") for argument in sys.argv[1:]):
        store(name, Path(folder))
    PAGE.write_text(render())
