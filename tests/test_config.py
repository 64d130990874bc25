"""Every number that an option takes has limits: none overflows, or runs for ever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from opdkernels.api import experiment
from opdkernels.config import MAX_MEMORY, Options, TrajectoryOptions, parse_bytes, validate_options
from opdkernels.distillation.options import DistillOptions
from opdkernels.errors import UsageError

DISTILL = {"student": "s", "teacher": "t", "prompts": "addition"}
HUGE = {"2^63": 2**63, "-2^63-1": -(2**63) - 1, "10^30": 10**30, "10^5000": 10**5000}
with_huge = pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)


def below(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for child in model.__subclasses__():
        yield child
        yield from below(child)


def integers() -> list[tuple[type[BaseModel], str]]:
    """Every option of every command that takes an integer."""
    models = [*below(Options), DistillOptions]
    return [
        (model, name)
        for model in models
        for name, field in model.model_fields.items()
        if int in (field.annotation, *get_args(field.annotation))
    ]


def test_options_of_every_command_are_found():
    names = {f"{model.__name__}.{name}" for model, name in integers()}
    assert {"AnalyzeOptions.threads", "AnalyzeOptions.memory", "ExperimentOptions.seeds"} <= names
    assert {"RandomMaskOptions.seed", "DistillOptions.max_steps", "DistillOptions.k"} <= names


@pytest.mark.parametrize(("model", "name"), integers(), ids=lambda value: getattr(value, "__name__", value))
@with_huge
def test_integers_have_limits(model: type[BaseModel], name: str, value: int) -> None:
    required: dict[str, Any] = DISTILL if model is DistillOptions else {}
    with pytest.raises(UsageError, match=f"^option {name} is ") as refused:
        validate_options(model, {**required, name: value})
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 200


@with_huge
def test_steps_of_checkpoints_have_limits(value: int) -> None:
    with pytest.raises(UsageError, match="option steps is "):
        validate_options(TrajectoryOptions, {"steps": (1, value)})


def test_a_memory_limit_fits_64_bits():
    assert parse_bytes("1000000TB") == MAX_MEMORY < 2**63
    with pytest.raises(ValueError, match="999999999999999999TiB is too large; the maximum is 1000000TB"):
        parse_bytes("999999999999999999TiB")


@pytest.mark.parametrize(("seed", "seeds"), [(0, 1001), (2**63 - 1, 2), (0, 10**30)])
def test_seeds_of_an_experiment_have_limits(tmp_path, seed: int, seeds: int) -> None:
    options = DistillOptions(**DISTILL, seed=seed, num_eval_prompts=4)
    with pytest.raises(UsageError, match="an experiment has at most 1000 seeds, from --seed up to 9223372036854775807"):
        experiment("masks", options, tmp_path / "out", seeds=seeds)
    assert not (tmp_path / "out").exists()
