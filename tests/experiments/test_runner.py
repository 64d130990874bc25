"""Experiments run every arm, resume, refuse bad requests before anything runs, and report what the runs hold."""

from __future__ import annotations

import json
import signal
import zlib

import numpy as np
import pytest

from opdkernels.api import analyze
from opdkernels.distillation.jsonl import read_rows
from opdkernels.errors import InputError, UsageError
from opdkernels.experiments import arms, bootstrap, runner
from opdkernels.experiments.bootstrap import table_rows
from opdkernels.experiments.catalog import EXPERIMENTS
from opdkernels.experiments.runner import resolve_arms, run_experiment
from opdkernels.experiments.table import markdown, table
from opdkernels.masks import MaskSet
from tests.distillation.conftest import model, tokenizer


def varied(prompt, answer, completion):
    """A reward that nearly always differs between two models."""
    return zlib.crc32(completion.encode()) % 101 / 100


VARIED = f"{__name__}:varied"


def scores_of(folder, step):
    return next(row["scores"] for row in read_rows(folder / "scores.jsonl") if row["step"] == step)


def test_results_have_a_row_for_every_arm(options, tmp_path):
    chosen = options(num_eval_prompts=6, max_steps=10, learning_rate=1e-2, reward=VARIED)
    result = run_experiment(
        "masks",
        chosen,
        tmp_path,
        seeds=2,
        density=0.2,
        arms=["changed", "random", "magnitude-matched", "near zero", "early-changed"],
    )
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == ["start", "full", "changed", "random", "magnitude-matched", "near zero", "early-changed"]
    for name in list(rows)[2:]:
        assert rows[name]["trained"] == pytest.approx(0.2, abs=0.01)
        assert rows[name]["changed_stored"] <= rows[name]["trained"]
        assert rows[name]["score"] != rows["start"]["score"]
    made = {
        name: MaskSet.load(tmp_path / "seed-1" / "full" / "derived-at-10" / f"{file}-0.2.masks.safetensors")
        for name, file in FILES.items()
    }
    for name in ("random", "magnitude-matched"):
        assert (made[name] & made["changed"]).num_active < 0.6 * made["changed"].num_active
    assert made["early-changed"] != made["changed"]
    assert rows["early-changed"]["mask_recall"] < rows["changed"]["mask_recall"] == 1
    assert json.loads((tmp_path / "results.json").read_text()) == result
    assert (tmp_path / "table.md").read_text() == markdown(result)
    before = (tmp_path / "seed-0" / "changed-0.2" / "checkpoint-10" / "model.safetensors").stat().st_mtime_ns
    assert (
        run_experiment("masks", chosen, tmp_path, seeds=2, density=0.2, arms=["changed"])["rows"][2] == rows["changed"]
    )
    assert (tmp_path / "seed-0" / "changed-0.2" / "checkpoint-10" / "model.safetensors").stat().st_mtime_ns == before


def test_table_drops_uninformative_columns():
    row = {
        "score": 0.5,
        "score_low": 0.25,
        "score_high": 0.75,
        "trained": 1.0,
        "changed_visible": 0.5,
        "changed_stored": 0.5,
        "update_fraction": None,
        "relative_norm": 3.22e-4,
    }
    start, full = (
        {**dict.fromkeys(row), **{key: row[key] for key in row if "score" in key}, "arm": "start"},
        {**row, "arm": "full"},
    )
    other = {**row, "arm": "like |W|", "gain_retained": -0.001, "gain_retained_low": -0.125, "gain_retained_high": 1.5}
    head, _, first, _, last = table([start, full, other])
    assert head == "| arm | score | gain retained | changed in bf16 | relative norm |"
    assert first == "| start | 0.500 (0.250 to 0.750) |  |  |  |"
    assert last == r"| like \|W\| | 0.500 (0.250 to 0.750) | 0 % (-12 to 150) | 50.0 % | 0.032 % |"
    wider = table([start, {**full, "trained": 0.2}, {**other, "changed_stored": 0.75, "mask_recall": 0.5}])
    assert (
        wider[0] == "| arm | score | gain retained | trained | mask recall | changed in bf16 | changed as stored "
        "| relative norm |"
    )
    assert (
        table(
            [start, full, {"arm": "a part", "score": 0.5, "score_low": 0.4, "score_high": 0.6, "update_fraction": 0.2}]
        )[0]
        == "| arm | score | gain retained | update fraction |"
    )


