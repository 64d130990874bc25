"""FSDP2 on the CPU, several gloo processes: the same weights as one process, and state that loads at another world
size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.optim import sharded

ROOT = Path(__file__).parent.parent.parent
CASES = [("float32", "split_master"), ("bfloat16", "split_master"), ("bfloat16", "stochastic")]


SAVED = "bfloat16:split_master"


def run(ranks: int, folder: Path, *jobs: str) -> None:
    """Runs jobs of sharded.py in `ranks` processes, which are started once: this takes longer than the jobs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "tests.optim.sharded", str(folder), *jobs],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (
        "\n".join(line for line in done.stderr.splitlines() if line.startswith("[rank0]"))[-4000:]
        or done.stderr[-4000:]
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Folder of the results of all jobs of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run(2, folder, *(f"train:{dtype}:{precision}" for dtype, precision in CASES), f"save:{SAVED}")
    return folder


def alone(steps: int, dtype: str, precision: str) -> tuple[list[torch.Tensor], list[torch.Tensor], dict]:
    """Weights of one process, before and after, and the masks."""
    kind = getattr(torch, dtype)
    model = sharded.model_of(kind)
    masks = sharded.masks_for(model)
    before = sharded.whole(model)
    sharded.train(model, sharded.optimizer_of(model, masks, precision), range(steps), kind)
    return before, sharded.whole(model), masks


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "precision"), CASES)
def test_two_ranks_match_one_process(dtype, precision, two_ranks):
    """Uneven and empty shards; what is frozen keeps its bits; random numbers do not show the sharding."""
    result = torch.load(two_ranks / f"train:{dtype}:{precision}-2.pt")
    before, wanted, masks = alone(6, dtype, precision)
    for got, gathered, old, one, mask in zip(
        result["weights"], result["gathered"], before, wanted, masks.values(), strict=True
    ):
        assert torch.equal(got[~mask], old[~mask])
        assert torch.equal(got, gathered)
        # A mean over ranks of equal gradients is exact; only the clip's norm is summed in another order.
        torch.testing.assert_close(got, one, rtol=1e-6 if dtype == "float32" else 2**-7, atol=1e-7)
    assert all(torch.equal(copy, torch.full((4,), -3.0)) for copy in result["summed"])
    assert 0 < result["active"] < sum(int(mask.sum()) for mask in masks.values())  # this rank's alone


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_state_loads_at_another_world_size(two_ranks, ranks):
    """By torch.distributed.checkpoint, with coordinates of two step counts; the resumed run is as if
    unbroken."""
    run(ranks, two_ranks, f"load:{SAVED}")
    unbroken, again = (
        torch.load(two_ranks / f"{name}.pt")["weights"] for name in (f"save:{SAVED}-2", f"load:{SAVED}-{ranks}")
    )
    for got, wanted in zip(again, unbroken, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=1e-7)
