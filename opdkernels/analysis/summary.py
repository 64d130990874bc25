"""The structure of summary.json; its metrics come from the registry.

`python -m opdkernels.analysis.summary` prints the JSON schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from opdkernels.errors import InputError, printable
from opdkernels.metrics.catalog import metrics_of
from opdkernels.metrics.geometry import SUMMARY_METRICS
from opdkernels.metrics.registry import VIEWS
from opdkernels.models import validate
from opdkernels.ops.delta.layout import ULP_REACH
from opdkernels.runs.run_dir import REMEDY
from opdkernels.untrusted import read_json

CURVE = [float(f"{10 ** (k / 10):.4g}") for k in range(-90, -9)]  # 1e-9 .. 1e-1
ULP_LABELS = [f"< -{ULP_REACH}", *(str(d) for d in range(-ULP_REACH, ULP_REACH + 1)), f"> {ULP_REACH}"]

Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1.001)]  # expectations are rounded


class Part(BaseModel):
    """A part of summary.json; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Matched(Part):
    tensors: Count
    parameters: Count
    how: dict[str, Count] = Field(
        description="How many tensors were matched in which way: exact, prefix, fused, common rows, tied."
    )
    dtypes: dict[str, Count] = Field(description="'base → trained' dtypes and how many tensors have them.")


class CoverageSummary(Part):
    """How much of each side was compared, see `opdkernels.checkpoint.coverage`."""

    compared: Count = Field(description="Parameters that were compared.")
    parameters: dict[str, Count] = Field(description="Parameters of each side, without buffers and copies.")
    fractions: dict[str, Fraction] = Field(description="Compared fraction of the parameters of each side.")
    uncompared: list[str] = Field(description="Sides that hold tensors which were not compared.")
    complete: bool = Field(description="Every tensor of every side was compared.")
    sufficient: bool = Field(
        description="At least 90 % of every side was compared, and not both sides have tensors without a counterpart;"
        " otherwise the run ends with status 3."
    )


class Curve(Part):
    """Fraction of coordinates with |delta| <= eps. The stored view has bounds: its tally holds |delta| to 16 bits."""

    eps: list[float]
    visible: list[Fraction | None]
    stored_lower: list[Fraction | None]
    stored_upper: list[Fraction | None]
    null: list[Fraction | None] = Field(description="Expected under the nearest null of each tensor.")

    @model_validator(mode="after")
    def _check_lengths(self) -> Curve:
        if self.eps != CURVE:
            raise ValueError("eps are other thresholds")
        if any(len(values) != len(CURVE) for values in (self.visible, self.stored_lower, self.stored_upper, self.null)):
            raise ValueError("not one value per threshold")
        return self


class Ulp(Part):
    """Signed bf16 ULP distance from W to W', finite coordinates."""

    distance: list[str]
    count: list[Count]

    @model_validator(mode="after")
    def _check_lengths(self) -> Ulp:
        if self.distance != ULP_LABELS or len(self.count) != len(ULP_LABELS):
            raise ValueError("not one count per distance")
        return self


class Uncompared(Part):
    side: str
    name: str
    reason: str
    shape: list[Count]
    dtype: str
    numel: Count
    kind: str


class BufferSummary(Part):
    name: str
    sides: str = Field(description='"both", "base" or "trained".')
    equal: bool | None = Field(description="Whether both sides have the same bits; null if they cannot be compared.")
    numel: Count


class Failed(Part):
    name: str
    reason: str


class NonFinite(Part):
    name: str
    coordinates: Count


class Centre(Part):
    mean: float
    median: float
    weighted: float = Field(description="Mean weighted by m n.")


def view_schema(view: str) -> dict[str, Any]:
    """The JSON schema of the metrics of the whole model in one view: one property per metric, with its definition."""
    metrics = [metric for metric in metrics_of("groups") if view in metric.views]
    return {
        "type": "object",
        "properties": {m.name: {"description": m.definition, "type": ["number", "null"]} for m in metrics},
        "required": [metric.name for metric in metrics],
        "additionalProperties": False,
    }


