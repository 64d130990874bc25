"""Every figure of `analyze`, spectra included: one matrix, one layer and the whole pair against the authors' script; Gram
and eigenvalues against torch.linalg.svdvals; randomized SVD against torch.svd_lowrank at equal accuracy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import data
from benchmarks.bench_delta import run_watched
from benchmarks.harness import paired
from opdkernels import analyze
from opdkernels.checkpoint.source import open_source
from opdkernels.ops.gram import gram, symmetric
from opdkernels.spectral import randomized_svd
from opdkernels.spectral.exact import singular_values


@pytest.mark.parametrize("part", ["layers.3.mlp.down_proj", "layers.3.self_attn.q_proj", "layers.3."])
def test_every_figure_against_the_authors(benchmark, row, folder, authors, one_thread, tmp_path, part):
    for run in ("source", "run_a"):
        source = open_source(folder / run)
        tensors = {name: source.read(name, 0, info.numel).clone().view(info.shape) for name, info in source.tensors.items() if part in name}
        (tmp_path / run).mkdir()
        save_file(tensors, tmp_path / run / "model.safetensors")
    ran = subprocess.run([*authors, f"everything:{part}", str(folder / "source"), str(folder / "run_a"), "1"], capture_output=True, text=True, check=True)
    theirs = json.loads(ran.stdout.splitlines()[-1])
    result = benchmark.pedantic(lambda: analyze(tmp_path / "source", tmp_path / "run_a"), rounds=5, warmup_rounds=1)
    norms = [value for value in result.spectra["spectral_norm"].to_pylist() if value is not None]
    assert sum(norms) == pytest.approx(theirs["found"], rel=1e-4)
    row(authors_s=theirs["seconds"], over_authors=theirs["seconds"] / benchmark.stats.stats.median)


def test_every_figure_of_the_whole_pair(benchmark, row, folder, tmp_path):
    out = str(tmp_path / "out")
    command = [sys.executable, "-m", "opdkernels", "analyze", str(folder / "source"), str(folder / "run_a"), "-q", "-o", out]
    seconds, peak = benchmark.pedantic(lambda: run_watched(command), rounds=1)
    shutil.rmtree(out)
    row(whole_s=seconds, anonymous_bytes=peak)
    assert peak < 1.5e9


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
def test_gram_and_eigenvalues_against_svdvals(benchmark, row, one_thread, wide):
    generator = torch.Generator().manual_seed(0)
    source = data.weight((8960, 1536), generator)
    trained = data.updated(source, generator)
    delta = trained.float() - source.float()
    given = delta.T.contiguous() if wide else delta

    def ours():
        return singular_values(symmetric(gram(delta))[0])

    seconds = paired({"ours": ours, "svdvals": lambda: torch.linalg.svdvals(given)}, rounds=2)
    found = benchmark.pedantic(ours, rounds=2)
    torch.testing.assert_close(found.float(), torch.linalg.svdvals(given), rtol=1e-4, atol=0)
    row(gram_s=seconds["ours"], over_svdvals=seconds["svdvals"] / seconds["ours"])


def test_randomized_svd_against_lowrank_at_equal_accuracy(benchmark, row, one_thread):
    generator = torch.Generator().manual_seed(0)
    source = data.weight((data.HIDDEN, data.INTERMEDIATE), generator)
    matrices = [data.updated(source, generator).float() - source.float() for _ in range(4)]
    exact = [torch.linalg.svdvals(m.double())[:64] for m in matrices]

    def error(values) -> float:
        return max(float((v.double()[:64] / e - 1).abs().max()) for v, e in zip(values, exact, strict=True))

    ours = benchmark.pedantic(lambda: randomized_svd(matrices, 64), rounds=2)
    assert error([one.sigma for one in ours]) < 1e-3
    for steps in (2, 4, 8, 16, 32):  # the first that is as right as ours
        values = [torch.svd_lowrank(m, q=96, niter=steps)[1] for m in matrices]
        if error(values) <= error([one.sigma for one in ours]):
            break
    seconds = paired(
        {"ours": lambda: randomized_svd(matrices, 64), "lowrank": lambda: [torch.svd_lowrank(m, q=96, niter=steps) for m in matrices]}, rounds=2
    )
    row(randomized_s=seconds["ours"], over_lowrank=seconds["lowrank"] / seconds["ours"], error=error([one.sigma for one in ours]),
        lowrank_error=error(values), lowrank_steps=steps)  # fmt: skip
