"""--help shows every option with its default, choices and panel, as the options models define them."""

from __future__ import annotations

import inspect
import re
from importlib.metadata import version
from typing import Literal, get_args, get_origin

import click
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from opdkernels import cli, config
from opdkernels.cli.options import text_of, value_type
from opdkernels.distillation.options import DistillOptions
from tests.cli.conftest import commands

MODELS = {
    "inspect": [config.InspectOptions],
    "analyze": [config.AnalyzeOptions],
    "lineage": [config.LineageOptions],
    "overlap": [config.OverlapOptions],
    "trajectory": [config.TrajectoryOptions],
    "graft": [config.GraftOptions],
    "bench": [config.BenchOptions],
    "distill": [DistillOptions],
    "experiment": [config.ExperimentOptions, DistillOptions],
    "mask changed": [config.ChangedMaskOptions],
    "mask top-changed": [config.TopChangedMaskOptions],
    "mask near-zero": [config.NearZeroMaskOptions],
    "mask principal": [config.PrincipalMaskOptions],
    "mask safe": [config.PrincipalMaskOptions],
    "mask random": [config.RandomMaskOptions],
    "mask magnitude-matched": [config.MagnitudeMatchedMaskOptions],
    "mask combine": [config.MaskOptions],
    "patch create": [config.PatchCreateOptions],
    "patch apply": [config.PatchApplyOptions],
    "push": [config.PushOptions],
}
CLICK, TYPER = (tuple(map(int, version(package).split(".")[:2])) for package in ("click", "typer"))


def help_text(command: str, width: int) -> str:
    done = CliRunner().invoke(cli.app, [*command.split(), "--help"], env={"COLUMNS": str(width), "NO_COLOR": "1"})
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("command", ["", "mask", "patch", *commands()])
def test_help_fits_its_width(command):
    assert max(map(len, help_text(command, 100).splitlines())) <= 100


@pytest.mark.parametrize("command", commands())
def test_help_ends_with_an_example(command):
    assert f"Example: opdkernels {command}" in " ".join(help_text(command, 100).split())


@pytest.mark.parametrize("command", MODELS)
def test_help_lists_every_option_of_the_models(command):
    text = help_text(command, 300)
    for model in MODELS[command]:
        for name, field in model.model_fields.items():
            assert f"--{name.replace('_', '-')} " in text
            assert field.json_schema_extra["panel"] in text
            assert field.description.split("`")[0] in text
            if get_origin(value_type(field)) is Literal:
                assert f"[{'|'.join(get_args(value_type(field)))}]" in text
            elif field.default and value_type(field) is not bool and not field.is_required():
                assert f"[default: {text_of(field.default)}]" in text


@pytest.mark.parametrize("command", commands())
def test_options_are_described_once(command):
    fields = {name: field for model in MODELS.get(command, []) for name, field in model.model_fields.items()}
    function = inspect.unwrap(commands()[command].callback)
    shared = set(inspect.signature(function).parameters) - {"options"}
    assert not shared & set(fields)
    options = {parameter.name for parameter in commands()[command].params} - {"help"}
    assert options == shared | set(fields)


@pytest.mark.parametrize("command", commands())
def test_no_text_is_taken_for_markup(command):
    for text in [commands()[command].help, *(getattr(p, "help", None) for p in commands()[command].params)]:
        assert not re.search(r"\[[a-z/]", text or "")


@pytest.mark.skipif(CLICK >= (8, 5) and TYPER <= (0, 20), reason="click 8.5 drops the argument help of typer 0.20")
@pytest.mark.parametrize("command", commands())
def test_arguments_are_described(command):
    text = help_text(command, 300)
    for parameter in commands()[command].params:
        if isinstance(parameter, click.Argument):
            assert parameter.help
            assert parameter.help in text


def test_top_level_help_shows_every_command_and_the_exit_statuses():
    text = " ".join(help_text("", 100).split())
    for name in get_command(cli.app).commands:
        assert f" {name} " in text
    assert "Exit status: 0 done, 2 usage, 3" in text
    assert "--install-completion" in text


def test_experiment_names_are_those_of_the_catalog():
    from opdkernels.cli.distill import EXPERIMENTS
    from opdkernels.experiments.catalog import EXPERIMENTS as catalog

    assert tuple(catalog) == EXPERIMENTS