def test_table_of_one_arm_keeps_its_metrics():
    row = {"arm": "full", "score": 0.5, "score_low": 0.25, "score_high": 0.75, "changed_visible": 0.5}
    assert (
        table([{**row, "arm": "start", "changed_visible": None}, row])[0]
        == "| arm | score | gain retained | changed in bf16 |"
    )
    assert table([row, row])[1].count("---") == table([row, row])[0].count("|") - 1


def test_deviations_between_seeds_are_scaled():
    scores = np.repeat(np.array([[0.0], [1.0], [2.0], [3.0]]), 10, axis=1)  # prompts all alike
    means = bootstrap.resample_means({"a": scores})["a"]
    assert means.mean() == pytest.approx(1.5, abs=0.03)
    assert means.std() == pytest.approx(scores[:, 0].std(ddof=1) / 2, rel=0.03)
    assert bootstrap.resample_means({"a": scores[:1]})["a"].std() == 0


@pytest.mark.parametrize(("seeds", "density"), [(0, None), (1, 1.5), (1, float("nan"))])
def test_invalid_sizes_are_rejected_before_anything_runs(options, tmp_path, seeds, density):
    with pytest.raises(UsageError, match=r"a seed or more and masks of a density in 0 \.\. 1"):
        run_experiment("masks", options(num_eval_prompts=4), tmp_path, seeds=seeds, density=density)
    assert not list(tmp_path.iterdir())


def test_parts_are_scored_with_the_seed_of_their_run(options, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "evaluate_checkpoint", lambda options, folder: seen.append(options.seed) or [0.5] * 4)
    run_experiment("grafts", options(num_eval_prompts=4, max_steps=2, seed=3), tmp_path, seeds=2, arms=["mlp alone"])
    assert seen == [3, 4]


