"""Result objects: a short repr, and DataFrames if pandas is installed."""

from __future__ import annotations

import sys

import pytest

from opdkernels import analyze, load, overlap, trajectory
from tests.analysis.conftest import save, trained, weights


@pytest.fixture
def results(pair, tmp_path):
    """Each result with its main table."""
    base, first = pair
    second = save(tmp_path / "step_2", trained(weights(), seed=5))
    analysis = analyze(base, first, tmp_path / "out")
    overlaps = overlap(base, first, second)
    steps = trajectory(base, first, second, spectra="off")
    return (analysis, analysis.tensors), (overlaps, overlaps.tensors), (steps, steps.table)


def test_repr_is_short_and_names_inputs_and_path(results, pair, tmp_path):
    (analysis, _), (overlaps, _), (steps, _) = results
    for result, _ in results:
        assert len(repr(result)) < 500
        assert "\n" not in repr(result)
        assert repr(pair[0]) in repr(result)
    assert repr(analysis) == repr(load(tmp_path / "out"))
    assert f"path={str(tmp_path / 'out')!r}" in repr(analysis)
    assert "tensors=14" in repr(analysis)
    visible = analysis.summary["views"]["visible"]
    assert f"visible {100 * (1 - visible['frac_zero']):.2f} %" in repr(analysis)
    assert "runs=2" in repr(overlaps)
    assert "steps=[2, 'final']" in repr(steps)
    assert "path=None" in repr(steps)


def test_to_pandas_returns_the_table(results):
    pytest.importorskip("pandas")
    for result, table in results:
        frame = result.to_pandas()
        assert list(frame.columns) == table.column_names
        assert len(frame) == len(table)
    assert len(results[0][0].to_pandas("groups")) == len(results[0][0].groups)


def test_to_pandas_without_pandas_names_the_extra(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    for result, _ in results:
        with pytest.raises(ImportError, match=r"pip install opdkernels\[pandas\]"):
            result.to_pandas()


def test_to_pandas_names_a_table_that_is_off(pair):
    with pytest.raises(ValueError, match="no table 'spectra'; run it with spectra="):
        analyze(*pair, spectra="off").to_pandas("spectra")
