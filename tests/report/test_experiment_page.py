"""The report of an experiment, from handwritten results."""

from __future__ import annotations

import json
import re

import pytest

from opdkernels.api import write_report
from opdkernels.errors import InputError
from opdkernels.outputs import EXPERIMENT
from opdkernels.report import charts, svg, typography
from opdkernels.report.experiment import headline, page_context


def row(arm, score, kept=None, **more):
    def spread(name, value):
        return {name: value, f"{name}_low": value - 0.05, f"{name}_high": value + 0.05}

    return {"arm": arm, **spread("score", score), **(spread("gain_retained", kept) if kept is not None else {}), **more}


def result(experiment, rows, against="full", along=()):
    return {
        "experiment": experiment,
        "about": "Why?",
        "seeds": 2,
        "prompts": 50,
        "steps": 10,
        "density": 0.2,
        "reference_arm": against,
        "student": "a",
        "teacher": "b",
        "task": "addition",
        "options": {"learning_rate": 0.1},
        "rows": [row("start", 0.2), *rows],
        "snapshots": list(along),
    }


FULL = row("full", 0.7, 1.0, trained=1.0, changed_visible=0.3, changed_stored=0.5)


@pytest.mark.parametrize(
    ("experiment", "rows", "against", "expected"),
    [
        (
            "masks",
            [FULL, row("changed", 0.6, 0.8, trained=0.2)],
            "full",
            "Training 20.00 % of the weights, those that the full run changed most, retains 80.00 % "
            "(75.00 % to 85.00 %) of its gain (full: 20.00 % to 70.00 %; 2 seeds)",
        ),
        ("masks", [FULL], "full", "full: from 20.00 % to 70.00 % on held-out prompts, 2 seeds"),
        (
            "trajectory",
            [FULL, row("mask at 10% of the steps", 0.6, 0.8, trained=0.2, mask_recall=0.55)],
            "full",
            "The mask at 10% of the steps contains 55.00 % of the final one; by chance it would contain 20.00 %",
        ),
        (
            "grafts",
            [
                FULL,
                row("largest alone", 0.6, 0.8, update_fraction=0.2),
                row("all but the largest", 0.3, 0.2, update_fraction=0.8),
            ],
            "full",
            "The largest 20.00 % of the changes alone retain 80.00 % (75.00 % to 85.00 %) of the gain, all others "
            "20.00 % (15.00 % to 25.00 %)",
        ),
        ("grafts", [FULL, row("mlp alone", 0.6, 0.8, update_fraction=0.2)], "full", "full: from"),
        (
            "precision",
            [row("bf16 split-master", 0.7, 1.0, changed_stored=0.3), row("fp32", 0.7, 1.0, changed_stored=1.0)],
            "bf16 split-master",
            "Changed as stored: 30.00 % with bf16 split-master, 100 % with fp32",
        ),
        (
            "sgd",
            [
                row("adamw lr x 1.0", 0.7, 1.0),
                row("adamw lr x 3.0", 0.6),
                row("sgd lr 0.1", 0.4),
                row("sgd lr 1.0", 0.5),
            ],
            "adamw lr x 1.0",
            "At the best learning rate: adamw 70.00 %, sgd 50.00 %",
        ),
        (
            "subspace",
            [FULL, row("lora rank 8 lr x 3.0", 0.5, 0.6)],
            "full",
            "At the best learning rate: lora rank 8 50.00 %",
        ),
    ],
)
def test_headline_states_the_result(experiment, rows, against, expected):
    assert headline(result(experiment, rows, against)).replace("\u202f", " ").startswith(expected)


def test_headline_of_one_seed_says_so():
    assert headline({**result("masks", [FULL]), "seeds": 1}).endswith("on held-out prompts, one seed")


def test_table_columns_are_those_that_some_arm_has():
    actual = page_context(result("grafts", [FULL, row("mlp alone", 0.6, 0.8, update_fraction=0.2)]))
    keys = [column.key for column in actual["table"].columns]
    assert keys == ["arm", "score", "gain_retained", "update_fraction", "trained", "changed_visible", "changed_stored"]
    actual = page_context(
        result(
            "precision",
            [row("bf16 split-master", 0.7, 1.0, changed_visible=0.3, changed_null=0.31, changed_stored=0.3)],
            "bf16 split-master",
        )
    )
    assert [column.key for column in actual["table"].columns][-3:] == [
        "changed_visible",
        "changed_null",
        "changed_stored",
    ]


@pytest.mark.parametrize("shift", [0.0, -0.75, -2.0])
def test_intervals_of_any_sign_are_inside_the_drawing(shift):
    rows = [("a", 0.1 + shift, -0.2 + shift, 0.4 + shift), ("b", 1.0 + shift, 0.9 + shift, 1.3 + shift)]
    for frame in svg.FRAMES:
        drawing = str(charts.interval_chart(rows, typography.percent, "", "", frame))
        places = [float(x) for x in re.findall(r'circle class="stored-dot" cx="([-\d.]+)"', drawing)]
        ends = [
            tuple(map(float, actual))
            for actual in re.findall(r'class="stored-line" d="M([-\d.]+)[ ,][-\d.]+ ?L([-\d.]+)', drawing)
        ]
        assert len(places) == len(ends) == 2
        for place, (low, high) in zip(places, ends, strict=True):
            assert 0 < low < place < high <= frame.width
        assert places[0] < places[1]


def test_a_single_seed_is_mentioned():
    rows = [FULL, row("changed", 0.6, 0.8, trained=0.2)]
    assert not any("One seed" in line for line in page_context(result("masks", rows))["interpretation"])
    assert any("prompts only" in line for line in page_context({**result("masks", rows), "seeds": 1})["interpretation"])


def test_the_analysis_is_linked_without_snapshots(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"format": EXPERIMENT.format, "experiment": "masks"}))
    (tmp_path / "results.json").write_text(json.dumps(result("masks", [FULL])))
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "report.html").touch()
    write_report(tmp_path)
    assert 'href="analysis/report.html"' in (tmp_path / "report.html").read_text()


def test_a_run_without_changes_has_no_curve_of_its_final_set():
    along = [
        {
            "step": step,
            "changed_visible": 0.0,
            "changed_stored": 0.0,
            "recall_vs_final": None,
            "precision_vs_final": None,
        }
        for step in (5, 10)
    ]
    assert [figure.heading for figure in page_context(result("masks", [FULL], along=along))["curves"]] == [
        "What has changed."
    ]


def test_a_page_can_be_rewritten_from_results(tmp_path):
    actual = result("masks", [FULL, row("changed", 0.6, 0.8, trained=0.2)])
    (tmp_path / "results.json").write_text(json.dumps(actual))
    with pytest.raises(InputError, match="holds no run"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format": EXPERIMENT.format, "experiment": "masks"}))
    assert "retains 80.00" in write_report(tmp_path).read_text()
    for bad in ("{}", "[]", "{"):
        (tmp_path / "results.json").write_text(bad)
        with pytest.raises(InputError, match="run the experiment again"):
            write_report(tmp_path)


def test_a_gain_that_may_be_zero_is_mentioned():
    actual = page_context(result("masks", [row("full", 0.21), row("changed", 0.22, trained=0.2)]))
    assert actual["interpretation"] == [
        "The gain of full may be zero at this number of seeds and prompts, so fractions of it are not given."
    ]
