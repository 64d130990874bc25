"""summary.json of `overlap` and `trajectory`: what they write is valid, and what was changed by hand is refused."""

from __future__ import annotations

import copy
import json
import shutil

import pyarrow.parquet as pq
import pytest

from opdkernels import InputError, analyze, overlap, trajectory
from opdkernels import report as reports
from opdkernels.analysis.run_summaries import OverlapSummary, TrajectorySummary, read_run_summary
from opdkernels.analysis.summary import read_summary
from opdkernels.api import write_report
from tests.analysis.conftest import save, trained, weights


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of finished runs, by command, with what reads their summary."""
    place = tmp_path_factory.mktemp("runs")
    base = weights()
    checkpoints = [save(place / "base", base)]
    checkpoints += [save(place / f"step_{i}", trained(base, size=1e-3, seed=i)) for i in (1, 2)]
    overlap(*checkpoints, out=place / "overlap", strata=("row", "column"), report=False)
    trajectory(*checkpoints, out=place / "trajectory", report=False)
    analyze(*checkpoints[:2], place / "analyze", report=False)
    return {
        "overlap": (place / "overlap", lambda folder: read_run_summary(folder, OverlapSummary)),
        "trajectory": (place / "trajectory", lambda folder: read_run_summary(folder, TrajectorySummary)),
        "analyze": (place / "analyze", read_summary),
    }


@pytest.mark.parametrize("command", ["overlap", "trajectory", "analyze"])
def test_what_is_written_is_valid(runs, command):
    folder, read = runs[command]
    assert read(folder) == json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize(
    ("command", "place", "value", "message"),
    [
        ("overlap", ("pairs", 0, "jaccard"), "high", "pairs.0.jaccard"),
        ("overlap", ("pairs", 0, "jaccard"), None, None),
        ("overlap", ("pairs", 0, "jacard"), 0.5, "metric jacard is not one"),
        ("overlap", ("pairs", 0, "changed_a"), -1, "changed_a"),
        ("overlap", ("pairs", 0, "run_b"), "Z", "one row per pair"),
        ("overlap", ("pairs",), [], "one row per pair"),
        ("overlap", ("by_layer", 0, "layer"), "0", "by_layer.0.layer"),
        ("overlap", ("by_module", 0, "run_a"), "Z", "runs that do not exist"),
        ("overlap", ("runs",), {"A": "x"}, "2 to 16 runs"),
        ("overlap", ("changed_in_exactly",), {"0": 1}, "one number per number of runs"),
        ("overlap", ("schema_version",), 99, "schema_version"),
        ("overlap", ("coverage", "fractions", "base"), "all", "coverage.fractions.base"),
        ("overlap", ("nonfinite",), [{"name": "w"}], "nonfinite.0.coordinates"),
        ("overlap", ("steps",), [], "steps"),
        ("trajectory", ("steps", 0, "folder"), "../../../etc", "steps.0.folder"),
        ("trajectory", ("steps", 0, "step"), 7, "steps do not increase"),
        ("trajectory", ("steps", 0, "label"), "2", "two steps have one label"),
        ("trajectory", ("steps", 0, "exit_status"), 1, "steps.0.exit_status"),
        ("trajectory", ("steps", 0, "views", "visible", "frac_zero"), [1], "frac_zero"),
        ("trajectory", ("steps", 0, "views", "hidden"), {}, "steps.0.views"),
        ("trajectory", ("steps", 0, "views", "visible", "odd"), 1, "metric odd is not one"),
        ("trajectory", ("notes",), [3], "notes.0"),
        ("trajectory", ("atol",), -1.0, "atol"),
        ("analyze", ("curve", "eps", 3), 0.5, "eps are other thresholds"),
        ("analyze", ("curve", "null"), [], "one value per threshold"),
        ("analyze", ("ulp", "count"), [1, 2], "one count per distance"),
        ("analyze", ("ulp", "count", 4), -1, "ulp.count.4"),
        ("analyze", ("matched", "parameters"), -1, "matched.parameters"),
        ("analyze", ("distant", "matrices"), "few", "distant.matrices"),
    ],
)
def test_what_was_changed_by_hand_is_refused(runs, tmp_path, command, place, value, message):
    folder, read = runs[command]
    summary = copy.deepcopy(json.loads((folder / "summary.json").read_text()))
    *parents, last = place
    part = summary
    for key in parents:
        part = part[key]
    part[last] = value
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    if message is None:
        assert read(tmp_path) == summary
        return
    with pytest.raises(InputError, match=r"summary\.json is not valid") as raised:
        read(tmp_path)
    assert message in str(raised.value)
    assert str(raised.value).endswith("run the command again with --overwrite")


TABLES = {"overlap": "overlap.parquet", "trajectory": "trajectory.parquet", "analyze": "geometry.parquet"}


@pytest.mark.parametrize("command", TABLES)
def test_a_table_with_other_bytes_is_refused(runs, tmp_path, command):
    """Also where it is a valid table: a value that changed on the disk is no result."""
    folder = shutil.copytree(runs[command][0], tmp_path / "run")
    write_report(folder)
    table = pq.read_table(folder / TABLES[command])
    pq.write_table(table.slice(0, 0), folder / TABLES[command])
    with pytest.raises(InputError, match=f"{TABLES[command]} is damaged: its bytes are not those that"):
        write_report(folder)
    (folder / TABLES[command]).unlink()
    with pytest.raises(InputError, match=f"{TABLES[command]} does not exist; run the command again"):
        write_report(folder)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (None, r"run\.json does not list overlap\.parquet"),
        ({"../secret": "0" * 32}, r"run\.json is not valid: outputs"),
        ({"summary.json": "zz"}, r"run\.json is not valid: outputs"),
        ([], r"run\.json is not valid: outputs"),
    ],
)
def test_digests_in_run_json_are_validated(runs, tmp_path, outputs, message):
    folder = shutil.copytree(runs["overlap"][0], tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    assert run.pop("outputs").keys() == {"summary.json", "overlap.parquet"}
    (folder / "run.json").write_text(json.dumps(run if outputs is None else {**run, "outputs": outputs}))
    with pytest.raises(InputError, match=message):
        write_report(folder)


@pytest.mark.parametrize("command", TABLES)
def test_an_error_of_the_program_is_not_called_damage(runs, tmp_path, monkeypatch, command):
    folder = shutil.copytree(runs[command][0], tmp_path / "run")

    def render(kind, result):
        raise KeyError("a bug")

    monkeypatch.setattr(reports, "render", render)
    with pytest.raises(KeyError, match="a bug"):
        write_report(folder)


@pytest.mark.parametrize("metric", ["over_uniform_global", "expected_uniform_global", "jaccard", "changed_a"])
def test_a_pair_without_a_metric_is_refused(runs, tmp_path, metric):
    folder, read = runs["overlap"]
    summary = json.loads((folder / "summary.json").read_text())
    del summary["pairs"][0][metric]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(InputError, match=rf"summary\.json is not valid: .*{metric}"):
        read(tmp_path)
