"""results.json of an experiment: its structure, validated before a report is made of it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from opdkernels.errors import printable
from opdkernels.experiments.bootstrap import START
from opdkernels.models import Strict, validate
from opdkernels.untrusted import read_json

FILE = "results.json"
REMEDY = "run the experiment again"

Number = Annotated[float, Field(ge=-1e9, le=1e9)]
Count = Annotated[int, Field(ge=0, le=10**12)]


class Measured(Strict):
    """A row of metrics: further keys are numbers, or None where a metric is not known."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number | None] = Field(init=False)


class Row(Measured):
    """An arm: its score and the fraction of the reference gain that it retains, with 95 % intervals."""

    arm: str = Field(min_length=1, max_length=200)
    score: Number
    score_low: Number
    score_high: Number
    gain_retained: Number | None = None
    gain_retained_low: Number | None = None
    gain_retained_high: Number | None = None

    @model_validator(mode="after")
    def _check_interval(self) -> Row:
        known = [v is not None for v in (self.gain_retained, self.gain_retained_low, self.gain_retained_high)]
        if any(known) and not all(known):
            raise ValueError(f"arm {self.arm} has a retained gain without its interval")
        return self


class Snapshot(Measured):
    """What had changed at a step of the reference arm."""

    step: Count
    changed_visible: Number
    changed_stored: Number
    recall_vs_final: Number | None = None
    precision_vs_final: Number | None = None


class PartScores(Strict):
    """The score of each eval prompt with a part of a run's update, kept with the run."""

    update_fraction: Number
    scores: list[Number]


class Results(Strict):
    """The content of results.json."""

    experiment: str
    about: str
    seeds: Count
    prompts: Count
    steps: Count
    density: float | None = Field(ge=0, le=1)
    reference_arm: str
    student: str
    teacher: str | None
    task: str
    options: dict[str, Any]
    rows: list[Row] = Field(max_length=1000)
    snapshots: list[Snapshot] = Field(max_length=100_000)

    @model_validator(mode="after")
    def _check_arms(self) -> Results:
        names = [row.arm for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError("an arm has two rows")
        steps = [snapshot.step for snapshot in self.snapshots]
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise ValueError("the steps of the snapshots do not increase")
        for name in (START, self.reference_arm):
            if name not in names:
                raise ValueError(f"there is no row of the arm {name}")
        return self


def read_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the content of an experiment's results.json.

    Args:
        folder: Output folder of the experiment.

    Raises:
        InputError: The file is missing, or is not the output of an experiment.
    """
    path = Path(folder) / FILE
    content = read_json(path, remedy=REMEDY)
    return validate(Results, content, printable(os.fspath(path)), remedy=REMEDY).model_dump(exclude_unset=True)
