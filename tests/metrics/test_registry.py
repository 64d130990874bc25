"""The registry describes exactly the columns that runs write, and everything generated from it is up to date."""

from __future__ import annotations

import pytest
import torch

from opdkernels.metrics import docs
from opdkernels.metrics.batch import TallyBatch
from opdkernels.metrics.catalog import METRICS, metrics_of, metrics_on_page
from opdkernels.metrics.coordinates import FORMULAS
from opdkernels.metrics.geometry import geometry_row, spectrum_row
from opdkernels.metrics.groups import group_rows
from opdkernels.metrics.null_metrics import fit_tallies, null_metrics
from opdkernels.metrics.registry import VIEWS
from opdkernels.metrics.spectra import SpectrumRecord
from opdkernels.ops.delta import delta
from opdkernels.ops.delta.many import SparseTally
from tests.ops.conformance import make_pair


def tally() -> SparseTally:
    return SparseTally.of(delta(*make_pair(2000, torch.bfloat16, hostile=False)))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.compute.__name__)
def test_every_formula_returns_the_metrics_it_registers(formula, view):
    columns = formula.compute(TallyBatch([tally()]), view)
    assert list(columns) == [metric.name for metric in formula.metrics]


def test_tensor_and_group_tables_have_the_registered_columns():
    sparse = tally()
    views = {}
    for view in VIEWS:
        views[view] = {}
        for formula in FORMULAS:
            views[view] |= formula.compute(TallyBatch([sparse]), view)
    views["visible"] |= null_metrics(views["visible"], fit_tallies([sparse], ["grid"]))
    for view in VIEWS:
        assert set(views[view]) == {metric.name for metric in metrics_of("tensors") if view in metric.views}
    about = {key: [""] for key in ("name", "layer", "module", "block", "tower")}
    for row in group_rows(about, views):
        names = set(row) - {"by", "view", "tower", "block", "module", "layer"}
        assert names == {metric.name for metric in metrics_of("groups") if row["view"] in metric.views}


def test_matrix_tables_have_the_registered_columns():
    record = SpectrumRecord(0, -1, "stored", 8, 6)
    assert set(spectrum_row(record)) == {metric.name for metric in metrics_of("spectra")}
    assert list(geometry_row(record)) == [metric.name for metric in metrics_of("geometry")]


def test_every_metric_is_documented():
    for metric in METRICS.values():
        assert metric.label
        assert metric.definition
        assert not metric.definition.endswith(".")
        assert "{}" not in metric.name + metric.label + metric.definition + metric.family_definition
        assert set(metric.views) <= set(VIEWS)


def test_metrics_on_pages_belong_to_a_table():
    for page in ("overview", "groups", "tensors", "trajectory", "overlap"):
        assert metrics_on_page(page)
    assert all(metric.tables for metric in METRICS.values())


def test_the_documentation_of_columns_is_up_to_date():
    text = docs.PAGE.read_text(encoding="utf-8")
    assert len(docs.BLOCK.findall(text)) == 6
    assert docs.render(text) == text, "run python -m opdkernels.metrics.docs"