FILES = {
    "changed": "changed",
    "random": "random",
    "magnitude-matched": "magnitude-matched",
    "early-changed": "changed-at-0.1",
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_at_its_default_density(options, tmp_path, name):
    result = run_experiment(name, options(num_eval_prompts=4, max_steps=10, reward=VARIED), tmp_path, seeds=1)
    assert result["density"] == EXPERIMENTS[name].density
    assert [row["arm"] for row in result["rows"]] == [
        "start",
        *(arm.name for arm in EXPERIMENTS[name].arms if "middle third" not in arm.name),
    ]  # of two layers


def test_precision_reports_change_expected_from_rounding(options, tmp_path):
    rows = {
        row["arm"]: row
        for row in run_experiment("precision", options(num_eval_prompts=4, max_steps=2, learning_rate=1e-4), tmp_path)[
            "rows"
        ]
    }
    for arm in ("bf16-split-master", "bf16-nearest", "fp32"):  # all weights are bf16 values, in any dtype
        visible = analyze(
            tmp_path / "seed-0" / "bf16-split-master" / "checkpoint-0",
            tmp_path / "seed-0" / arm / "checkpoint-2",
            spectra="off",
        ).summary["views"]["visible"]
        assert rows[arm.replace("-", " ", 1)]["changed_null"] == pytest.approx(
            visible["changed_null"] / visible["numel"], rel=1e-12
        )
    assert rows["fp32"]["changed_null"] == pytest.approx(rows["bf16 split-master"]["changed_null"], rel=0.2)
    assert 0 < rows["fp32"]["changed_null"] < 0.9 * rows["fp32"]["changed_stored"]
    assert "expected from bf16 rounding alone" in (tmp_path / "table.md").read_text()


def test_fp32_weights_between_bf16_values_have_their_own_null(options, tmp_path):
    student_model = model(0, initializer_range=0.2)
    student_model.save_pretrained(tmp_path / "s")
    tokenizer().save_pretrained(tmp_path / "s")
    rows = {
        row["arm"]: row
        for row in run_experiment(
            "precision",
            options(student=str(tmp_path / "s"), num_eval_prompts=4, max_steps=2, learning_rate=1e-4),
            tmp_path / "run",
        )["rows"]
    }
    fp32 = tmp_path / "run" / "seed-0" / "fp32"
    visible = analyze(fp32 / "checkpoint-0", fp32 / "checkpoint-2", spectra="off").summary["views"]["visible"]
    assert rows["fp32"]["changed_null"] == pytest.approx(visible["changed_null"] / visible["numel"], rel=1e-12)


@pytest.mark.parametrize("density", [0.2, 0.0])
def test_mask_recall_increases_along_the_trajectory(options, tmp_path, density):
    chosen = options(num_eval_prompts=4, max_steps=10, learning_rate=1e-4, snapshot_every=10)
    run_experiment(
        "trajectory", chosen, tmp_path, density=density, arms=["full"]
    )  # its snapshots do not depend on the other arms
    result = run_experiment("trajectory", chosen, tmp_path, density=density)
    rows = {row["arm"]: row for row in result["rows"]}
    steps = [
        path.name
        for path in sorted((tmp_path / "seed-0" / "full").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    ]
    assert steps == [f"checkpoint-{i}" for i in range(11)]
    held = [rows[f"mask at {share} of the steps"]["mask_recall"] for share in ("10%", "20%", "50%")]
    assert held[0] < held[1] < held[2] < rows["changed"]["mask_recall"] == 1
    assert "mask recall" in (tmp_path / "table.md").read_text()


def test_mask_of_another_run_is_compared_with_the_full_run(options, tmp_path):
    rows = {
        row["arm"]: row
        for row in run_experiment(
            "masks",
            options(num_eval_prompts=4, max_steps=2, reward=VARIED),
            tmp_path,
            density=0.2,
            arms=["changed by rlvr"],
        )["rows"]
    }
    assert rows["changed by rlvr"]["mask_recall"] < 0.9


def test_arm_without_changes_keeps_the_table(options, tmp_path):
    rows = {
        row["arm"]: row
        for row in run_experiment(
            "masks", options(num_eval_prompts=4, max_steps=2), tmp_path, density=0.2, arms=["rlvr"]
        )["rows"]
    }
    assert rows["rlvr"]["changed_stored"] == 0  # no completion is right, so that nothing is learnt
    assert rows["rlvr"]["near_zero_coverage_10pct"] is None


@pytest.mark.parametrize(
    ("given", "name", "arm", "message"),
    [
        ({"on_policy_fraction": 0.5}, "masks", "rlvr", "arm rlvr: .*set on_policy_fraction=1"),
        ({"lora_rank": 4}, "masks", "changed", "arm changed: .*set only one of them"),
        (
            {"max_steps": 12},
            "trajectory",
            "mask at 20% of the steps",
            "mask at 20% of the steps is derived from a fraction of 12 steps; take a multiple of 10",
        ),
    ],
)
def test_invalid_arms_are_rejected_before_any_runs(options, tmp_path, given, name, arm, message):
    with pytest.raises(UsageError, match=message):
        run_experiment(name, options(num_eval_prompts=4, **given), tmp_path, arms=[arm])
    assert not list(tmp_path.iterdir())


def test_missing_snapshot_is_named(options, tmp_path):
    chosen = options(num_eval_prompts=4, max_steps=12, snapshot_every=5)
    run_experiment("masks", chosen, tmp_path, arms=["full"])
    folder = tmp_path / "seed-0" / "full"
    for density in (0.0, 0.2):
        with pytest.raises(UsageError, match="run the experiment in another folder, or --overwrite"):
            arms.changed(arms.MaskContext(folder, 0.5, density, 0))


def test_masks_train_as_many_parameters_as_lora(options, tmp_path):
    arm = "early-changed lr x 1.0"
    rows = {
        row["arm"]: row
        for row in run_experiment(
            "subspace",
            options(num_eval_prompts=4, max_steps=10),
            tmp_path,
            arms=[arm, "early subspace rank 16 lr x 3.0"],
        )["rows"]
    }
    assert list(rows) == ["start", "full", "lora rank 8 lr x 3.0", "early subspace rank 16 lr x 3.0", arm]
    linear = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)] * 2
    total = 2 * 15 * 32 + sum(m * n for m, n in linear) + 5 * 32 + 2 * (32 + 16 + 16)
    assert rows["lora rank 8 lr x 3.0"]["trained"] == pytest.approx(sum(8 * (m + n) for m, n in linear) / total)
    assert rows["early subspace rank 16 lr x 3.0"]["trained"] == pytest.approx(sum(16 * m for m, _ in linear) / total)
    assert rows[arm]["trained"] == pytest.approx(rows["lora rank 8 lr x 3.0"]["trained"], abs=1 / total)


def test_arm_with_an_empty_mask_has_no_row(options, tmp_path):
    result = run_experiment(
        "masks", options(num_eval_prompts=4, max_steps=2), tmp_path, arms=["changed by rlvr"]
    )  # no completion is right, so that RLVR changes nothing
    assert [row["arm"] for row in result["rows"]] == ["start", "full", "rlvr"]
    still = options(
        num_eval_prompts=4, max_steps=2, teacher="", divergence_weight=0, reward_weight=1, num_generations=2
    )
    result = run_experiment("masks", still, tmp_path / "still", arms=["changed", "random", "near zero"])
    assert [row["arm"] for row in result["rows"]] == ["start", "full"]


