"""The public names of the package, and the functions behind the commands."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys

import pytest

import opdkernels
from opdkernels import api, config
from opdkernels.config import AnalyzeOptions, BenchOptions, ExperimentOptions, OverlapOptions, TrajectoryOptions


@pytest.mark.parametrize("name", opdkernels.__all__)
def test_public_names_resolve_and_have_docstrings(name):
    value = getattr(opdkernels, name)
    if name == "__version__":
        assert value.count(".") == 2
    else:
        assert inspect.getdoc(value)


def test_lazy_names_are_the_public_names():
    assert set(opdkernels._LAZY) | {"InputError", "UsageError", "__version__"} == set(opdkernels.__all__)
    assert sorted(opdkernels.__all__) == dir(opdkernels)
    assert not hasattr(opdkernels, "analyse")


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import opdkernels", {"torch", "numpy", "pyarrow", "pydantic", "typer", "rich"}),
        ("import opdkernels.cli", {"torch", "numpy", "pyarrow", "transformers", "scipy", "jinja2"}),
    ],
)
def test_imports_are_lazy(code, absent):
    program = f"import sys; before = set(sys.modules); {code}; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not absent & {name.partition(".")[0] for name in loaded}


@pytest.mark.parametrize(
    ("function", "model"),
    [
        (api.analyze, AnalyzeOptions),
        (api.bench, BenchOptions),
        (api.overlap, OverlapOptions),
        (api.trajectory, TrajectoryOptions),
    ],
)
def test_defaults_are_those_of_the_options_model(function, model):
    parameters = inspect.signature(function).parameters
    keywords = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    keywords.pop("progress")
    keywords.pop("out", None)
    assert keywords == {name: field.default for name, field in model.model_fields.items()}
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_defaults_of_experiment_are_those_of_its_options_model():
    parameters = inspect.signature(api.experiment).parameters
    assert {name: parameters[name].default for name in ExperimentOptions.model_fields} == {
        name: field.default for name, field in ExperimentOptions.model_fields.items()
    }


@pytest.mark.parametrize("function", [api.analyze, api.overlap, api.trajectory, api.experiment, api.write_report])
def test_docstrings_describe_every_argument(function):
    doc = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        assert f"\n    {name}: " in doc or f"\n    *{name}: " in doc
    for section in ("Args:", "Returns:", "Raises:", "Examples:"):
        assert f"\n{section}\n" in doc


@pytest.mark.parametrize("module", [opdkernels, api, config], ids=lambda module: module.__name__)
def test_docstring_examples_run(module):
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed
