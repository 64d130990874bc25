"""All metrics of `analyze`, with spectra: one matrix, one layer and the full pair against the paper's script.

Gram matrices and eigenvalues against torch.linalg.svdvals; randomized SVD against torch.svd_lowrank at equal accuracy.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import data
from benchmarks.bench_delta import run_watched
from benchmarks.harness import paired
from opdkernels import analyze
from opdkernels.analysis.headers import ASSUMED_FLOPS_S
from opdkernels.analysis.matrices import cost, memory
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.ops.gram import gram, symmetric
from opdkernels.spectral import randomized_svd
from opdkernels.spectral.exact import singular_values
from tests.analysis.test_spectra import oracle


@pytest.mark.parametrize("part", ["layers.3.mlp.down_proj", "layers.3.self_attn.q_proj", "layers.3."])
def test_every_figure_against_the_paper_script(benchmark, row, folder, paper_script, one_thread, tmp_path, part):
    for run in ("source", "run_a"):
        checkpoint = open_checkpoint(folder / run)
        tensors = {
            name: checkpoint.read(name, 0, info.numel).clone().view(info.shape)
            for name, info in checkpoint.tensors.items()
            if part in name
        }
        (tmp_path / run).mkdir()
        save_file(tensors, tmp_path / run / "model.safetensors")
    ran = subprocess.run(
        [*paper_script, f"everything:{part}", str(folder / "source"), str(folder / "run_a"), "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = json.loads(ran.stdout.splitlines()[-1])
    result = benchmark.pedantic(lambda: analyze(tmp_path / "source", tmp_path / "run_a"), rounds=5, warmup_rounds=1)
    norms = [value for value in result.spectra["spectral_norm"].to_pylist() if value is not None]
    assert sum(norms) == pytest.approx(theirs["found"], rel=1e-4)
    row(paper_script_s=theirs["seconds"], over_paper_script=theirs["seconds"] / benchmark.stats.stats.median)


def test_every_figure_of_the_whole_pair(benchmark, row, folder, tmp_path, paper_script):
    base, trained = str(folder / "source"), str(folder / "run_a")
    command = [sys.executable, "-m", "opdkernels", "analyze", base, trained, "-q", "-o", str(tmp_path / "ours")]
    seconds, peak = benchmark.pedantic(lambda: run_watched(command), rounds=1)
    python, _, checkout = paper_script
    script = [
        python,
        f"{checkout}/scripts/analyze_opd_delta.py",
        "--src_model",
        base,
        "--opd_model",
        trained,
        "--device",
        "cpu",
    ]
    theirs, their_peak = run_watched([*script, "--out_dir", str(tmp_path / "theirs")])
    row(
        whole_s=seconds,
        paper_script_s=theirs,
        over_paper_script=theirs / seconds,
        anonymous_bytes=peak,
        paper_script_bytes=their_peak,
    )
    assert peak < 1.5e9


# Hidden size, intermediate size, key-value size, layers, vocabulary, untied head (from config.json).
MODELS = {"8B": (4096, 12288, 1024, 36, 151936, True), "70B": (8192, 28672, 1024, 80, 128256, True)}
H100_FLOPS, H100_BYTES = 67e12, 3.35e12  # fp64 matrix products and memory, NVIDIA's data sheet


def layer_shapes(hidden: int, wide: int, narrow: int) -> list[tuple[int, int]]:
    return [
        (hidden, hidden),
        (narrow, hidden),
        (narrow, hidden),
        (hidden, hidden),
        (wide, hidden),
        (wide, hidden),
        (hidden, wide),
    ]


ACCURACY = {
    "spectral": 1e-8,
    "projection": 1e-6,
    "drift": 1e-5,
    "rotation": 1e-4,
    "rank_1e-4": 0,
    "principal": 1e-5,
}  # rotation is absolute


def test_accuracy_against_svd_in_fp64(benchmark, row, folder, tmp_path):
    """The largest error of each kind of metric over three matrices of a layer: tall, wide and square."""
    names = [f"model.layers.3.{part}_proj.weight" for part in ("mlp.down", "self_attn.k", "self_attn.q")]
    pair = []
    for run in ("source", "run_a"):
        checkpoint = open_checkpoint(folder / run)
        pair.append(
            {
                name: checkpoint.read(name, 0, checkpoint.tensors[name].numel)
                .clone()
                .view(checkpoint.tensors[name].shape)
                for name in names
            }
        )
        (tmp_path / run).mkdir()
        save_file(pair[-1], tmp_path / run / "model.safetensors")
    result = benchmark.pedantic(lambda: analyze(tmp_path / "source", tmp_path / "run_a"), rounds=3)
    worst = dict.fromkeys(ACCURACY, 0.0)
    for spectrum, geometry in zip(result.spectra.to_pylist(), result.geometry.to_pylist(), strict=True):
        metrics, exact = spectrum | geometry, oracle(*(side[spectrum["name"]] for side in pair))
        for name, value in exact.items():
            kind = next((kind for kind in ACCURACY if name.startswith(kind)), "spectral")
            error = abs(metrics[name] - value) / (1 if kind == "rotation" else abs(value) or 1)
            worst[kind] = max(worst[kind], error)
    for kind, limit in ACCURACY.items():
        assert worst[kind] <= limit, kind
    row(**{f"{kind} error": error for kind, error in worst.items()})


@pytest.mark.parametrize(("hidden", "wide", "narrow"), [(896, 4864, 128), (1536, 8960, 256)], ids=["0.5B", "1.5B"])
def test_cost_model_against_a_layer(benchmark, row, one_thread, tmp_path, hidden, wide, narrow):
    generator = torch.Generator().manual_seed(0)
    base = {
        f"layers.0.{i}.weight": data.weight(shape, generator)
        for i, shape in enumerate(layer_shapes(hidden, wide, narrow))
    }
    for name, tensors in (("source", base), ("trained", {n: data.updated(w, generator) for n, w in base.items()})):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    benchmark.pedantic(
        lambda: analyze(tmp_path / "source.safetensors", tmp_path / "trained.safetensors"), rounds=2, warmup_rounds=1
    )
    flops, seconds = sum(cost(*w.shape) for w in base.values()), benchmark.stats.stats.median
    row(flops_per_s=flops / seconds, planned_s=flops / ASSUMED_FLOPS_S, over_planned=seconds * ASSUMED_FLOPS_S / flops)


@pytest.mark.parametrize("name", MODELS)
def test_cost_of_large_models(benchmark, row, name):
    """From the cost model; nothing is run.

    H100 roofline: all operations at the speed of fp64 matrix products; the pair read once, and the remaining part of a
    matrix read at each column of its three tridiagonalizations.
    """
    hidden, wide, narrow, layers, vocabulary, head = MODELS[name]
    shapes = layer_shapes(hidden, wide, narrow) * layers + [(vocabulary, hidden)] * (1 + head)
    flops = benchmark.pedantic(lambda: sum(cost(*shape) for shape in shapes), rounds=1)
    moved = sum(4 * m * n for m, n in shapes) + sum(3 * 8 * min(shape) ** 3 / 3 for shape in shapes)
    row(
        flops=flops,
        checkpoint_bytes=sum(4 * m * n for m, n in shapes),
        largest_bytes=max(memory(*shape) for shape in shapes),
        core_hours=flops / ASSUMED_FLOPS_S / 3600,
        h100_roofline_s=max(flops / H100_FLOPS, moved / H100_BYTES),
    )


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
def test_gram_and_eigenvalues_against_svdvals(benchmark, row, one_thread, wide):
    generator = torch.Generator().manual_seed(0)
    base = data.weight((8960, 1536), generator)
    trained = data.updated(base, generator)
    delta = trained.float() - base.float()
    matrix = delta.T.contiguous() if wide else delta

    def ours():
        return singular_values(symmetric(gram(delta))[0])

    seconds = paired({"ours": ours, "svdvals": lambda: torch.linalg.svdvals(matrix)}, rounds=2)
    values = benchmark.pedantic(ours, rounds=2)
    torch.testing.assert_close(values.float(), torch.linalg.svdvals(matrix), rtol=1e-4, atol=0)
    row(gram_s=seconds["ours"], over_svdvals=seconds["svdvals"] / seconds["ours"])


def test_randomized_svd_of_a_model_at_equal_accuracy(benchmark, row):
    """24 updates of one shape in one call, against peers one by one with the fewest iterations of equal accuracy."""
    sklearn = pytest.importorskip("sklearn.utils.extmath")
    generator = torch.Generator().manual_seed(0)
    base = data.weight((data.HIDDEN, data.INTERMEDIATE), generator)
    matrices = [data.updated(base, generator).float() - base.float() for _ in range(24)]
    exact = [torch.linalg.svdvals(m.double().T)[:64] for m in matrices]

    def error(values) -> float:
        return max(float((v.double()[:64] / e - 1).abs().max()) for v, e in zip(values, exact, strict=True))

    def lowrank(steps):
        return [torch.svd_lowrank(m, q=96, niter=steps)[1] for m in matrices]

    def scikit(steps):
        return [
            torch.from_numpy(sklearn.randomized_svd(m.numpy(), 64, n_oversamples=32, n_iter=steps, random_state=0)[1])
            for m in matrices
        ]

    ours = error([svd.sigma for svd in randomized_svd(matrices, 64)])
    assert ours < 1e-3
    implementations, errors = {"ours": lambda: randomized_svd(matrices, 64)}, {}
    for name, peer in (("lowrank", lowrank), ("sklearn", scikit)):
        steps = next(n for n in (2, 4, 8, 12, 16, 24, 32) if error(peer(n)) <= ours or n == 32)
        implementations[name], errors[name] = (lambda peer=peer, steps=steps: peer(steps)), (error(peer(steps)), steps)
    seconds = paired(implementations, rounds=2)
    benchmark.pedantic(implementations["ours"], rounds=1)
    row(
        randomized_s=seconds["ours"],
        error=ours,
        **{f"over_{name}": seconds[name] / seconds["ours"] for name in errors},
        **{f"{name}_error": error for name, (error, _) in errors.items()},
        **{f"{name}_steps": steps for name, (_, steps) in errors.items()},
    )
