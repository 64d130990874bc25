"""`lineage` finds the base of a run among candidates from bounded samples, and says if none is plausible."""

from __future__ import annotations

import pytest
import torch

from opdkernels import UsageError, lineage
from opdkernels.analysis.text import format_lineage
from opdkernels.metrics import distance as module
from tests.analysis.conftest import save, trained, weights


@pytest.fixture
def family(tmp_path):
    """A base, a middle checkpoint trained from it, the child trained from that, and an unrelated model."""
    base = weights()
    middle = trained(base, size=5e-4, seed=1)
    models = {"base": base, "middle": middle, "child": trained(middle, size=5e-5, seed=2), "other": weights(seed=9)}
    return {name: save(tmp_path / name, tensors) for name, tensors in models.items()}


def test_the_nearest_checkpoint_is_the_base(family):
    result = lineage(family["child"], family["other"], family["base"], family["middle"])
    assert result["base"] == family["middle"]
    assert [row["path"] for row in result["candidates"]] == [family[name] for name in ("middle", "base", "other")]
    assert [row["plausible"] for row in result["candidates"]] == [True, True, False]
    nearest = result["candidates"][0]
    assert nearest["bit_equal"] > result["candidates"][1]["bit_equal"] > result["candidates"][2]["bit_equal"]
    assert nearest["relative_norm"] == pytest.approx(5e-5 / 0.03, rel=0.2)
    text = format_lineage(result)
    assert text[0].endswith(f"{family['middle']} is the nearest candidate for its base")
    assert "not plausible: too far away" in text[-1]


def test_none_is_plausible_among_unrelated_incomplete_and_unreadable_ones(family, tmp_path):
    half = save(tmp_path / "half", dict(list(weights().items())[:5]))
    mean = save(tmp_path / "mean", {name: w.float().mean() * torch.ones(3) for name, w in weights().items()})
    result = lineage(family["child"], family["other"], half, mean, str(tmp_path / "absent"))
    assert result["base"] is None
    reasons = {row["path"]: row["reason"] for row in result["candidates"]}
    assert reasons[mean]
    assert "absent" in reasons[str(tmp_path / "absent")]
    text = "\n".join(format_lineage(result))
    assert "none of the candidates is plausible" in text
    assert "too little of it matches" in text


def test_a_copy_of_the_child_is_said_to_be_one(family, tmp_path):
    copy = save(tmp_path / "copy", trained(trained(weights(), size=5e-4, seed=1), size=5e-5, seed=2))
    result = lineage(family["child"], family["middle"], copy)
    assert result["base"] == copy
    assert format_lineage(result)[0].endswith(f"{copy} has the same bits in every sampled coordinate")


def test_reads_are_bounded(family, monkeypatch):
    monkeypatch.setattr(module, "SLICE", 100)
    monkeypatch.setattr(module, "MAX_TENSORS", 4)
    reads = []
    original = module.Pair.read
    monkeypatch.setattr(
        module.Pair, "read", lambda self, m, a, b: reads.append((a, b, m.numel)) or original(self, m, a, b)
    )
    result = lineage(family["child"], family["base"], family["other"])
    assert len(reads) == 2 * 4 * module.MAX_SLICES
    assert all(0 <= a < b <= numel and b - a <= 100 for a, b, numel in reads)
    assert result["base"] == family["base"]
    assert result["candidates"][0]["sampled"] == 4 * module.MAX_SLICES * 100


def test_candidates_are_given_once(family, tmp_path):
    (tmp_path / "link").symlink_to(family["base"])
    for again in (family["base"], f"{family['base']}/", f"{family['base']}/../base", tmp_path / "link"):
        with pytest.raises(UsageError, match="are one candidate; give it once"):
            lineage(family["child"], family["base"], again)
    (tmp_path / "latest").symlink_to(family["child"])
    for itself in (family["child"], tmp_path / "latest"):
        with pytest.raises(UsageError, match="is the trained checkpoint itself"):
            lineage(family["child"], family["base"], itself)
    with pytest.raises(UsageError, match="one or more"):
        lineage(family["child"])
