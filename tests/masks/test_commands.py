"""`opdkernels mask` as a user runs it."""

from __future__ import annotations

import inspect
import json

import pytest

import opdkernels
from opdkernels import config, masks, patch
from opdkernels.masks import MaskSet
from opdkernels.masks.stats import compare_masks, mask_stats
from tests.in_process import run_cli


def run(*arguments, status=0):
    done = run_cli("mask", *arguments)
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.parametrize(("options", "function"), [
    (config.ChangedMaskOptions, masks.changed),
    (config.TopChangedMaskOptions, masks.top_changed),
    (config.NearZeroMaskOptions, masks.near_zero),
    (config.PrincipalMaskOptions, masks.principal),
    (config.RandomMaskOptions, masks.random_subset),
    (config.MagnitudeMatchedMaskOptions, masks.magnitude_matched),
    (config.PatchCreateOptions, patch.create),
    (config.PatchApplyOptions, patch.apply),
    (config.GraftOptions, patch.graft),
    (config.PushOptions, opdkernels.push_to_hub),
], ids=lambda value: value.__name__)  # fmt: skip
def test_commands_and_functions_have_the_same_defaults(options, function):
    parameters = inspect.signature(function).parameters
    common = [
        name
        for name in options.model_fields
        if name in parameters and parameters[name].default is not inspect.Parameter.empty
    ]
    assert common or options is config.PrincipalMaskOptions  # whose density has no default in Python
    for name in common:
        default = options.model_fields[name].default
        assert (None if name == "private" else default) == parameters[name].default, name  # a flag is False or None


def test_commands_match_functions(pair, tmp_path):
    a, b, c, d = (tmp_path / f"{name}.safetensors" for name in "abcd")
    assert "are active; written to" in run("changed", *pair, "-o", a).stdout
    assert MaskSet.load(a) == masks.changed(*pair)
    run("near-zero", pair[0], "--density", 0.2, "--scope", "model", "-o", b)
    assert MaskSet.load(b) == masks.near_zero(pair[0], 0.2, scope="model")
    run("combine", a, "minus", b, "-o", c)
    assert MaskSet.load(c) == MaskSet.load(a) - MaskSet.load(b)
    run("magnitude-matched", a, pair[0], "--seed", 3, "-o", d)
    assert MaskSet.load(d) == masks.magnitude_matched(MaskSet.load(a), pair[0], seed=3)
    result = json.loads(run("stats", a, "--json").stdout)
    assert result == json.loads(json.dumps(mask_stats(MaskSet.load(a))))
    assert "q_proj" in run("stats", a).stdout
    assert (
        json.loads(run("compare", a, b, "--json").stdout)["active_both"]
        == (MaskSet.load(a) & MaskSet.load(b)).num_active
    )


@pytest.mark.parametrize(
    ("kind", "make"), [("principal", masks.principal), ("safe", masks.safe), ("random", masks.random_subset)]
)
def test_other_kinds(pair, tmp_path, kind, make):
    run(kind, pair[0], "--density", 0.1, "-o", tmp_path / "m")
    assert MaskSet.load(tmp_path / "m") == make(pair[0], 0.1)


def test_groups_add_up(pair):
    result = mask_stats(masks.changed(*pair))
    for group in ("block", "module", "layer", "tensor"):
        assert sum(row["active"] for row in result[f"by_{group}"]) == result["active"]


def test_comparison_with_itself_and_with_empty_set(pair):
    near_zero_masks = masks.near_zero(pair[0], 0.25)
    result = compare_masks(near_zero_masks, near_zero_masks)
    assert (result["coverage_a"], result["coverage_b"], result["jaccard"]) == (1, 1, 1)
    assert result["over_uniform"] == pytest.approx(4, rel=0.02)
    nothing = compare_masks(near_zero_masks, near_zero_masks - near_zero_masks)
    assert (nothing["active_both"], nothing["coverage_b"], nothing["over_uniform"]) == (0, None, None)


def test_bad_input_is_one_line(pair, tmp_path):
    a = tmp_path / "a"
    run("near-zero", pair[0], "-o", a)
    for arguments, status, message in (
        (("stats", pair[0]), 4, "is not a regular file"),
        (("stats", tmp_path / "x"), 4, "does not exist"),
        (
            ("near-zero", pair[0], "--density", 2, "-o", a),
            2,
            "Invalid value for '--density': 2.0 is not in the range 0<x<=1",
        ),
        (("combine", a, "nand", a, "-o", a), 2, "'nand' is not one of 'and', 'or', 'xor', 'minus'"),
        (("near-zero", pair[0], "-o", tmp_path / "a" / "b"), 4, "cannot write"),
    ):
        error = run(*arguments, status=status).stderr
        assert message in error
        assert len(error.splitlines()) == 1
