"""Masks are what sorting gives, and controls are random where they should be and matched where they should be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.errors import InputError, UsageError
from opdkernels.masks import (
    MaskSet,
    changed,
    largest,
    magnitude_matched,
    near_zero,
    principal,
    random_subset,
    safe,
    top_changed,
)
from opdkernels.masks import build as make
from tests.analysis.conftest import save, trained, weights
from tests.in_process import run_cli

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def assert_extreme(flags: list[np.ndarray], values: list[np.ndarray], share: float, largest: bool) -> None:
    """The mask has the density `share`, contains the most extreme values, and takes the same fraction of the values
    that tie at the threshold from each tensor, within 1 + numel / 1000 coordinates."""
    chosen, everything = np.concatenate(flags), np.concatenate(values)
    k = math.ceil(share * everything.size)
    assert chosen.sum() == k
    threshold = np.sort(everything)[-k if largest else k - 1]
    assert chosen[everything > threshold if largest else everything < threshold].all()
    assert not chosen[everything < threshold if largest else everything > threshold].any()
    rate = chosen[everything == threshold].mean()
    for one, value in zip(flags, values, strict=True):
        tied = value == threshold
        assert abs(one[tied].sum() - rate * tied.sum()) <= 1 + value.size / 1000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per", make.SCOPES)
@pytest.mark.parametrize("share", [0.001, 0.1, 1.0])
def test_extremes_match_sorting(dtype, per, share, monkeypatch):
    monkeypatch.setattr(make, "STEP", 1000)
    source = weights(dtype)
    groups = {}
    for name in source:
        key = {"tensor": name, "module": parse_tensor_name(name).module, "model": ""}[per]
        groups.setdefault(key, []).append(name)
    for result, big in ((near_zero(source, share, scope=per), False), (largest(source, share, scope=per), True)):
        assert list(result) == list(source)
        for names in groups.values():
            assert_extreme(
                [result[n].to_bool().flatten().numpy() for n in names],
                [source[n].float().abs().flatten().numpy() for n in names],
                share,
                big,
            )


def test_ties_are_broken_randomly_and_reproducibly():
    """Half of equal values is chosen uniformly at random: neither the first ones nor every second one."""
    alike = {name: torch.ones(200, 100) for name in ("a", "b")}
    once, again = (largest(alike, 0.5, scope="model") for _ in range(2))
    assert {n: m.digest for n, m in once.items()} == {n: m.digest for n, m in again.items()}
    for mask in once.values():
        flags = mask.to_bool()
        assert int(flags.sum()) == 10_000
        assert 0 < int(flags.sum(0).min()) < 95
        assert 105 < int(flags.sum(0).max()) < 200
        assert 3000 < int((flags[:, 1:] != flags[:, :-1]).sum() / 2) < 7000
    assert not torch.equal(once["a"].to_bool(), once["b"].to_bool())


@pytest.mark.parametrize("per", make.SCOPES)
def test_top_changed_selects_largest_differences(per, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "STEP", 1000)
    source = weights()
    after = trained(source)
    result = top_changed(save(tmp_path / "a", source), save(tmp_path / "b", after), 0.15, scope=per)
    moved = {name: (after[name].float() - source[name].float()).abs() for name in result}
    expected = largest(moved, 0.15, scope=per)
    for name, mask in result.items():
        assert torch.equal(mask.to_bool(), expected[name].to_bool() & (moved[name] > 0))


def test_control_is_independent_of_tie_breaking():
    w = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    w[:100] = 0
    result = near_zero({"w": w}, 0.2)
    both = (result & magnitude_matched(result, {"w": w}))["w"].num_active
    assert 2800 < both < 3600  # 8,000 of 20,000 twice: 3,200 by chance


def test_top_changed_excludes_unchanged_coordinates(tmp_path):
    source = {"a": torch.zeros(40, 50), "b": torch.zeros(40, 50)}
    after = {name: w.clone() for name, w in source.items()}
    after["b"][3, :7] = 1.0
    for per in make.SCOPES:
        result = top_changed(save(tmp_path / "a", source), save(tmp_path / "b", after), 0.5, scope=per)
        assert (result["a"].num_active, result["b"].num_active) == (0, 7)


def test_checkpoint_and_tensors_give_the_same_masks(tmp_path):
    source = weights()
    path = save(tmp_path / "a", source)
    assert {n: m.digest for n, m in near_zero(path, 0.1).items()} == {
        n: m.digest for n, m in near_zero(source, 0.1).items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("atol", [0.0, 1e-5])
def test_changed_is_delta_above_atol(dtype, atol, tmp_path):
    source = weights(dtype)
    after = trained(source, size=2e-5)
    after["lm_head.weight"][0, :2] = torch.tensor([float("nan"), float("inf")])
    paths = save(tmp_path / "a", source), save(tmp_path / "b", after)
    for view in make.VIEWS:
        result = changed(*paths, atol=atol, view=view)
        for name, w in source.items():
            if view == "visible":
                a, b = (t.float().bfloat16().float() for t in (w, after[name]))
                moved, threshold = (b - a).bfloat16().float().abs(), float(torch.tensor(atol).bfloat16())
            else:
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                moved, threshold = (after[name].to(wide) - w.to(wide)).abs(), atol
            assert torch.equal(result[name].to_bool(), (moved > threshold) & moved.isfinite())


def test_principal_and_safe_match_svd():
    source = weights(torch.float32)
    main, rest, low = principal(source, 0.1), safe(source, 0.1), near_zero(source, 0.1)
    for name, w in source.items():
        if w.ndim != 2:
            assert main[name].num_active == 0
            assert rest[name].num_active == w.numel()
            continue
        u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
        k = max(1, int(0.1 * min(w.shape)))
        score = ((u[:, :k] * s[:k]) @ vh[:k]).abs().flatten()
        expected = torch.zeros(w.numel(), dtype=torch.bool)
        expected[score.topk(math.ceil(0.1 * w.numel())).indices] = True
        assert torch.equal(main[name].to_bool().flatten(), expected)
        assert torch.equal(rest[name].to_bool().flatten(), ~expected | low[name].to_bool().flatten())


def test_random_subset_depends_only_on_seed_and_name(monkeypatch):
    source = weights()
    one, same, other = (
        random_subset(source, 0.2),
        random_subset(dict(reversed(source.items())), 0.2),
        random_subset(source, 0.2, seed=1),
    )
    for name, w in source.items():
        assert one[name].num_active == math.ceil(0.2 * w.numel())
        assert one[name] == same[name]
        if w.numel() > 100:
            assert one[name] != other[name]
    full = random_subset(source, 0.2, scope="model")
    assert full.num_active == math.ceil(0.2 * full.numel)


def test_random_subset_is_uniform():
    source = {"w": torch.zeros(64)}
    hits = sum(random_subset(source, 0.25, seed=seed)["w"].to_bool().double() for seed in range(800))
    assert abs(hits - 200).max() < 5 * math.sqrt(800 * 0.25 * 0.75)


def test_control_has_the_magnitudes_of_the_mask():
    source = weights()
    masks = near_zero(source, 0.3) & random_subset(source, 0.5)
    result, other = magnitude_matched(masks, source), magnitude_matched(masks, source, seed=1)
    for name, w in source.items():
        a, b = (w.flatten().abs()[m[name].to_bool().flatten()].sort().values for m in (masks, result))
        assert torch.equal(a, b)
    assert result["lm_head.weight"] != masks["lm_head.weight"]
    assert result["lm_head.weight"] != other["lm_head.weight"]


def test_control_is_uniform_within_a_magnitude():
    source = {"w": torch.tensor([1.0, -1, 1, -1, 2, 2, 2, 2])}
    masks = MaskSet({"w": near_zero(source, 0.25)["w"]})
    hits = sum(magnitude_matched(masks, source, seed=seed)["w"].to_bool().double() for seed in range(800))
    assert hits[4:].sum() == 0
    assert abs(hits[:4] - 400).max() < 5 * math.sqrt(800 * 0.25)


def test_tied_tensors_are_used_once():
    w = torch.randn(10, 4)
    assert list(near_zero({"embed": w, "head": w, "ids": torch.arange(3)}, 0.1)) == ["embed"]


def test_bad_input_is_refused_by_name():
    source = weights()
    broken = {"w": torch.tensor([1.0, float("nan")])}
    for call, message in (
        (lambda: near_zero(source, 0), "density must be above 0"),
        (lambda: near_zero(source, 1.5), "density must be above 0"),
        (lambda: near_zero(source, 0.1, scope="layer"), "scope must be one of tensor, module, model"),
        (lambda: changed("a", "b", view="both"), "view must be one of"),
        (lambda: changed("a", "b", atol=-1), "atol must be"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    for call, message in (
        (lambda: near_zero(broken, 0.5), "w holds NaN, so that"),
        (lambda: principal({"w": torch.full((3, 3), float("inf"))}, 0.5), "w holds NaN or Inf, so that"),
        (lambda: magnitude_matched(near_zero(source, 0.1), {"x": torch.ones(2)}), "which the base does not have; make"),
        (lambda: magnitude_matched(near_zero({"w": torch.ones(2)}, 0.5), {"w": torch.ones(3)}), r"\[2\] and the ten"),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("view", ["visible", "stored"])
def test_coordinates_that_are_not_finite_are_counted_and_not_active(tmp_path, value, view):
    base = {"v.weight": torch.full((3, 4), 8.0), "w.weight": torch.full((3, 4), 8.0)}
    after = {name: w + 1 for name, w in base.items()}
    after["w.weight"][1] = value
    folders = [save(tmp_path / name, w) for name, w in (("base", base), ("trained", after))]
    with pytest.warns(UserWarning, match="^4 coordinates are NaN or Inf .* they are not active"):
        masks = changed(*folders, view=view)
    assert (masks.num_active, masks.nonfinite, masks["w.weight"].to_bool()[1].any()) == (20, 4, False)
    done = run_cli("mask", "changed", *folders, "-o", tmp_path / "masks", "--view", view)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.startswith("4 coordinates are NaN or Inf")
    assert MaskSet.load(tmp_path / "masks").num_active == 20
    with pytest.raises(InputError, match=r"w\.weight holds NaN or Inf, so that it has no largest changes"):
        top_changed(*folders, 0.1)


def test_changes_below_the_precision_of_fp32_are_seen_in_fp64(tmp_path):
    w = torch.ones(4, 8, dtype=torch.float64)
    after = w.clone()
    after[2] += 1e-12
    folders = [save(tmp_path / name, {"w": tensor}) for name, tensor in (("base", w), ("trained", after))]
    for masks in (top_changed(*folders, 0.5), changed(*folders, view="stored")):
        assert masks["w"].indices.tolist() == list(range(16, 24))


@pytest.mark.parametrize("make_masks", [near_zero, random_subset, principal, safe])
def test_file_without_weights_is_an_error(make_masks, tmp_path):
    """A file of masks that is given as the checkpoint would give a set of no masks."""
    path = tmp_path / "m.safetensors"
    random_subset({"w": torch.zeros(64)}, 0.5).save(path)
    with pytest.raises(
        InputError, match=r"m\.safetensors has no floating-point weights .* give a checkpoint of a model"
    ):
        make_masks(path, 0.5)
