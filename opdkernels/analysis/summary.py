"""The published form of summary.json. `python -m opdkernels.analysis.summary` prints its JSON schema."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Matched(Part):
    tensors: int
    parameters: int
    how: dict[str, int] = Field(description="How tensors were matched: exact, prefix, fused, common rows, tied.")
    dtypes: dict[str, int] = Field(description="'source → trained' dtypes and how many tensors have them.")


class Curve(Part):
    """Share of coordinates with |delta| <= eps. The stored view has bounds, since its tally holds |delta| to 16 bits."""

    eps: list[float]
    visible: list[float | None]
    stored_lower: list[float | None]
    stored_upper: list[float | None]
    null: list[float | None] = Field(description="Expected of the nearest null of each tensor.")


class Ulp(Part):
    """Signed bf16 ULP distance from W to W', finite coordinates."""

    distance: list[str]
    count: list[int]


class Uncompared(Part):
    side: str
    name: str
    reason: str
    shape: list[int]
    dtype: str
    numel: int
    kind: str


class Failed(Part):
    name: str
    reason: str


class NonFinite(Part):
    name: str
    coordinates: int


class Centre(Part):
    mean: float
    median: float
    weighted: float = Field(description="Mean weighted by m n.")


class Spectra(Part):
    """Matrices, stored view. Columns: docs/outputs.md."""

    matrices: int
    without: dict[str, int] = Field(description="Why matrices have no spectra, and how many.")
    metrics: dict[str, Centre]


class Summary(Part):
    """The whole model, as `analyze` writes it to summary.json."""

    schema_version: int
    source: str
    trained: str
    matched: Matched
    identical: bool = Field(description="Every compared coordinate has the same bits.")
    views: dict[str, dict[str, float | int | None]] = Field(
        description="stored, visible: metrics of the whole model; docs/outputs.md."
    )
    null_kinds: dict[str, int] = Field(description="Which null was nearest, and in how many tensors that changed.")
    curve: Curve
    ulp: Ulp
    excluded: list[Uncompared] = Field(description="In both checkpoints, yet not compared; the run ends with status 3.")
    unmatched: list[Uncompared] = Field(description="In one checkpoint only, or of a dtype without a delta.")
    tied: list[str] = Field(description="Heads that are the embedding and are counted once.")
    notes: list[str]
    failed: list[Failed]
    nonfinite: list[NonFinite]
    spectra: Spectra | None = None


def schema() -> str:
    return json.dumps(Summary.model_json_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(schema(), end="")
