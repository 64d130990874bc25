"""Analysis.to_wandb: with a module that records the calls, and with the real library where it is installed."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from opdkernels import UsageError, analyze


class Table:
    """Accepts what wandb.Table accepts: rows as long as the columns, and one type per column besides None."""

    def __init__(self, columns=None, data=None):
        assert all(isinstance(name, str) for name in columns)
        for row in data:
            assert len(row) == len(columns)
        for column in zip(*data, strict=True):
            kinds = {"number" if type(cell) in (int, float) else type(cell) for cell in column if cell is not None}
            assert len(kinds) <= 1
            assert kinds <= {"number", str, bool}
        self.columns, self.data = list(columns), [list(row) for row in data]

    def column(self, name):
        return [row[self.columns.index(name)] for row in self.data]


def chart(kind):
    def draw(table, x, y, title=""):
        return SimpleNamespace(kind=kind, x=table.column(x), y=table.column(y), title=title)

    return draw


class Html:
    def __init__(self, data, inject=True):
        self.html, self.inject = data.read(), inject


class Run:
    def __init__(self):
        self.summary, self.logged = {}, []

    def log(self, data, step=None, commit=None):
        self.logged.append(data)


@pytest.fixture
def wandb(monkeypatch):
    plot = SimpleNamespace(bar=chart("bar"), line=chart("line"))
    module = SimpleNamespace(Table=Table, Html=Html, plot=plot, run=None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def analysis(pair, tmp_path):
    return analyze(*pair, tmp_path / "out")


def test_summary_has_the_verdict_and_the_metrics(wandb, analysis):
    run = Run()
    analysis.to_wandb(run)
    summary = analysis.summary
    assert run.summary["opdkernels/verdict"] == summary["verdict"]["text"]
    assert run.summary["opdkernels/parameters"] == summary["matched"]["parameters"]
    for view, metrics in summary["views"].items():
        for name, value in metrics.items():
            assert run.summary.get(f"opdkernels/{view}/{name}") == value  # absent where it is None
    for name, centre in summary["spectra"]["metrics"].items():
        assert run.summary[f"opdkernels/spectra/{name}"] == centre["median"]
    assert all(isinstance(value, (str, int, float)) for value in run.summary.values())


def test_one_log_has_tables_charts_and_the_report(wandb, analysis):
    run = Run()
    analysis.to_wandb(run, prefix="pair/")
    (logged,) = run.logged
    tables = ["tensors", "groups", "spectra", "geometry"]
    assert logged.keys() == {f"pair/tables/{name}" for name in tables} | {
        "pair/changed_by_module",
        "pair/changed_by_layer",
        "pair/bf16_steps",
        "pair/report",
    }
    tensors = logged["pair/tables/tensors"]
    assert tensors.columns == analysis.tensors.column_names
    assert tensors.column("name") == analysis.tensors["name"].to_pylist()
    assert tensors.column("changed") == analysis.tensors["changed"].to_pylist()
    by_layer = logged["pair/changed_by_layer"]
    assert (by_layer.kind, by_layer.x) == ("line", [0, 1])
    rows = analysis.tensors.to_pylist()
    first = [row for row in rows if row["layer"] == 0 and row["view"] == "visible"]
    expected = sum(row["changed"] for row in first) / sum(row["numel"] for row in first)
    assert by_layer.y[0] == pytest.approx(expected)
    steps = logged["pair/bf16_steps"]
    assert "0" not in steps.x
    assert sum(steps.y) == sum(row["changed"] for row in rows if row["view"] == "visible")
    assert logged["pair/report"].html == (analysis.path / "report.html").read_text()
    assert not logged["pair/report"].inject


def test_the_active_run_is_the_default(wandb, analysis):
    with pytest.raises(UsageError, match=r"no active run of wandb; call wandb\.init"):
        analysis.to_wandb()
    wandb.run = Run()
    analysis.to_wandb()
    assert len(wandb.run.logged) == 1


def test_an_analysis_in_memory_without_spectra(wandb, pair):
    run = Run()
    analyze(*pair, spectra="off").to_wandb(run)
    assert not {"opdkernels/report", "opdkernels/tables/spectra"} & run.logged[0].keys()
    assert "opdkernels/tables/tensors" in run.logged[0]


def test_a_pair_without_a_change(wandb, pair):
    run = Run()
    analyze(pair[0], pair[0], spectra="off").to_wandb(run)
    assert run.summary["opdkernels/visible/frac_zero"] == 1
    assert sum(run.logged[0]["opdkernels/bf16_steps"].y) == 0


def test_without_wandb_the_message_says_what_to_install(analysis, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        analysis.to_wandb()


def test_real_library(analysis, tmp_path, monkeypatch):
    real = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = real.init(mode="offline", dir=str(tmp_path))
    try:
        analysis.to_wandb(run)
        summary = dict(run.summary)
    finally:
        run.finish()
    assert summary["opdkernels/verdict"] == analysis.summary["verdict"]["text"]
    assert summary["opdkernels/tables/tensors"]["_type"] == "table-file"
    assert summary["opdkernels/report"]["_type"] == "html-file"
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/table/opdkernels/tables/tensors_*.json"))
