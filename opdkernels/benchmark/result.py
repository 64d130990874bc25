"""benchmark.json: its structure, and how it is read.

`python -m opdkernels.benchmark.result` prints its JSON schema.
"""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, Literal

from pydantic import Field

from opdkernels.errors import printable
from opdkernels.models import Strict, validate
from opdkernels.untrusted import read_json

FORMAT = "opdkernels benchmark"
OURS = "opdkernels"  # the implementation of this package among the timings of a row
SCHEMA_VERSION = 1
FILE, TABLE_FILE, CHART_FILE = "benchmark.json", "table.md", "chart.svg"

Text = Annotated[str, Field(max_length=1000)]
Positive = Annotated[float, Field(gt=0, le=1e30)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Count = Annotated[int, Field(ge=0, le=10**18)]
Unit = Literal["bytes", "operations"]
Implementation = Literal["opdkernels", "eager", "compile"]


class Gpu(Strict):
    """The GPU that was measured."""

    name: Text
    capability: Text
    memory_bytes: Count
    cuda: Text


class Machine(Strict):
    """The machine that was measured."""

    processor: Text
    instruction_set: Text = Field(description='Of the CPU kernels; "reference" if plain PyTorch ran instead.')
    cores: Count = Field(description="Cores that the process could use.")
    threads: Count = Field(description="Threads of torch and of the kernels.")
    load_average: Seconds | None = Field(description="Of one minute, when the measurement began.")
    gpu: Gpu | None
    torch: Text
    python: Text
    opdkernels: Text


class Limit(Strict):
    """What the device reaches at most."""

    unit: Unit
    per_s: Positive = Field(description="Bytes or operations per second, of the fastest round.")


class Timing(Strict):
    """The times of an implementation."""

    median_s: Positive
    fastest_s: Positive
    slowest_s: Positive
    rounds: Count
    per_s: Positive = Field(description="Bytes or operations per second: `work` over the median.")
    fraction_of_limit: Positive
    speedup: Positive | None = Field(description="The median over that of opdkernels: above 1, opdkernels is faster.")
    extra_bytes: Count | None = Field(description="Peak memory of a call beyond its inputs; null if unknown.")


class Row(Strict):
    """A workload."""

    workload: Text
    family: Text
    size: Text
    compared_with: Text = Field(description="What plain PyTorch does.")
    backend: Text = Field(description="Backend of opdkernels that ran: cpu, cuda, triton or reference.")
    work: Positive = Field(description="Bytes that a call must move, or operations of its products.")
    unit: Unit
    limit: Text = Field(description="Name of the limit that the rate is compared with.")
    timings: dict[Implementation, Timing]
    errors: dict[Implementation, Text] = Field(description="Why an implementation has no time.")


class Benchmark(Strict):
    """The content of benchmark.json."""

    format: Literal["opdkernels benchmark"]
    schema_version: Literal[1]
    started: Text
    seconds: Seconds
    machine: Machine
    options: dict[str, Any]
    limits: dict[str, Limit]
    rows: list[Row] = Field(max_length=1000)


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a benchmark.json.

    Raises:
        InputError: The file is missing, or is not the output of `opdkernels bench`.
    """
    remedy = "run opdkernels bench again"
    content = read_json(path, remedy=remedy)
    return validate(Benchmark, content, printable(os.fspath(path)), remedy=remedy).model_dump()


def failed(result: dict[str, Any]) -> bool:
    """Whether an implementation could not be measured."""
    return any(row["errors"] for row in result["rows"])


if __name__ == "__main__":
    print(json.dumps(Benchmark.model_json_schema(), indent=1))