def test_results_of_another_experiment_are_kept(options, tmp_path):
    chosen = options(num_eval_prompts=4, max_steps=2)
    run_experiment("masks", chosen, tmp_path, arms=["full"])
    before = (tmp_path / "results.json").read_text()
    with pytest.raises(
        UsageError, match="holds results of the experiment masks; choose another folder, or --overwrite them"
    ):
        run_experiment("grafts", chosen, tmp_path)
    assert (tmp_path / "results.json").read_text() == before
    assert (
        run_experiment(
            "grafts", options(num_eval_prompts=4, max_steps=2, overwrite=True), tmp_path, arms=["mlp alone"]
        )["experiment"]
        == "grafts"
    )
    for bad in ("{}", "[]", "{"):
        (tmp_path / "run.json").write_text(bad)
        for overwrite in (False, True):
            with pytest.raises(InputError, match=r"has a run\.json that is not of an experiment"):
                run_experiment("masks", chosen.model_copy(update={"overwrite": overwrite}), tmp_path, arms=["full"])


def test_progress_goes_to_stderr(options, tmp_path, capfd):
    run_experiment("masks", options(num_eval_prompts=4, max_steps=2), tmp_path, arms=["changed by rlvr"], quiet=False)
    output = capfd.readouterr()
    assert output.out == ""
    assert "masks, seed 0: full\n" in output.err
    assert "changed by rlvr is left out: nothing had changed\n" in output.err


def test_seeds_count_up_from_the_given_seed(options, tmp_path):
    chosen = options(num_eval_prompts=4, max_steps=2, seed=3, reward=VARIED)
    result = run_experiment("masks", chosen, tmp_path / "a", seeds=2, arms=["full"])
    assert sorted(path.name for path in (tmp_path / "a").glob("seed-*")) == ["seed-3", "seed-4"]
    assert (result["seeds"], result["options"]["seed"]) == (2, 3)
    assert result["snapshots"] == run_experiment("masks", chosen, tmp_path / "b", arms=["full"])["snapshots"]
    assert runner.reference_pair(tmp_path / "a", result)[1] == tmp_path / "a" / "seed-3" / "full" / "checkpoint-2"


def test_arm_ignores_options_of_other_arms(options, tmp_path):
    chosen = options(
        num_eval_prompts=4, max_steps=2, divergence="jsd", beta=0.3, k=3, temperature=0.5, precision="nearest"
    )
    for name, arm in (("masks", "rlvr"), ("subspace", "lora rank 8 lr x 3.0")):
        assert arm in [row["arm"] for row in run_experiment(name, chosen, tmp_path / name, arms=[arm])["rows"]]


def test_full_update_grafted_scores_like_the_run(options, tmp_path, monkeypatch):
    chosen = options(num_eval_prompts=8, max_steps=3, learning_rate=1e-2, reward=VARIED)
    every = arms.UpdateSlice(select="attention,mlp,embedding,lm_head,norm")
    arm = arms.Arm("all of it", part=every)
    lacking = arms.Arm("routers", part=arms.UpdateSlice(select="router"))
    parts = EXPERIMENTS["grafts"]
    monkeypatch.setitem(
        EXPERIMENTS,
        "grafts",
        arms.Experiment(parts.about, [*parts.arms, arm, lacking], density=parts.density),
    )
    rows = {row["arm"]: row for row in run_experiment("grafts", chosen, tmp_path)["rows"]}
    assert rows["all of it"]["score"] == rows["full"]["score"] != rows["start"]["score"]
    full = tmp_path / "seed-0" / "full"
    assert json.loads((full / "derived-at-3" / "all-of-it.json").read_text())["scores"] == scores_of(full, 3)
    assert rows["without mlp"]["score"] not in (rows["full"]["score"], rows["start"]["score"])
    assert rows["all of it"]["update_fraction"] == 1
    assert rows["largest alone"]["update_fraction"] + rows["all but the largest"]["update_fraction"] == pytest.approx(1)
    assert rows["mlp alone"]["update_fraction"] + rows["without mlp"]["update_fraction"] == pytest.approx(1)
    assert "without the middle third of layers" not in rows  # of two layers
    assert "routers" not in rows
    assert not [path for path in (tmp_path / "seed-0" / "full" / "derived-at-3").iterdir() if path.is_dir()]


