"""UpdateTracker in two gloo processes: every way of sharding gives the values of one process, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.optim.sharded import model_of
from tests.tracking import sharded

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder of the base, and the values of each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    save_file(dict(model_of(torch.bfloat16).state_dict()), folder / "base.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.tracking.sharded", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("kind", sharded.KINDS[1:])
def test_sharded_values_equal_those_of_one_process(ranks, kind, has_base):
    """Uneven and empty shards along rows and columns, copies, masks, and a start that is read from a file."""
    folder, rows = ranks
    expected = sharded.measured("alone", str(folder / "base.safetensors") if has_base else None)
    copies = [[row.pop("bytes") for row in rows[rank][kind, has_base]] for rank in range(2)]
    alone = [row.pop("bytes") for row in expected]
    first, second = (rows[rank][kind, has_base] for rank in range(2))
    assert first == expected
    assert 0 < expected[-1]["changed_visible"] < 1
    assert 0 < expected[-1]["mask_recall"] < 1
    if kind == "ddp":
        assert second == [{}] * sharded.UPDATES
        assert copies == [alone, [0] * sharded.UPDATES]
    else:
        assert second == expected
        assert copies[0][0] + copies[1][0] >= alone[0]
        assert kind != "hsdp" or copies[1][0] == 0
        assert kind == "hsdp" or max(copies[0]) < alone[0]
