"""`overlap` of two runs: pairs a second, share of the read bandwidth, against the authors' loop."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from opdkernels import overlap as overlap_runs
from opdkernels.ops.overlap import overlap


@pytest.mark.parametrize("threads", [1, 2])
def test_overlap_of_two_bf16_runs(benchmark, row, embedding, bandwidth, threads):
    source, *runs = embedding
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = benchmark.pedantic(lambda: overlap(source, runs), rounds=7, warmup_rounds=1)
    torch.set_num_threads(before)
    a, b = ((r - source).abs() > 1e-5 for r in runs)
    assert found.n_both(0, 1) == int((a & b).sum())
    rate = source.numel() / benchmark.stats.stats.median
    row(coordinates_per_s=rate, bytes_per_s=6 * rate, share_of_read=6 * rate / bandwidth[threads])


def test_overlap_against_the_authors_loop(benchmark, row, folder, authors):
    paths = [folder / name for name in ("source", "run_a", "run_b")]
    ran = subprocess.run([*authors, "overlap", *map(str, paths), "2"], capture_output=True, text=True, check=True)
    theirs = json.loads(ran.stdout.splitlines()[-1])
    result = benchmark.pedantic(lambda: overlap_runs(*paths, threads=2), rounds=3, warmup_rounds=1)
    assert theirs["found"] == result.summary["pairs"][0]["changed_both"]
    row(authors_s=theirs["seconds"], over_authors=theirs["seconds"] / benchmark.stats.stats.median)
