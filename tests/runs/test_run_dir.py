"""The run directory: one writer at a time, atomic removal, damage is reported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from opdkernels import InputError, UsageError, analyze, load, outputs, overlap
from opdkernels.api import write_report
from tests.analysis.conftest import save, trained, weights


def test_second_writer_is_input_error(pair, tmp_path):
    program = (
        "import sys, opdkernels\n"
        "def wait(done, total, name):\n"
        "    print('at work', flush=True)\n"
        "    sys.stdin.readline()\n"
        f"opdkernels.analyze({pair[0]!r}, {pair[1]!r}, {str(tmp_path / 'out')!r}, progress=wait)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "at work\n"
        with pytest.raises(InputError, match="another process is writing"):
            analyze(*pair, tmp_path / "out")
        first.communicate("\n" * 1000)
    assert first.returncode == 0
    assert analyze(*pair, tmp_path / "out").run["resumed_tensors"] == 14


def test_empty_output_path_is_usage_error(pair):
    with pytest.raises(UsageError, match="no name"):
        analyze(*pair, "")


@pytest.mark.parametrize("name", ["summary.json", "tensors.parquet", "groups.parquet"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"PAR1"])
def test_damaged_run_is_input_error(pair, tmp_path, name, content):
    analyze(*pair, tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    if content is not None:
        (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        load(tmp_path / "out")


def test_overwrite_removes_outputs_only(pair, tmp_path):
    out = tmp_path / "out"
    analyze(*pair, out, csv=True, paper_csv=True)
    for mine in ("keep", "tallies/keep", "spectra/000001.arrow.bak", "report.html.old"):
        (out / mine).write_text("me")
    analyze(*pair, out, overwrite=True, spectra="off", report=False)
    for mine in ("keep", "tallies/keep", "spectra/000001.arrow.bak", "report.html.old"):
        assert (out / mine).read_text() == "me"
    assert not [*out.glob("*.csv"), *out.glob("spectra/0*.arrow"), *out.glob("report.html")]


def test_interrupted_overwrite_keeps_run_json(pair, tmp_path, monkeypatch):
    analyze(*pair, tmp_path / "out")
    monkeypatch.setattr(outputs, "remove_path", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        analyze(*pair, tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["command"] == "analyze"


def test_commands_reject_directories_of_other_commands(pair, tmp_path):
    third = save(tmp_path / "third", trained(weights(), seed=5))
    analyze(*pair, tmp_path / "a")
    overlap(*pair, third, out=tmp_path / "b")
    with pytest.raises(InputError, match="another run"):
        overlap(*pair, third, out=tmp_path / "a")
    with pytest.raises(InputError, match="another run"):
        analyze(*pair, tmp_path / "b")
    with pytest.raises(InputError, match="holds a run of overlap"):
        load(tmp_path / "b")
    page = (tmp_path / "b" / "report.html").read_bytes()
    assert write_report(tmp_path / "b").read_bytes() == page
    (tmp_path / "b" / "overlap.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="damaged"):
        write_report(tmp_path / "b")
