"""What a pair is, in words: known pairs get their verdict, the same in the terminal, on the page and in the summary."""

from __future__ import annotations

import html
import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opdkernels import analyze, trajectory
from opdkernels.analysis.tables import weighted_median
from opdkernels.analysis.text import format_analysis
from opdkernels.formatting import times
from opdkernels.metrics.verdict import AS, LESS, MORE, SPARSITY, TOLERANCE, matrix_comparisons, words
from opdkernels.report import render, typography
from tests.analysis.conftest import save
from tests.analysis.test_matrix_nulls import NAME, SAMPLE, noise_of_the_same_energy


def cases() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Base and trained tensors of each kind of pair."""
    sides = {side: load_file(SAMPLE / f"{side}.safetensors")[NAME] for side in ("base", "seed0", "seed1")}
    base, generator = sides["base"], torch.Generator().manual_seed(5)
    size = float((sides["seed0"].float() - base.float()).square().mean().sqrt())

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    few = normal(128, 2) @ normal(2, 896)
    planted = torch.rand(base.shape, generator=generator) < 0.02
    large = base.float() + 60 * size * normal(128, 896)
    other = base.float().std() * normal(128, 896)
    trained = {
        "seed 0": sides["seed0"],
        "seed 1": sides["seed1"],
        "noise of seed 0": noise_of_the_same_energy(base, sides["seed0"], 1),
        "noise of seed 1": noise_of_the_same_energy(base, sides["seed1"], 2),
        "low rank": (base.float() + size * few).bfloat16(),
        "mask": (base.float() + 20 * size * planted * normal(128, 896)).bfloat16(),
        "dense": large.bfloat16(),
        "unrelated": other.bfloat16(),
        "identical": base,
    }
    pairs = {case: ({NAME: base}, {NAME: after}) for case, after in trained.items()}
    pairs["half a model"] = ({NAME: base, "model.layers.6.self_attn.k_proj.weight": base + 0}, {NAME: sides["seed0"]})
    wide = torch.where(base.abs() < 0.001, 0.001, base.float())
    pairs["invisible"] = ({NAME: wide}, {NAME: wide + 1e-4 * size * normal(128, 896)})
    return pairs


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return {
        case: analyze(save(folder / case / "a", base), save(folder / case / "b", trained))
        for case, (base, trained) in cases().items()
    }


@pytest.mark.parametrize(
    ("case", "kind", "concentrated"),
    [
        ("seed 0", "sparse as rounding alone", True),
        ("seed 1", "sparse as rounding alone", True),
        ("noise of seed 0", "sparse as rounding alone", False),
        ("noise of seed 1", "sparse as rounding alone", False),
        ("low rank", "sparse as rounding alone", True),
        ("mask", "sparse beyond rounding", False),
        ("dense", "dense", False),
        ("unrelated", "unrelated", None),
        ("identical", "identical", None),
        ("half a model", "not comparable", None),
        ("invisible", "no visible change", False),
    ],
)
def test_each_pair_gets_its_verdict_everywhere(results, case, kind, concentrated):
    result = results[case]
    verdict = result.summary["verdict"]
    assert (verdict["kind"], verdict["concentrated"]) == (kind, concentrated)
    title = verdict["text"].partition(":")[0]
    assert title == kind + (", concentrated in few directions" if concentrated else "")
    lines, page = format_analysis(result), html.unescape(render("analyze", result))
    assert lines[0] == verdict["text"]
    assert f">{title[0].upper()}{title[1:]}</h1>" in page
    for entry in verdict["comparisons"]:
        start, ratio, end = f"{entry['label']} ", f" {times(entry['ratio'])} ", f" {entry['words']}"
        assert any(line.startswith(start) and ratio in line and line.endswith(end) for line in lines)
        cells = f">{typography.times(entry['ratio'])}</td>", f">{entry['words']}</td></tr>"
        assert any(all(cell in row for cell in (f">{entry['label']}</a></th>", *cells)) for row in page.split("<tr>"))
    if kind == "dense":
        assert "says nothing" in verdict["text"]
        assert not {entry["metric"] for entry in verdict["comparisons"]} & set(SPARSITY)
    if kind == "unrelated":
        assert "opdkernels lineage" in lines[0]
    if kind in ("unrelated", "identical", "not comparable"):
        assert verdict["comparisons"] == []


@pytest.mark.parametrize("case", ["noise of seed 0", "noise of seed 1"])
def test_every_metric_of_noise_is_as_rounding_alone(results, case):
    comparisons = results[case].summary["verdict"]["comparisons"]
    assert len(comparisons) == 13
    assert {entry["metric"]: entry["words"] for entry in comparisons if entry["words"] != AS} == {}
    assert all(entry["low"] <= entry["ratio"] <= entry["high"] for entry in comparisons)


@pytest.mark.parametrize("case", ["seed 0", "seed 1"])
def test_directions_of_a_real_run_are_no_rounding_and_its_coordinates_are(results, case):
    entry = {comparison["metric"]: comparison for comparison in results[case].summary["verdict"]["comparisons"]}
    assert {metric: entry[metric]["words"] for metric in SPARSITY} == dict.fromkeys(SPARSITY, AS)
    assert (entry["energy_16"]["words"], entry["stable_rank"]["words"]) == (MORE, LESS)


@pytest.mark.parametrize("dense", [False, True], ids=["few", "noise"])
@pytest.mark.parametrize(("side", "concentrated"), [(64, None), (80, None), (96, True), (128, True)])
def test_few_directions_are_found_unless_the_matrices_are_too_small(tmp_path, side, concentrated, dense):
    generator = torch.Generator().manual_seed(7)
    names = [f"model.layers.{i}.self_attn.k_proj.weight" for i in range(2)]
    base = {name: torch.randn(side, side, generator=generator) for name in names}

    def update() -> torch.Tensor:
        left, right = (torch.randn(side, 2, generator=generator) for _ in range(2))
        return torch.randn(side, side, generator=generator) if dense else left @ right.T

    after = {name: w + 0.01 * update() for name, w in base.items()}
    verdict = analyze(save(tmp_path / "a", base), save(tmp_path / "b", after)).summary["verdict"]
    assert verdict["concentrated"] is (None if concentrated is None else concentrated and not dense)
    assert ("too small to say whether few directions" in verdict["text"]) == (concentrated is None)
    assert (", concentrated in few directions" in verdict["text"]) == (verdict["concentrated"] is True)


def planted(after):
    """Base and trained tensors: eight square matrices with a small update, then changed by `after(index, weight)`."""
    generator = torch.Generator().manual_seed(4)
    base = {f"model.layers.{i}.self_attn.k_proj.weight": torch.randn(64, 64, generator=generator) for i in range(8)}
    trained = {name: w + 1e-3 * torch.randn(w.shape, generator=generator) for name, w in base.items()}
    return base, {name: after(i, w) for i, (name, w) in enumerate(trained.items())}


REORDERED = {
    "transposed": lambda w: w.T.contiguous(),
    "rows in another order": lambda w: w.view(2, 32, 64).transpose(0, 1).reshape(64, 64),  # rotary halves
    "negative": lambda w: -w,
}


@pytest.mark.parametrize("change", REORDERED)
def test_weights_in_another_layout_are_not_described_as_an_update(tmp_path, change):
    base, trained = planted(lambda i, w: REORDERED[change](w) if i in (2, 5) else w)
    result = analyze(save(tmp_path / "a", base), save(tmp_path / "b", trained), spectra="off")
    verdict = result.summary["verdict"]
    assert (verdict["kind"], verdict["comparisons"]) == ("unrelated in part", [])
    assert "2 matrices, such as model.layers.2.self_attn.k_proj.weight, with 25.00 % of the coord" in verdict["text"]
    assert format_analysis(result)[0] == verdict["text"]
    assert ">Unrelated in part</h1>" in render("analyze", result)


def test_few_such_weights_are_noted(tmp_path):
    base, trained = planted(lambda i, w: w)
    base["head.weight"], trained["head.weight"] = torch.ones(8, 64), -torch.ones(8, 64)
    base["zero.weight"], trained["zero.weight"] = torch.zeros(64, 64), torch.ones(64, 64)  # zero-initialised weights
    result = analyze(save(tmp_path / "a", base), save(tmp_path / "b", trained), spectra="off")
    assert result.summary["verdict"]["kind"] == "sparse as rounding alone"
    assert result.summary["distant"]["largest"] == "head.weight"
    (note,) = result.summary["notes"]
    assert note.startswith("head.weight, with 1.37 % of the coordinates of all matrices, changed by at least half")
    assert f"note: {note}" in format_analysis(result)


def test_trajectory_says_that_a_checkpoint_is_unrelated(tmp_path):
    base, trained = planted(lambda i, w: w)
    other = {name: w.flip(0) for name, w in trained.items()}
    folders = [save(tmp_path / name, w) for name, w in (("base", base), ("step_1", trained), ("step_2", other))]
    (note,) = trajectory(*folders, spectra="off").summary["notes"]
    assert note.startswith("step 2: unrelated: the relative norm of the update is 14")


def test_equal_values_of_two_dtypes_are_not_called_equal_bits(tmp_path):
    weights = {"w": torch.arange(12.0).view(3, 4)}
    halves = {"w": weights["w"].bfloat16()}
    result = analyze(save(tmp_path / "a", weights), save(tmp_path / "b", halves), spectra="off")
    assert result.summary["verdict"]["text"] == "identical: every coordinate has the same value, stored in other dtypes"
    page = html.unescape(render("analyze", result))
    assert "in 1 tensor have the same value, stored in other dtypes." in page
    assert "have the same bits" not in page


def test_changes_beyond_the_range_are_not_called_weights_that_are_not_finite(tmp_path):
    large = {"w": torch.full((4, 4), 3e38)}
    result = analyze(save(tmp_path / "a", large), save(tmp_path / "b", {"w": -large["w"]}), spectra="off")
    assert result.summary["verdict"]["text"] == "not finite: every coordinate, or its change, is NaN or Inf"


def test_nothing_compared_is_no_success(tmp_path):
    empty = save(tmp_path / "a", {"w": torch.zeros(0, 4)})
    result = analyze(empty, empty, spectra="off")
    assert (result.summary["verdict"]["kind"], result.exit_status) == ("not comparable", 3)
    assert "have the same bits" not in render("analyze", result)


def test_close_ratios_are_never_called_opposite():
    ratios = np.arange(0.2, 3, 0.001)
    for deviation in (0, 0.01, 0.1):
        names = [words(ratio, deviation) for ratio in ratios]
        assert {LESS, AS, MORE} == set(names)
        assert all({a, b} != {LESS, MORE} for a, b in itertools.pairwise(names))
        assert names == sorted(names, key=[LESS, AS, MORE].index)
    assert words(1.34) == words(1.32) == MORE
    assert words(1 + TOLERANCE) == words(1 / (1 + TOLERANCE)) == AS


def test_matrices_are_compared_by_medians_and_their_interval_narrows():
    def row(ratio: float) -> dict:
        values = {"drift": ratio, "drift_null": 1.0, "drift_over_null": ratio, "drift_null_sd": 0.2}
        return {"name": "w", "part": None, "view": "stored", **values}

    (one,) = matrix_comparisons([row(1.3)])
    (many,) = matrix_comparisons([row(1.3)] * 50 + [row(9.0)] * 20)
    assert (one["ratio"], many["ratio"]) == (1.3, 1.3)
    assert (one["words"], many["words"]) == (AS, MORE)
    rng = np.random.default_rng(0)
    medians = np.median(1 + 0.2 * rng.standard_normal((4000, 70)), axis=1)
    assert (many["high"] - many["low"]) / (2 * 1.96) == pytest.approx(medians.std(), rel=0.1)


def test_weighted_median_is_that_of_repeated_values():
    values, weights = np.array([3.0, 1.0, np.nan, 2.0]), [1, 4, 9, 2]
    assert weighted_median(values, weights) == np.median(np.repeat([3.0, 1.0, 2.0], [1, 4, 2]))
    assert weighted_median(values, [0, 0, 5, 0]) is None
    assert weighted_median(None, []) is None
