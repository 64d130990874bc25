"""`delta` and `analyze`: pairs per second and fraction of the read bandwidth.

Compared with eager PyTorch and with the paper's reference script.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from benchmarks.harness import anonymous_bytes, paired
from opdkernels import analyze
from opdkernels.backends.cpu import native
from opdkernels.benchmark.eager import eager_counts, eager_tables
from opdkernels.ops.delta import delta, exact_float

EAGER_COORDINATES = 4_358_144  # one 896 x 4864 matrix: larger inputs do not make eager PyTorch faster


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("threads", [1, 2])
def test_tally_of_a_bf16_pair(benchmark, row, embedding, bandwidth, isa, threads):
    base, trained, _ = embedding
    before, cores = native.current_isa(), torch.get_num_threads()
    native.use_isa(isa)
    torch.set_num_threads(threads)
    tally = benchmark.pedantic(lambda: delta(base, trained), rounds=7, warmup_rounds=1)
    native.use_isa(before)
    torch.set_num_threads(cores)
    assert tally.numel == base.numel()
    assert tally.bit_equal == int((base == trained).sum())
    rate = base.numel() / benchmark.stats.stats.median
    row(
        pairs_per_s=rate,
        bytes_per_s=4 * rate,
        fraction_of_read=4 * rate / bandwidth[threads],
        unchanged=tally.bit_equal / tally.numel,
    )


def test_tally_against_eager(benchmark, row, embedding, one_thread):
    base, trained = (t[:EAGER_COORDINATES] for t in embedding[:2])
    seconds = paired(
        {
            "tally": lambda: delta(base, trained),
            "bincounts": lambda: eager_tables(base, trained),
            "counts": lambda: eager_counts(base, trained),
        }
    )
    tally = benchmark.pedantic(lambda: delta(base, trained), rounds=3)
    for histogram, table in zip(
        eager_tables(base, trained), (tally.hist_base, tally.hist_delta, tally.hist_base_over[0]), strict=True
    ):
        np.testing.assert_array_equal(histogram.numpy(), table)
    assert int(eager_counts(base, trained)[5]) == tally.bit_equal
    row(
        tally_s=seconds["tally"],
        over_bincounts=seconds["bincounts"] / seconds["tally"],
        over_counts=seconds["counts"] / seconds["tally"],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_tally_of_wider_pairs(benchmark, row, embedding, one_thread, dtype):
    n = 8_000_000
    generator = torch.Generator().manual_seed(0)
    base = (embedding[0][:n].double() + 1e-6 * torch.randn(n, generator=generator)).to(dtype)
    trained = (base.double() + 1e-5 * torch.randn(n, generator=generator)).to(dtype)
    tally = benchmark.pedantic(lambda: delta(base, trained), rounds=5, warmup_rounds=1)
    assert tally.hist_delta[0] == int((base.bfloat16() == trained.bfloat16()).sum())
    assert exact_float(tally.sum_delta_abs) == pytest.approx(
        float((trained.double() - base.double()).abs().sum()), rel=1e-6
    )
    rate = n / benchmark.stats.stats.median
    row(pairs_per_s=rate, bytes_per_s=2 * base.element_size() * rate)


def test_analyze_the_whole_pair(benchmark, row, folder, tmp_path, one_thread):
    def once():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return analyze(folder / "source", folder / "run_a", tmp_path / "out", report=False, spectra="off")

    result = benchmark.pedantic(once, rounds=5, warmup_rounds=1)
    assert result.summary["matched"]["tensors"] == 290
    row(coordinates=result.summary["matched"]["parameters"])


def test_analyze_against_the_paper_elementwise_stage(benchmark, row, folder, paper_script, one_thread):
    ran = subprocess.run(
        [*paper_script, "elementwise", str(folder / "source"), str(folder / "run_a"), "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = json.loads(ran.stdout.splitlines()[-1])
    result = benchmark.pedantic(
        lambda: analyze(folder / "source", folder / "run_a", spectra="off"), rounds=3, warmup_rounds=1
    )
    assert (
        theirs["found"] == result.summary["views"]["visible"]["numel"] - result.summary["views"]["visible"]["changed"]
    )
    row(paper_script_s=theirs["seconds"], over_paper_script=theirs["seconds"] / benchmark.stats.stats.median)


def run_watched(command: list[str]) -> tuple[float, int]:
    """Runs a command and returns its seconds and its peak anonymous memory in bytes."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.005)
    assert process.returncode == 0
    return time.perf_counter() - began, peak


def test_anonymous_memory_of_analyze(benchmark, row, folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "opdkernels",
        "analyze",
        str(folder / "source"),
        str(folder / "run_a"),
        "--spectra",
        "off",
        "-q",
        "-o",
    ]
    _, peak = benchmark.pedantic(lambda: run_watched([*command, str(tmp_path / "out")]), rounds=1)
    row(anonymous_bytes=peak)
    assert peak < 500e6


def drop_from_page_cache(path) -> None:
    """Drops a file from the page cache (Linux)."""
    import os

    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def test_cold_files_against_cat(benchmark, row, folder, tmp_path):
    files = [str(f) for run in ("source", "run_a") for f in sorted((folder / run).glob("*.safetensors"))]
    times: dict[str, list[float]] = {"cat": [], "analyze": []}

    def analyze_cold():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        began = time.perf_counter()
        analyze(folder / "source", folder / "run_a", tmp_path / "out", report=False, spectra="off")
        times["analyze"].append(time.perf_counter() - began)

    def cat_cold():
        began = time.perf_counter()
        subprocess.run(f"cat {' '.join(files)} > /dev/null", shell=True, check=True)
        times["cat"].append(time.perf_counter() - began)

    for implementation in (cat_cold, analyze_cold) * 5:
        for file in files:
            drop_from_page_cache(file)
        implementation()
    cat, ours = (statistics.median(times[name]) for name in ("cat", "analyze"))
    benchmark.pedantic(analyze_cold, rounds=1)  # warm by now; the row has the cold times
    assert cat > 0
    row(cat_s=cat, analyze_s=ours, over_cat=ours / cat)
