"""`overlap` of two runs: coordinates per second, fraction of the read bandwidth, ratio to the paper's script."""

from __future__ import annotations

import contextlib
import json
import subprocess

import pytest
import torch

from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.ops.overlap import Overlap, overlap


@pytest.mark.parametrize("threads", [1, 2])
def test_overlap_of_two_bf16_runs(benchmark, row, embedding, bandwidth, threads):
    base, *runs = embedding
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    counts = benchmark.pedantic(lambda: overlap(base, runs), rounds=7, warmup_rounds=1)
    torch.set_num_threads(before)
    a, b = ((r - base).abs() > 1e-5 for r in runs)
    assert counts.n_both(0, 1) == int((a & b).sum())
    rate = base.numel() / benchmark.stats.stats.median
    row(coordinates_per_s=rate, bytes_per_s=6 * rate, fraction_of_read=6 * rate / bandwidth[threads])


@pytest.mark.parametrize("threads", [1, 2])
def test_overlap_loop_against_the_paper_script(benchmark, row, folder, paper_script, threads):
    """The loops over all tensors, files in memory: reading and counting, without writing results."""
    paths = [folder / name for name in ("source", "run_a", "run_b")]
    ran = subprocess.run(
        [*paper_script, "overlap", *map(str, paths), str(threads)], capture_output=True, text=True, check=True
    )
    theirs = json.loads(ran.stdout.splitlines()[-1])
    with contextlib.ExitStack() as stack:
        base, *runs = (stack.enter_context(contextlib.closing(open_checkpoint(path))) for path in paths)

        def loop():
            counts = Overlap.empty(2)
            for name, info in base.tensors.items():
                w, *trained = (checkpoint.read(name, 0, info.numel) for checkpoint in (base, *runs))
                overlap(w, trained, out=counts)
            return counts

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        counts = benchmark.pedantic(loop, rounds=5, warmup_rounds=1)
        torch.set_num_threads(before)
    assert theirs["found"] == counts.n_both(0, 1)
    row(paper_script_s=theirs["seconds"], over_paper_script=theirs["seconds"] / benchmark.stats.stats.median)
