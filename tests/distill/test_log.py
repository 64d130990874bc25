from __future__ import annotations

import pytest

from opdkernels.distill.log import Log
from opdkernels.distill.loop import distill
from opdkernels.distill.ranks import Ranks
from opdkernels.distill.track import read_rows


def test_tokens_a_second_are_those_of_each_phase(options, tmp_path):
    distill(options(eval_size=2), tmp_path)
    start, *rows = read_rows(tmp_path / "log.jsonl")
    assert "tokens_per_s" not in start
    for row in rows:
        assert set(row["tokens_per_s"]) == {"generate", "score", "train", "all"}
        for name, rate in row["tokens_per_s"].items():
            assert rate * row["seconds"][name] == pytest.approx(row["tokens"])


def test_a_phase_that_took_no_time_has_no_rate(tmp_path):
    Log(tmp_path, 0, 2, False, True, Ranks()).row({"step": 1, "tokens": 7, "seconds": {"generate": 0.0, "track": 0.1, "all": 0.5}})
    assert read_rows(tmp_path / "log.jsonl")[0]["tokens_per_s"] == {"all": 14}
