"""The benchmark measures every family at tiny sizes; its JSON has the documented structure."""

from __future__ import annotations

import json
import os

import pytest
import torch

from opdkernels.backends import devices
from opdkernels.benchmark import machine, memory, run
from opdkernels.benchmark.memory import extra_bytes
from opdkernels.benchmark.result import Benchmark, failed, read_result
from opdkernels.benchmark.run import OURS, Scale, choose_scale, run_benchmark
from opdkernels.benchmark.workloads import WORKLOADS, dispatched
from opdkernels.config import BenchOptions
from opdkernels.errors import InputError
from opdkernels.models import validate
from tests.benchmark.conftest import make_result

HERE = torch.device("cpu")
TINY = Scale(coordinates=4096, limit_bytes=1 << 16, product_side=16, budget_s=0.0)


@pytest.fixture(scope="module")
def result():
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda code, dynamic: code)  # tests/test_gpu.py compiles every workload
        measured = run_benchmark(
            BenchOptions(against=("eager", "compile"), threads=1), scale=TINY, progress=lambda *step: steps.append(step)
        )
    assert [done for done, *_ in steps] == list(range(steps[0][1]))
    assert steps[-1][2] == WORKLOADS[-1].name
    return measured


def test_json_has_the_documented_structure(result, tmp_path):
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps(result))
    assert read_result(path) == json.loads(path.read_text())
    assert (result["format"], result["schema_version"]) == ("opdkernels benchmark", 1)
    path.write_text(json.dumps({**result, "schema_version": 2}))
    with pytest.raises(
        InputError, match=r"benchmark.json is not valid: schema_version: .*; run opdkernels bench again"
    ):
        read_result(path)


def test_schema_names_every_field_of_a_result(result):
    definitions = Benchmark.model_json_schema()["$defs"]
    assert set(definitions["Row"]["properties"]) == set(result["rows"][0])
    assert set(definitions["Timing"]["properties"]) == set(result["rows"][0]["timings"][OURS])
    assert set(definitions["Machine"]["properties"]) == set(result["machine"])
    assert set(Benchmark.model_json_schema()["properties"]) == set(result)


def test_every_workload_has_a_row(result):
    assert [row["workload"] for row in result["rows"]] == [workload.name for workload in WORKLOADS]
    assert not failed(result)
    for row, workload in zip(result["rows"], WORKLOADS, strict=True):
        assert list(row["timings"]) == [OURS, "eager", *["compile"] * workload.fuses]
        assert row["limit"] in result["limits"]


def test_rates_and_speeds_follow_from_the_times(result):
    for row in result["rows"]:
        ours = row["timings"][OURS]
        assert ours["speedup"] is None
        for name, timing in row["timings"].items():
            assert timing["fastest_s"] <= timing["median_s"] <= timing["slowest_s"]
            assert timing["per_s"] * timing["median_s"] == pytest.approx(row["work"])
            limit = result["limits"][row["limit"]]
            assert limit["unit"] == row["unit"]
            assert timing["fraction_of_limit"] * limit["per_s"] == pytest.approx(timing["per_s"])
            if name != OURS:
                assert timing["speedup"] == pytest.approx(timing["median_s"] / ours["median_s"])


def test_machine_is_described(result):
    machine = result["machine"]
    assert machine["threads"] == 1
    assert machine["cores"] >= 1
    assert machine["torch"] == str(torch.__version__)
    assert machine["gpu"] is None


def test_families_and_comparisons_are_chosen():
    result = run_benchmark(BenchOptions(family="quantile,gram", against=""), scale=TINY)
    assert [row["family"] for row in result["rows"]] == ["quantile", "gram"]
    assert list(result["limits"]) == ["read", "fp64 product"]
    assert all(list(row["timings"]) == [OURS] for row in result["rows"])


def test_wrong_results_are_not_timed():
    def wrong(operator):
        def call(*arguments):
            thresholds, counts = dispatched(operator)(*arguments)
            return thresholds, counts + 1

        return call

    result = run_benchmark(BenchOptions(family="quantile"), scale=TINY, kernel=wrong)
    (row,) = result["rows"]
    assert row["errors"] == {OURS: "the result differs from that of the reference, for 65,536 coordinates"}
    assert row["timings"]["eager"]["speedup"] is None
    assert OURS not in row["timings"]
    assert failed(result)
    validate(Benchmark, result, "result", remedy="")


def test_an_implementation_that_fails_costs_only_its_own_time(monkeypatch):
    def cannot(*arguments, **options):
        def call():
            raise RuntimeError("no C++ compiler\nsecond line")

        return call

    monkeypatch.setattr(torch, "compile", cannot)
    result = run_benchmark(BenchOptions(family="overlap", against="eager,compile"), scale=TINY)
    (row,) = result["rows"]
    assert row["errors"] == {"compile": "no C++ compiler"}
    assert list(row["timings"]) == [OURS, "eager"]
    assert failed(result)


def test_extra_memory_of_a_call_is_that_of_its_tensors():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of resident memory cannot be reset")
    num_bytes = 1 << 28
    measured = extra_bytes(lambda: torch.ones(num_bytes // 4).sum(), HERE)
    assert 0.95 * num_bytes <= measured <= 1.2 * num_bytes  # the system counts pages in batches


def test_unknown_extra_memory_is_none(monkeypatch):
    def cannot(*arguments):
        raise OSError("read-only")

    called = []
    monkeypatch.setattr(memory.Path, "write_text", cannot)
    assert extra_bytes(lambda: called.append(1), HERE) is None
    assert called == [1]


def test_sizes_fit_the_device(monkeypatch):
    monkeypatch.setattr(machine, "instruction_set", lambda: "avx2")
    assert choose_scale(HERE, quick=True).coordinates < choose_scale(HERE, quick=False).coordinates
    monkeypatch.setattr(machine, "instruction_set", lambda: "reference")
    assert choose_scale(HERE, quick=True).coordinates == choose_scale(HERE, quick=False).coordinates
    gpu = torch.device("cuda", 0)
    for free, coordinates in ((8 << 30, 1 << 24), (130 << 30, 1 << 28), (1 << 40, 1 << 28)):
        monkeypatch.setattr(devices, "free_memory_bytes", lambda device, free=free: free)
        scale = choose_scale(gpu, quick=False)
        assert scale.coordinates == coordinates
        assert scale.coordinates * run.BYTES_PER_COORDINATE <= free / 2
        assert choose_scale(gpu, quick=True).coordinates <= 1 << 24


def test_handwritten_result_of_other_tests_is_valid():
    validate(Benchmark, make_result(), "result", remedy="")
