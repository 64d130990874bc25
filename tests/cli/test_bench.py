"""`opdkernels bench`: what it prints, what it writes, and its exit statuses."""

from __future__ import annotations

import json

import pytest
import torch

from opdkernels.benchmark import run as benchmark
from opdkernels.benchmark.result import read_result
from opdkernels.cli.exit_status import ExitStatus


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    scale = benchmark.Scale(coordinates=4096, limit_bytes=1 << 16, product_side=16, budget_s=0.0)
    monkeypatch.setattr(benchmark, "choose_scale", lambda device, quick: scale)


def test_writes_json_table_chart_and_page(run, tmp_path):
    out = tmp_path / "bench"
    status, printed, progress = run("bench", "--family", "quantile,delta", "-o", out)
    assert status == ExitStatus.DONE
    assert {path.name for path in out.iterdir()} == {"benchmark.json", "table.md", "chart.svg", "report.html"}
    result = read_result(out / "benchmark.json")
    workloads = [row["workload"] for row in result["rows"]]
    assert workloads == ["delta of a bf16 pair", "delta against three tables", "quantile of bf16 and a mask"]
    for text in (printed, (out / "table.md").read_text(), (out / "report.html").read_text()):
        assert all(workload in text for workload in workloads)
    assert printed.splitlines()[-1] == f"written to {out}"
    assert [line.split()[0] for line in progress.splitlines()] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]


def test_prints_json_and_writes_nothing_without_a_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, printed, error = run("bench", "--family", "quantile", "-q", "--json")
    assert (status, error) == (ExitStatus.DONE, "")
    assert json.loads(printed)["rows"][0]["family"] == "quantile"
    assert run("bench", "--family", "quantile", "-q") == (ExitStatus.DONE, "", "")
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_measured_is_status_3(run, monkeypatch):
    def broken(*arguments):
        raise ArithmeticError("the result differs")

    monkeypatch.setattr(benchmark, "check", broken)
    status, printed, _ = run("bench", "--family", "quantile", "-q", "--json")
    assert status == ExitStatus.PARTIAL
    assert json.loads(printed)["rows"][0]["errors"] == {"opdkernels": "the result differs"}
    status, printed, _ = run("bench", "--family", "quantile")
    assert "quantile of bf16 and a mask, opdkernels: not measured: the result differs" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--family", "delta,conv"), "option family is 'conv': Input should be 'delta', 'overlap', "),
        (("--against", "jax"), "option against is 'jax': Input should be 'eager' or 'compile'"),
        (("--device", "tpu"), "option device is 'tpu': give cpu, cuda or cuda:1"),
    ],
)
def test_unknown_names_are_one_line(run, arguments, message):
    status, printed, error = run("bench", *arguments)
    assert (status, printed) == (ExitStatus.USAGE, "")
    assert error.startswith(f"opdkernels: {message}")
    assert error.count("\n") == 1


def test_missing_gpu_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, printed, error = run("bench", "--device", "cuda", "-o", tmp_path / "bench")
    assert (status, printed) == (ExitStatus.INPUT, "")
    assert error.startswith("opdkernels: --device cuda: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "bench").exists()


def test_a_folder_with_files_is_refused_before_anything_is_measured(run, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_limit", lambda *arguments: pytest.fail("measured"))
    (tmp_path / "notes.txt").write_text("mine")
    status, _, error = run("bench", "-o", tmp_path)
    assert status == ExitStatus.INPUT
    assert "is not an empty folder; choose another one" in error
