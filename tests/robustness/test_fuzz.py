"""A small part of `make fuzz`: damaged files are refused in one line, or accepted with the right content."""

from __future__ import annotations

import json
import random

import pytest

from tests.robustness import targets
from tests.robustness.fuzz import run_case
from tests.robustness.mutations import damage_bytes, damage_json
from tests.robustness.targets import TARGETS, experiment_results

NUM_CASES = {"safetensors headers": 400, "patches": 60, "mask files": 150, "torch files": 80, "results.json": 120}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_refused_or_read_correctly(tmp_path, name):
    check = TARGETS[name].make(tmp_path)
    for case in range(NUM_CASES.get(name, 12)):
        run_case(check, name, case)


@pytest.mark.parametrize("name", TARGETS)
def test_undamaged_files_are_accepted(tmp_path, name, monkeypatch):
    monkeypatch.setattr(targets, "damage_bytes", lambda rng, data, **options: data)
    monkeypatch.setattr(targets, "damage_json", lambda rng, value: value)
    monkeypatch.setattr(targets, "json_text", lambda rng, value: json.dumps(value))
    monkeypatch.setattr(targets, "damage_safetensors", lambda rng, content: content)
    check = TARGETS[name].make(tmp_path)
    assert all(run_case(check, name, case) for case in range(4))


def test_the_damage_is_determined_by_the_case():
    for seed in range(50):
        first, second = (damage_json(random.Random(seed), experiment_results()) for _ in range(2))
        assert repr(first) == repr(second)
        assert damage_bytes(random.Random(seed), b"abc" * 50) == damage_bytes(random.Random(seed), b"abc" * 50)
