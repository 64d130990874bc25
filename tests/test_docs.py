"""The documentation: it builds without a warning, and its examples run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import opdkernels
from opdkernels import analyze, masks

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "examples" / "opd_sample"
MASK = "model.layers.5.self_attn.o_proj.weight"


def blocks(page: str, language: str = "python") -> list[str]:
    """The code blocks of a page, without indentation."""
    pattern = re.compile(rf"^( *)```{language}\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in pattern.findall(page)]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The sample, a mask of it and its analysis, under the names that pages use."""
    folder = tmp_path_factory.mktemp("docs")
    for side in ("base", "seed1"):
        shutil.copy(SAMPLE / f"{side}.safetensors", folder)
    base, trained = folder / "base.safetensors", folder / "seed1.safetensors"
    masks.changed(base, trained).save(folder / "m.safetensors")
    analyze(base, trained, folder / "out")
    return folder


def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    commands = (tmp_path / "site" / "reference" / "cli" / "index.html").read_text()
    assert "opdkernels mask magnitude-matched" in commands
    assert "optimizer_cls_and_kwargs" in (tmp_path / "site" / "reference" / "optim" / "index.html").read_text()


def test_readers_of_the_formats_page_read_what_is_written(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    read_masks, read_run = blocks(page("reference/formats.md"))
    namespace: dict = {}
    exec(read_masks, namespace)
    expected = masks.MaskSet.load(folder / "m.safetensors")
    assert list(namespace["masks"]) == list(expected)
    for name, active in namespace["masks"].items():
        np.testing.assert_array_equal(active, expected[name].to_bool().numpy())
    exec(read_run, {})
    assert "sparse as rounding alone" in capsys.readouterr().out


def test_quickstart_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    analysis, training = blocks(page("quickstart.md"))
    exec(analysis, {})
    assert MASK in capsys.readouterr().out
    model = named_model(masks.MaskSet.load("m.safetensors").shapes)
    namespace = {"opdkernels": opdkernels, "model": model}
    exec(training, namespace)
    parameter = dict(model.named_parameters())[MASK]
    parameter.grad = torch.ones_like(parameter)
    before = parameter.detach().clone()
    namespace["optimizer"].step()
    active = masks.MaskSet.load("m.safetensors")[MASK].to_bool()
    assert torch.equal(before[~active], parameter.detach()[~active])
    assert not torch.equal(before[active], parameter.detach()[active])


def named_model(shapes: dict[str, tuple[int, ...]]) -> torch.nn.Module:
    """A module whose parameters have these names."""
    root = torch.nn.Module()
    for name, shape in shapes.items():
        module, *rest = root, *name.split(".")
        for part in rest[:-1]:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(rest[-1], torch.nn.Parameter(torch.zeros(shape)))
    return root


@pytest.mark.parametrize("library", ["pandas", "polars", "opdkernels"])
def test_examples_of_reading_tables_run(folder, monkeypatch, library, capsys):
    pytest.importorskip(library)
    monkeypatch.chdir(folder)
    (code,) = (block for block in blocks(page("guides/tables.md")) if f"import {library}" in block)
    exec(code, {})
    assert capsys.readouterr().out
