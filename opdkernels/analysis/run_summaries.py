"""The structure of summary.json of `overlap` and `trajectory`, validated before a page is made of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from opdkernels.analysis.overlap_tables import run_names
from opdkernels.analysis.summary import Count, CoverageSummary, NonFinite, Part
from opdkernels.errors import printable
from opdkernels.metrics.catalog import metrics_of
from opdkernels.metrics.groups import TABLE_VERSION
from opdkernels.metrics.registry import VIEWS
from opdkernels.models import validate
from opdkernels.ops.overlap import MAX_RUNS
from opdkernels.runs.run_dir import REMEDY
from opdkernels.untrusted import read_json

Metrics = dict[str, float | int | None]
STRATA = ("row", "column")  # metrics of the others are in every row
COUNTS = {"numel", "nonfinite", "changed_a", "changed_b", "changed_both"}  # fields of `Pair`
TABLE_METRICS = {metric.name for metric in metrics_of("overlap")}
PAIR_METRICS = {name for name in TABLE_METRICS - COUNTS if not name.startswith("variance_")}
STRATA_METRICS = {name for name in PAIR_METRICS if name.endswith(tuple(f"_{stratum}" for stratum in STRATA))}
MODEL_ONLY = {"expected_uniform_global", "over_uniform_global"}


class Pair(BaseModel):
    """A pair of runs; further keys are metrics of the overlap."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, float | int | None] = Field(init=False)

    run_a: str
    run_b: str
    numel: Count
    nonfinite: Count
    changed_a: Count
    changed_b: Count
    changed_both: Count

    @model_validator(mode="after")
    def _check_metrics(self) -> Pair:
        names = self.__pydantic_extra__.keys()
        if odd := (names - PAIR_METRICS) | (PAIR_METRICS - STRATA_METRICS - MODEL_ONLY - names):
            raise ValueError(f"metric {min(odd)[:80]} is not one of a pair of runs, or is missing")
        return self


class PairOfModule(Pair):
    module: str


class PairOfLayer(Pair):
    layer: int = Field(ge=-1)


class Excluded(Part):
    name: str
    reason: str


class OverlapSummary(Part):
    """The content of summary.json of `overlap`."""

    schema_version: Literal[TABLE_VERSION]  # type: ignore[valid-type]
    base: str
    runs: dict[str, str]
    atol: float = Field(ge=0)
    tensors: Count
    coordinates: Count
    changed_in_exactly: dict[str, Count]
    pairs: list[Pair]
    by_module: list[PairOfModule]
    by_layer: list[PairOfLayer]
    excluded: list[Excluded]
    nonfinite: list[NonFinite]
    coverage: CoverageSummary
    notes: list[str]

    @model_validator(mode="after")
    def _check_runs(self) -> OverlapSummary:
        names = list(self.runs)
        if not 2 <= len(names) <= MAX_RUNS or names != run_names(len(names)):
            raise ValueError(f"runs are not 2 to {MAX_RUNS} runs A, B, ...")
        pairs = list(itertools.combinations(names, 2))
        if [(pair.run_a, pair.run_b) for pair in self.pairs] != pairs:
            raise ValueError("pairs are not one row per pair of runs")
        if any((row.run_a, row.run_b) not in pairs for row in (*self.by_module, *self.by_layer)):
            raise ValueError("a row is of runs that do not exist")
        if any(not pair.__pydantic_extra__.keys() >= MODEL_ONLY for pair in self.pairs):
            raise ValueError(f"a pair lacks {' or '.join(sorted(MODEL_ONLY))}")
        if len({frozenset(pair.__pydantic_extra__) for pair in self.pairs}) > 1:
            raise ValueError("pairs have different metrics")
        if list(self.changed_in_exactly) != [str(count) for count in range(len(names) + 1)]:
            raise ValueError("changed_in_exactly is not one number per number of runs")
        return self


class Step(Part):
    """One checkpoint of a trajectory."""

    step: int | None = Field(ge=0)
    label: str
    path: str
    folder: str | None = Field(pattern=r"^[0-9a-z][0-9a-z-]*$")
    exit_status: Literal[0, 3]
    views: dict[Literal[VIEWS], Metrics]  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check_metrics(self) -> Step:
        known = {metric.name for table in ("groups", "trajectory") for metric in metrics_of(table)}
        for metrics in self.views.values():
            if odd := metrics.keys() - known:
                raise ValueError(f"metric {min(odd)[:80]} is not one of a checkpoint")
        return self


class TrajectorySummary(Part):
    """The content of summary.json of `trajectory`."""

    schema_version: Literal[TABLE_VERSION]  # type: ignore[valid-type]
    base: str
    atol: float = Field(ge=0)
    coverage: CoverageSummary
    steps: list[Step] = Field(min_length=2)
    excluded: list[Excluded]
    notes: list[str]

    @model_validator(mode="after")
    def _check_steps(self) -> TrajectorySummary:
        steps = [step.step for step in self.steps]
        known = [step for step in steps if step is not None]
        if known != sorted(set(known)) or steps[: len(known)] != known:
            raise ValueError("the steps do not increase")
        if len({step.label for step in self.steps}) < len(steps):
            raise ValueError("two steps have one label")
        return self


def read_run_summary(folder: Path, form: type[OverlapSummary] | type[TrajectorySummary]) -> dict[str, Any]:
    """Returns summary.json of a run of `overlap` or `trajectory`. Raises InputError if it is missing or damaged."""
    path = folder / "summary.json"
    content = read_json(path, remedy=REMEDY)
    validate(form, content, printable(str(path)), remedy=REMEDY)
    return content
