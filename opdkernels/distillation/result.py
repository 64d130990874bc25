"""Where a run of distillation ended, as an object, as data and as text."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdkernels.errors import printable


@dataclass(frozen=True)
class RunResult:
    """Where a run ended.

    Attributes:
        path: The run's folder; None if it was temporary.
        step: Number of steps taken.
        max_steps: Number of steps asked for.
        signal: The first signal that any process received during the steps, or 0.
        accuracy: (step, mean reward of greedy completions of held-out prompts) of each evaluation.
        snapshots: Rows of snapshots.jsonl.
        is_main: Whether this is the main process.
    """

    path: Path | None
    step: int
    max_steps: int
    signal: int
    accuracy: list[tuple[int, float]]
    snapshots: list[dict[str, Any]]
    is_main: bool = True

    @property
    def exit_status(self) -> int:
        """0, or 128 plus the number of the signal that stopped the run before its last step."""
        return 128 + self.signal if self.is_interrupted else 0

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal stopped the run before its last step; the same command resumes it."""
        return bool(self.signal) and self.step < self.max_steps


def summary(result: RunResult) -> dict[str, Any]:
    """The result as data."""
    return {
        "path": None if result.path is None else os.fspath(result.path),
        "step": result.step,
        "max_steps": result.max_steps,
        "signal": result.signal,
        "accuracy": result.accuracy,
        "snapshots": result.snapshots,
    }


def format_text(result: RunResult) -> list[str]:
    """The result as lines of text."""
    path = printable(os.fspath(result.path or ""))
    interrupted = ": stopped by a signal; rerun the same command to resume" if result.is_interrupted else ""
    text = [f"step {result.step} of {result.max_steps}{interrupted}; {path}"]
    if result.accuracy:
        evaluations = ", ".join(f"{value:.3f} at step {step}" for step, value in result.accuracy)
        text.append(f"accuracy on held-out prompts: {evaluations}")
    for snapshot in result.snapshots[-1:]:
        visible, stored = (1 - snapshot["views"][view]["frac_zero"] for view in ("visible", "stored"))
        text.append(
            f"changed weights: {100 * visible:.2f} % visible in bf16, {100 * stored:.2f} % as stored, "
            f"{100 * snapshot['changed_any']:.2f} % in any snapshot"
        )
    if result.step == result.max_steps:
        text.append(f"next: opdkernels trajectory {path}/checkpoint-0 {path}/checkpoint-[1-9]* -o {path}/trajectory")
    return text
