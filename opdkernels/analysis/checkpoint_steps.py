"""The training step of each checkpoint of a run, and the order of checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opdkernels.errors import InputError, UsageError, printable
from opdkernels.untrusted import read_json

STEP = re.compile(r"(?:step|steps|checkpoint|ckpt|iter|iteration|epoch)[-_]?0*(\d{1,15})(?!\d)(?!.*\d)", re.IGNORECASE)
STATE_FILE = "trainer_state.json"  # of transformers' Trainer, in every checkpoint that it saves
FINAL = "final"
MAX_STEP = 10**15


@dataclass(frozen=True)
class CheckpointStep:
    """One checkpoint of a run.

    Attributes:
        path: The checkpoint as given.
        step: Its training step; None if it is unknown.
        label: What tables and charts call it: the step, "final", or a name.
    """

    path: str
    step: int | None
    label: str

    @property
    def title(self) -> str:
        """The label in a sentence: step 20, or the name."""
        return self.label if self.step is None else f"step {self.step}"


def step_of(path: str) -> int | None:
    """The training step that a path names, in its last component that names one.

    >>> step_of("run/checkpoint-200"), step_of("run/global_step_40/actor"), step_of("run/final")
    (200, 40, None)
    """
    for component in reversed(os.path.normpath(path).split(os.sep)):
        if step := STEP.search(component):
            return int(step[1])
    return None


def saved_step(path: str) -> int | None:
    """`global_step` in a checkpoint's trainer_state.json; None if there is no such file or number."""
    file = Path(path) / STATE_FILE
    if not file.is_file():
        return None
    try:
        step = read_json(str(file)).get("global_step")
    except (InputError, OSError, AttributeError):
        return None
    return step if type(step) is int and 0 <= step < MAX_STEP else None


def order_checkpoints(paths: Sequence[str], steps: Sequence[int] = ()) -> tuple[list[CheckpointStep], list[str]]:
    """Checkpoints in the order of their steps, and notes for the user.

    A step comes from `steps`, from the path, or from trainer_state.json. Checkpoints without a step come last, in the
    order given, and have no number: a single one is called "final". If two have the same step, none has a number and
    all are in the order given.

    Args:
        paths: The checkpoints.
        steps: The step of each; empty: find them out.

    Raises:
        UsageError: The number of steps is not that of the checkpoints, or a step is given twice.
    """
    if steps:
        if len(steps) != len(paths):
            raise UsageError(f"--steps has {len(steps)} steps for {len(paths)} checkpoints; give one step for each")
        if len(set(steps)) < len(steps):
            raise UsageError(f"--steps names a step twice: {', '.join(map(str, steps))}; give each checkpoint its own")
        known = sorted(zip(steps, paths, strict=True))
        return [CheckpointStep(path, step, str(step)) for step, path in known], []
    path_steps = [(named if (named := step_of(path)) is not None else saved_step(path), path) for path in paths]
    known = sorted((step, path) for step, path in path_steps if step is not None)
    hint = "give their steps with --steps"
    if len({step for step, _ in known}) < len(known):
        return named_checkpoints(paths), [f"two checkpoints have the same step: all are in the order given; {hint}"]
    unknown = [path for step, path in path_steps if step is None]
    numbered = [CheckpointStep(path, step, str(step)) for step, path in known]
    if not unknown:
        return numbered, []
    if not known:
        return named_checkpoints(paths), [f"no checkpoint names its step: they are in the order given; {hint}"]
    if len(unknown) == 1:
        note = f"{printable(unknown[0])} names no step: it is shown last, as {FINAL}; {hint}"
        return [*numbered, CheckpointStep(unknown[0], None, FINAL)], [note]
    notes = [f"{printable(path)} names no step: it is shown last, by its name; {hint}" for path in unknown]
    return numbered + named_checkpoints(unknown), notes


def named_checkpoints(paths: Sequence[str]) -> list[CheckpointStep]:
    """Checkpoints without steps, in the order given, by the shortest ends of their paths that differ.

    Labels are `printable`: they are stored in tables, which hold Unicode text, and a path need not be UTF-8.
    """
    parts = [printable(os.path.normpath(path)).split(os.sep) for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return [CheckpointStep(path, None, label) for path, label in zip(paths, labels, strict=True)]
    return [
        CheckpointStep(path, None, f"{label} ({i})")
        for i, (path, label) in enumerate(zip(paths, labels, strict=True), 1)
    ]