def test_derived_masks_are_rebuilt_when_a_run_continues(options, tmp_path):
    first = run_experiment(
        "masks", options(num_eval_prompts=4, max_steps=2), tmp_path / "a", density=0.2, arms=["changed"]
    )
    with pytest.raises(UsageError, match="holds another run"):
        run_experiment("masks", options(num_eval_prompts=4, max_steps=4), tmp_path / "a", density=0.2, arms=["changed"])
    with pytest.raises(UsageError, match="has taken 4 steps and max_steps is 2"):
        run_experiment("masks", options(num_eval_prompts=4, max_steps=2), tmp_path / "a", density=0.2, arms=["changed"])
    run_experiment(
        "masks", options(num_eval_prompts=4, max_steps=4, overwrite=True), tmp_path / "a", density=0.2, arms=["changed"]
    )
    masks = [
        MaskSet.load(tmp_path / "a" / "seed-0" / "full" / f"derived-at-{step}" / "changed-0.2.masks.safetensors")
        for step in (2, 4)
    ]
    assert masks[0] != masks[1]
    assert first["steps"] == 2


def test_intervals_have_their_nominal_coverage():
    """Prompts are drawn 200 times from known rates: about 95 % of the intervals contain them."""
    rng, held = np.random.default_rng(0), 0
    end = {"trained": 1.0}
    for _ in range(200):
        scores = {
            name: [(rng.random(150) < rate).astype(float).tolist()]
            for name, rate in (("start", 0.2), ("full", 0.7), ("changed", 0.6))
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bootstrap, "RESAMPLES", 400)
            rows = {row["arm"]: row for row in table_rows(scores, {"full": [end], "changed": [end]}, "full")}
        held += rows["changed"]["gain_retained_low"] <= 0.8 <= rows["changed"]["gain_retained_high"]
    assert 0.9 <= held / 200 <= 0.99


def test_gain_near_zero_has_no_retained_fraction():
    scores = {"start": [[0.0, 1.0] * 10], "full": [[1.0, 0.0] * 10]}
    rows = table_rows(scores, {"full": [{"trained": 1.0}]}, "full")
    assert "gain_retained" not in rows[1]
    assert rows[1]["score"] == 0.5


def test_equal_arms_retain_the_whole_gain():
    scores = {"start": [[0.0] * 30], "full": [[1.0, 1.0, 0.0] * 10], "changed": [[1.0, 1.0, 0.0] * 10]}
    row = table_rows(scores, {"full": [{"trained": 1.0}], "changed": [{"trained": 0.2}]}, "full")[2]
    assert (row["gain_retained"], row["gain_retained_low"], row["gain_retained_high"]) == (1.0, 1.0, 1.0)


def test_arm_brings_the_arms_it_needs():
    assert [arm.name for arm in resolve_arms(EXPERIMENTS["masks"], ["changed by rlvr"])] == [
        "full",
        "rlvr",
        "changed by rlvr",
    ]
    with pytest.raises(UsageError, match="there is no arm magic"):
        resolve_arms(EXPERIMENTS["masks"], ["magic"])


def test_invalid_requests_are_rejected(options, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="there is no experiment magic; there are masks"):
        run_experiment("magic", options(), tmp_path)
    with pytest.raises(UsageError, match="set num_eval_prompts and snapshot_every"):
        run_experiment("masks", options(), tmp_path)
    for name in ("sgd", "subspace"):
        with pytest.raises(
            UsageError, match=f"density would change nothing: {name} has no masks of a size of their own; leave it out"
        ):
            run_experiment(name, options(num_eval_prompts=4), tmp_path, density=0.2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="leave torchrun out"):
        run_experiment("masks", options(num_eval_prompts=4), tmp_path)


def test_signal_stops_the_whole_experiment(options, tmp_path, monkeypatch):
    from opdkernels.distillation import loop

    train_step = loop.train_step

    def signalled(state, step, **more):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return train_step(state, step, **more)

    monkeypatch.setattr(loop, "train_step", signalled)
    chosen = options(num_eval_prompts=4, max_steps=3)
    with pytest.raises(KeyboardInterrupt):
        run_experiment("masks", chosen, tmp_path, density=0.2, arms=["changed"])
    assert not list((tmp_path / "seed-0").rglob("*.masks.safetensors"))
    monkeypatch.undo()
    assert [row["arm"] for row in run_experiment("masks", chosen, tmp_path, density=0.2, arms=["changed"])["rows"]] == [
        "start",
        "full",
        "changed",
    ]
