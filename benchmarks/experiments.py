"""Puts the tables of experiments that were run into docs/experiments.md, from the results.json of each that is kept here:

python -m benchmarks.experiments                        # the page again, from what is kept
python -m benchmarks.experiments addition-sgd=FOLDER    # with the results in FOLDER, of `opdkernels experiment`, as addition-sgd
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from opdkernels.experiments.runner import percent, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
PAGE = ROOT / "docs" / "experiments.md"


MARKS = {
    "changed_visible": "changed",
    "changed_any": "at any mark",
    "recall_vs_final": "of the final set",
    "precision_vs_final": "of what was changed, stays",
    "sqrt_v_cv": "√v's coefficient",
    "gradient_momentum_cosine": "momentum and gradient",
}
RATIOS = ("sqrt_v_cv", "gradient_momentum_cosine")


def marks_table(marks: list[dict[str, Any]]) -> list[str]:
    """What changed along the run that the others are measured against, of the first seed."""
    lines = [f"| step | {' | '.join(MARKS.values())} |", "|---:" * (1 + len(MARKS)) + "|"]

    def cell(key, value):
        return "" if value is None else f"{value:.2f}" if key in RATIOS else percent(value, 1)

    return lines + [f"| {mark['step']} | {' | '.join(cell(key, mark[key]) for key in MARKS)} |" for mark in marks]


def show() -> str:
    """The page with every table made again."""

    def again(found: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{found[2]}.json").read_text())
        lines = marks_table(result["snapshots"]) if found[3] else table(result["rows"])
        return "\n".join([f"<!-- {found[1]} -->", *lines, f"<!-- /{found[1]} -->"])

    return re.sub(r"<!-- (([\w-]+)( along)?) -->\n(?:.*?\n)?<!-- /\1 -->", again, PAGE.read_text(), flags=re.DOTALL)


def keep(name: str, folder: Path) -> None:
    """A copy of results that names no folder of the machine that made them."""
    found = json.loads((folder / "results.json").read_text())
    for side in ("student", "teacher"):
        found[side] = Path(found[side]).name
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    for name, _, folder in (argument.partition("=") for argument in sys.argv[1:]):
        keep(name, Path(folder))
    PAGE.write_text(show())
