"""The pages that quote measurements: docs/benchmarks.md with every table, and eight rows of them in the README.

benchmarks/results/bench has files of `opdkernels bench`, benchmarks/results those of `make bench`, and
benchmarks/results/gpu those of `make gpu`.

python3 -m benchmarks.pages
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import record
from benchmarks.tables import table
from opdkernels.benchmark.result import read_result
from opdkernels.benchmark.text import markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
NO_RESULTS = (
    "No results are committed: copy a benchmark.json of `opdkernels bench -o FOLDER` to benchmarks/results/bench."
)
CPU, GPU = "amd-epyc-avx512", "gpu/gpu-nvidia-h200"  # machines of the README's rows


@dataclass(frozen=True)
class CpuRow:
    """A row of the README from a CPU benchmark.

    Attributes:
        task: What is computed.
        benchmark: Name of the benchmark with the time.
        compared_with: What the speed is compared with.
        ratio: Metric with the speed-up.
        ratio_benchmark: Name of the benchmark with the speed-up, if it is another one.
    """

    task: str
    benchmark: str
    compared_with: str
    ratio: str
    ratio_benchmark: str = ""

    def cells(self, benchmarks: dict[str, dict[str, Any]]) -> tuple[str, str, str, str]:
        timed, compared = benchmarks[self.benchmark], benchmarks[self.ratio_benchmark or self.benchmark]
        limits = [value for name, value in timed["metrics"].items() if name.startswith("fraction_of_")]
        limit = f", {100 * limits[0]:.0f} % of the bandwidth" if limits else ""
        ratio = compared["metrics"][self.ratio]
        return self.task, f"{time_text(timed['median_s'])}{limit}", self.compared_with, ratio_text(ratio)


@dataclass(frozen=True)
class GpuRow:
    """A row of the README from the measurements of a GPU.

    Attributes:
        task: What is computed.
        workload: Its name in the measurements.
        implementation: The implementation of this package.
        other: The one that it is compared with.
        compared_with: Its description.
    """

    task: str
    workload: str
    implementation: str
    other: str
    compared_with: str

    def cells(self, rows: dict[tuple[str, str], dict[str, Any]]) -> tuple[str, str, str, str]:
        measured, other = rows[self.workload, self.implementation], rows[self.workload, self.other]
        changed = measured["sources"] != record.sources_of(measured["family"], self.implementation)
        return (
            f"{self.task}{record.CHANGED if changed else ''}",
            f"{time_text(measured['median_s'])}, {100 * measured['fraction_of_limit']:.0f} % of the limit",
            self.compared_with,
            ratio_text(other["median_s"] / measured["median_s"]),
        )


CPU_ROWS = (
    CpuRow(
        "changes of a bf16 pair, 136 M coordinates (`delta`)",
        "tally of a bf16 pair[2-avx512]",
        "plain PyTorch",
        "over_counts",
        "tally against eager",
    ),
    CpuRow(
        "`analyze --spectra off` of a 0.5B pair",
        "analyze the whole pair",
        "the paper's script",
        "over_paper_script",
        "analyze against the paper elementwise stage",
    ),
    CpuRow("`analyze` of a 0.5B pair", "every figure of the whole pair", "the paper's script", "over_paper_script"),
    CpuRow(
        "`MaskedAdamW`, fp32, 20 % active",
        "masked adamw against eager and fused[torch.float32]",
        "dense fused AdamW",
        "over_fused",
    ),
    CpuRow(
        "`randomized_svd`, with bounds",
        "randomized svd of a model at equal accuracy",
        "`torch.svd_lowrank`",
        "over_lowrank",
    ),
)
GPU_ROWS = (
    GpuRow(
        "changes of a bf16 pair, 268 M coordinates (`delta`)",
        "delta of a bf16 pair",
        "CUDA library",
        "torch.compile",
        "`torch.compile`, which counts less",
    ),
    GpuRow("patch scatter", "scatter of a bf16 pair", "CUDA library", "eager PyTorch", "`index_copy_`"),
    GpuRow(
        "reverse KL and gradients (`linear_divergence`)",
        "reverse KL and its gradients",
        "Triton",
        "torch.compile",
        "`torch.compile`, with 13 × the memory",
    ),
)


def time_text(seconds: float) -> str:
    """A time with its unit."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def ratio_text(ratio: float) -> str:
    """A speed-up; those below 1, where this package is slower, are bold."""
    text = f"{ratio:.3g}×"
    return text if ratio >= 1 else f"**{text}**"


def load(name: str) -> dict[str, Any]:
    """Committed results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def summary_table() -> str:
    """The rows of the README."""
    cpu, gpu = load(CPU), load(GPU)
    benchmarks = {row["name"]: row for row in cpu["benchmarks"]}
    timings = {
        (row["workload"], row["implementation"]): row
        for unit in gpu["units"]
        for row in unit.get("rows", [])
        if "workload" in row
    }
    lines = ["| task | time | compared with | speed |", "|---|---:|---|---:|"]
    lines += [f"| {' | '.join(row.cells(benchmarks))} |" for row in CPU_ROWS]
    lines += [
        f"| {gpu['machine']['name'].removeprefix('NVIDIA ')}: {' | '.join(row.cells(timings))} |" for row in GPU_ROWS
    ]
    stale = any(record.CHANGED in line for line in lines)
    note = f" {record.CHANGED}: the kernel has changed since it was measured." if stale else ""
    return "\n".join([*lines, "", f"CPU rows: {cpu['machine']}. Bold: slower than the other.{note}"])


def replace(text: str, name: str, content: str) -> str:
    """A page with the content between the markers of this name replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def render() -> dict[Path, str]:
    """Every page with its measurements."""
    cpu_tables = [table(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    gpu_tables = [
        record.table(json.loads(path.read_text()), record.checks_line) for path in sorted(record.RESULTS.glob("*.json"))
    ]
    command_tables = [markdown(read_result(path)).rstrip() for path in sorted((RESULTS / "bench").glob("*.json"))]
    page = replace(PAGE.read_text(), "bench", "\n\n".join(command_tables) or NO_RESULTS)
    page = replace(page, "cpu", "\n\n".join(cpu_tables))
    return {
        README: replace(README.read_text(), "performance", summary_table()),
        PAGE: replace(page, "gpu", "\n\n".join(gpu_tables) or record.UNMEASURED),
    }


def update() -> None:
    """Writes the pages."""
    for path, text in render().items():
        path.write_text(text)


if __name__ == "__main__":
    update()
    sys.exit(0)
