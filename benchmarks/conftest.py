"""Data and options of the benchmarks. `make bench` runs them all; docs/benchmarks.md quotes their results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import data, harness
from opdkernels.checkpoint.open import open_checkpoint


def pytest_addoption(parser):
    parser.addoption("--bench-data", default="bench-data", help="Folder of the checkpoints; created if missing (3 GB).")
    parser.addoption("--paper-checkout", help="A checkout of SydCS/OPD-Param-Analysis to measure against.")
    parser.addoption(
        "--trl-python",
        help="A Python with trl and the requirements of opdkernels[distill], to measure its trainer.",
    )
    parser.addoption(
        "--paper-python", help="A Python with torch, pandas, tqdm and safetensors, to run --paper-checkout."
    )


@pytest.fixture(scope="session")
def folder(request) -> Path:
    path = Path(request.config.getoption("--bench-data"))
    data.write(path)
    return path


@pytest.fixture(scope="session")
def embedding(folder) -> list[torch.Tensor]:
    """136 M coordinates of source, run A and run B, in memory."""
    tensors = []
    for run in ("source", "run_a", "run_b"):
        source = open_checkpoint(folder / run)
        info = source.tensors["model.embed_tokens.weight"]
        tensors.append(source.read(info.name, 0, info.numel).clone())
        source.close()
    return tensors


@pytest.fixture(scope="session")
def bandwidth() -> dict[int, float]:
    return {threads: harness.read_bandwidth(threads) for threads in (1, 2)}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def paper_script(request) -> list[str]:
    """Command prefix that runs a stage of the paper's reference scripts."""
    checkout, python = (request.config.getoption(o) for o in ("--paper-checkout", "--paper-python"))
    if not checkout or not python:
        pytest.skip(
            "give --paper-checkout CHECKOUT and --paper-python PYTHON to measure against the paper's reference scripts"
        )
    return [python, str(Path(__file__).parent / "paper_csv_stage.py"), checkout]


@pytest.fixture
def row(benchmark):
    """Adds metrics to the benchmark's result, which benchmarks/run.py prints."""

    def add(**metrics):
        benchmark.extra_info.update(metrics)

    return add
