"""Every command that takes what one run changed says so if the two checkpoints do not look like one run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opdkernels import analyze, lineage, patch
from opdkernels.checkpoint.match import open_pair
from opdkernels.metrics import distance
from opdkernels.metrics.verdict import UNRELATED
from tests.analysis.conftest import save, trained, weights
from tests.in_process import run_cli as run

COMMANDS = {
    "overlap": "overlap {base} {trained} {other} -o {out}",
    "mask changed": "mask changed {base} {other} -o {out}",
    "mask changed, stored": "mask changed {base} {other} --view stored -o {out}",
    "mask top-changed": "mask top-changed {base} {other} --density 0.5 -o {out}",
    "patch create": "patch create {base} {other} -o {out}",
    "graft": "graft {base} {other} --select mlp -o {out}",
}


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    models = {"base": weights(), "trained": trained(weights()), "other": weights(seed=9)}
    return {name: save(tmp_path / name, model) for name, model in models.items()} | {"out": tmp_path / "out"}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_say_in_the_words_of_analyze_that_a_pair_is_unrelated(name: str, paths: dict[str, Path]) -> None:
    verdict = analyze(paths["base"], paths["other"], spectra="off").summary["verdict"]
    assert verdict["kind"] == "unrelated"
    done = run(*COMMANDS[name].format(**paths).split())
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "unrelated" in line]
    prefix = "note: run B: " if name == "overlap" else "opdkernels: warning: "
    assert lines == [prefix + verdict["text"]]
    if name == "overlap":
        assert "run B: unrelated: the relative norm" in (paths["out"] / "report.html").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_say_nothing_of_one_run(name: str, paths: dict[str, Path]) -> None:
    done = run(*COMMANDS[name].format(**paths | {"other": paths["trained"]}).split())
    assert done.returncode == 0, done.stderr
    assert "unrelated" not in done.stdout + done.stderr


@pytest.mark.parametrize(("factor", "unrelated"), [(UNRELATED * 0.99, False), (UNRELATED * 1.01, True)])
def test_the_limit_is_that_of_analyze(factor: float, unrelated: bool, tmp_path: Path) -> None:
    base = {name: w.float() for name, w in weights().items()}
    after = {name: w * (1 + factor) for name, w in base.items()}
    sides = save(tmp_path / "base", base), save(tmp_path / "trained", after)
    assert (analyze(*sides, spectra="off").summary["verdict"]["kind"] == "unrelated") == unrelated
    pair = open_pair(*sides)
    assert (distance.unrelated_note(pair) is not None) == unrelated
    pair.close()


def test_nan_in_every_matrix_hides_nothing(tmp_path: Path) -> None:
    """`analyze` judges the finite coordinates, and so does the sample."""
    models = [weights(), weights(seed=9)]
    for tensor in models[1].values():
        tensor.view(-1)[0] = float("nan")
    base, other = (save(tmp_path / str(i), model) for i, model in enumerate(models))
    assert analyze(base, other, spectra="off").summary["verdict"]["kind"] == "unrelated"
    with pytest.warns(UserWarning, match="unrelated: the relative norm"):
        patch.create(base, other, tmp_path / "patch")
    (candidate,) = lineage(other, base)["candidates"]
    assert candidate["relative_norm"] == pytest.approx(2**0.5, rel=0.05)
    assert not candidate["plausible"]


def test_only_a_sample_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 3 * distance.MAX_SLICES * distance.SLICE // 64
    models = {seed: {f"{i}.w": torch.randn(rows, 64) for i in range(distance.MAX_TENSORS + 5)} for seed in (1, 2)}
    pair = open_pair(*(save(tmp_path / str(seed), model) for seed, model in models.items()))
    read = []
    monkeypatch.setattr(pair, "read", lambda match, a, b: read.append(b - a) or type(pair).read(pair, match, a, b))
    assert distance.unrelated_note(pair) is not None
    assert sum(read) == distance.MAX_TENSORS * distance.MAX_SLICES * distance.SLICE
    pair.close()


def test_a_patch_of_tensors_without_a_delta_needs_no_distance(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    models = [
        {"w": torch.full((8, 8), value, dtype=torch.int8), "v": torch.full((8,), float(value))} for value in (1, 90)
    ]
    base, after = (save(tmp_path / str(i), model) for i, model in enumerate(models))
    assert patch.create(base, after, tmp_path / "patch")["changed"] == 72
    assert not recwarn.list