class Spectra(Part):
    """Matrices in the stored view. A metric that no matrix has is absent."""

    matrices: Count
    without: dict[str, Count] = Field(description="Why matrices have no spectra, and how many.")
    metrics: dict[str, Centre] = Field(json_schema_extra={"propertyNames": {"enum": [*SUMMARY_METRICS]}})


class Distant(Part):
    """Matrices whose update has at least half of the norm of the base."""

    matrices: Count
    fraction: float = Field(description="Their fraction of the coordinates of all matrices.")
    largest: str | None = Field(description="Name of the largest one.")


class Comparison(Part):
    """A metric against what rounding alone gives."""

    metric: str
    label: str
    observed: float
    expected: float
    ratio: float = Field(description="Observed over expected; of matrices the median of the ratios.")
    low: float = Field(description="Lower end of the 95 % interval, from the deviation of the null.")
    high: float = Field(description="Upper end of the interval.")
    words: str = Field(description="as rounding alone, more than rounding alone, or less than rounding alone.")


class Verdict(Part):
    """What the pair is, see `opdkernels.metrics.verdict`."""

    kind: str = Field(
        description="identical, same parameters, not comparable, not finite, unrelated, unrelated in part, no visible "
        "change, dense, sparse, sparse as rounding alone, less sparse than rounding alone, or sparse beyond rounding."
    )
    concentrated: bool | None = Field(
        description="Whether few directions carry the update; null without spectra, and where the median matrix is so "
        "small that 16 directions hold half of the energy of a random update."
    )
    text: str = Field(description="The first line of the terminal output.")
    comparisons: list[Comparison]


class Summary(Part):
    """The whole model, as `analyze` writes it to summary.json."""

    schema_version: int
    base: str
    trained: str
    matched: Matched
    coverage: CoverageSummary
    identical: bool = Field(description="Everything was compared, and every coordinate has the same bits.")
    views: dict[str, dict[str, float | int | None]] = Field(
        description="Metrics of the whole model by view; empty if no tensor was compared.",
        json_schema_extra={
            "properties": {view: view_schema(view) for view in VIEWS},
            "additionalProperties": False,
        },
    )
    median_relative_norm: float | None = Field(
        description="Relative norm of the update in the median matrix, weighted by size, stored view."
    )
    distant: Distant = Field(description="Matrices that do not look like the start and the end of one run.")
    verdict: Verdict
    null_kinds: dict[str, Count] = Field(description="Which null was nearest, and in how many tensors that changed.")
    curve: Curve
    ulp: Ulp
    excluded: list[Uncompared] = Field(description="In both checkpoints but not compared; the run ends with status 3.")
    unmatched: list[Uncompared] = Field(description="In one checkpoint only, or of a dtype without a delta.")
    tied: list[str] = Field(description="Copies of another tensor, such as a tied head, which are counted once.")
    buffers: list[BufferSummary] = Field(description="Constants and statistics, which are no parameters.")
    notes: list[str]
    failed: list[Failed]
    nonfinite: list[NonFinite]
    spectra: Spectra | None = None


def read_summary(folder: Path) -> dict[str, Any]:
    """Returns summary.json of an `analyze` run. Raises InputError if it is missing, damaged or of another version."""
    path = folder / "summary.json"
    content = read_json(path, remedy=REMEDY)
    summary = validate(Summary, content, printable(str(path)), remedy=REMEDY)
    if summary.views and summary.views.keys() != set(VIEWS):
        names = ", ".join(map(printable, summary.views))
        raise InputError(f"{printable(str(path))} is not valid: it has the views {names}; {REMEDY}")
    for view, metrics in summary.views.items():
        known = {metric.name for metric in metrics_of("groups") if view in metric.views}
        counts = [metrics.get(name) for name in ("numel", "nonfinite")]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise InputError(f"{printable(str(path))} is not valid: the view {view} has no number of values; {REMEDY}")
        if metrics.keys() != known:
            names = ", ".join(sorted(metrics.keys() ^ known)[:3])
            raise InputError(
                f"{printable(str(path))} is not valid: other metrics in the view {printable(view)}"
                f" ({printable(names)}); {REMEDY}"
            )
    return content


def schema() -> str:
    """The JSON schema of summary.json, as text."""
    return json.dumps(Summary.model_json_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
