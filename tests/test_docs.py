"""The documentation: it builds without a warning, and its examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import opdkernels
from opdkernels import analyze, masks
from opdkernels.benchmark import run
from opdkernels.benchmark.workloads import WORKLOADS

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
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    commands = (tmp_path / "site" / "reference" / "cli" / "index.html").read_text()
    assert "opdkernels mask magnitude-matched" in commands
    assert "optimizer_cls_and_kwargs" in (tmp_path / "site" / "reference" / "optim" / "index.html").read_text()


def test_readers_of_the_formats_page_read_what_is_written(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    read_masks, read_run, read_benchmark = blocks(page("reference/formats.md"))
    namespace: dict = {}
    exec(read_masks, namespace)
    expected = masks.MaskSet.load(folder / "m.safetensors")
    assert list(namespace["masks"]) == list(expected)
    for name, active in namespace["masks"].items():
        np.testing.assert_array_equal(active, expected[name].to_bool().numpy())
    exec(read_run, {})
    assert "sparse as rounding alone" in capsys.readouterr().out
    scale = run.Scale(coordinates=4096, limit_bytes=1 << 16, product_side=16, budget_s=0.0)
    monkeypatch.setattr(run, "choose_scale", lambda device, quick: scale)
    opdkernels.bench("bench", family=["quantile"])
    exec(read_benchmark, {})
    assert capsys.readouterr().out.splitlines()[1].startswith("quantile of bf16 and a mask eager ")


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


def sample_model(name: str) -> torch.nn.Module:
    """A module with the weights of a checkpoint of the sample."""
    tensors = load_file(SAMPLE / f"{name}.safetensors")
    model = named_model({key: tuple(tensor.shape) for key, tensor in tensors.items()}).to(torch.bfloat16)
    model.load_state_dict(tensors)
    return model


def test_analysis_guide_prints_what_it_says(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (code,) = blocks(page("guides/analyse.md"))
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    quoted = re.search(r"this prints `(.*)` and `(.*)`:", page("guides/analyse.md"))
    assert quoted
    assert printed[:2] == list(quoted.groups())


def test_mask_guide_checks_saves_and_resumes(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "m.safetensors", tmp_path)
    check, resume = (code for code in blocks(page("guides/masks.md")) if "import torch" in code or "torch.save" in code)
    model = sample_model("base")
    optimizer = opdkernels.MaskedAdamW(model.named_parameters(), masks="m.safetensors", lr=1e-6)

    generator = torch.Generator().manual_seed(0)

    def train(model, optimizer):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()

    namespace = {"model": model, "optimizer": optimizer, "train": train, "MaskedAdamW": opdkernels.MaskedAdamW}
    exec(check, namespace)
    exec(resume, namespace)
    assert namespace["optimizer"] is not optimizer
    train(model, namespace["optimizer"])
    generator.manual_seed(0)
    uninterrupted = sample_model("base")
    optimizer = opdkernels.MaskedAdamW(uninterrupted.named_parameters(), masks="m.safetensors", lr=1e-6)
    train(uninterrupted, optimizer)
    train(uninterrupted, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), uninterrupted.parameters(), strict=True))
    assert not torch.equal(dict(model.named_parameters())[MASK], namespace["before"][MASK])


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.png")), ids=lambda path: path.name)
def test_pictures_are_intact(path):
    """Each chunk of a PNG file has its checksum."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    position, kinds = 8, []
    while position < len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        kind_and_data = content[position + 4 : position + 8 + length]
        kinds.append(kind_and_data[:4])
        checksum = content[position + 8 + length : position + 12 + length]
        assert zlib.crc32(kind_and_data) == int.from_bytes(checksum, "big")
        position += 12 + length
    assert kinds[-1] == b"IEND"


def test_patch_guide_patches_a_loaded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, side in (("base", "base"), ("trained", "seed1")):
        (tmp_path / name).mkdir()
        shutil.copy(SAMPLE / f"{side}.safetensors", tmp_path / name / "model.safetensors")
    model, trained = sample_model("base"), sample_model("seed1").state_dict()
    (code,) = blocks(page("guides/patches.md"))
    exec(code, {"model": model})
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(opdkernels.InputError, match="already has the trained"):
        opdkernels.patch.apply_to(model.state_dict(), "step-200.patch")
    with pytest.raises(opdkernels.InputError, match="load the model with the dtype"):
        opdkernels.patch.apply_to(sample_model("base").float().state_dict(), "step-200.patch")


def test_reference_of_weight_synchronisation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(page("reference/sync.md"))
    namespace: dict = {}
    exec(code, namespace)
    assert namespace["patch"].names == ["weight"]
    assert namespace["digests"]["weight"] == namespace["tracker"].digests["weight"]


def test_benchmark_guide_prints_a_workload(monkeypatch, capsys):
    scale = run.Scale(coordinates=4096, limit_bytes=1 << 16, product_side=16, budget_s=0.0)
    monkeypatch.setattr(run, "choose_scale", lambda device, quick: scale)
    (code,) = blocks(page("guides/benchmark.md"))
    exec(code, {})
    assert capsys.readouterr().out.startswith("quantile of bf16 and a mask ")


def test_benchmark_guide_describes_every_workload():
    table = page("guides/benchmark.md").split("## What is measured")[1].split("\n\n")[1]
    for workload in WORKLOADS:
        words = workload.name.removesuffix(" and its gradients").split(",")[0]
        (row,) = [line for line in table.splitlines() if words in line.split("|")[1]]
        limit = row.split("|")[4].strip().split(";")[0]
        assert limit == workload.limit


@pytest.mark.parametrize("library", ["pandas", "polars", "opdkernels"])
def test_examples_of_reading_tables_run(folder, monkeypatch, library, capsys):
    pytest.importorskip(library)
    monkeypatch.chdir(folder)
    (code,) = (block for block in blocks(page("guides/tables.md")) if f"import {library}" in block)
    exec(code, {})
    assert capsys.readouterr().out


def test_tracking_guide_runs_in_a_trainer_and_in_a_loop(folder, monkeypatch, tmp_path):
    """The blocks for Hugging Face and for any loop; the one for Lightning needs only its name."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "m.safetensors", tmp_path)
    in_trainer, in_lightning, in_loop = blocks(page("guides/track.md"))

    class Model(torch.nn.Module):
        """The sample's weights with a loss that moves all of them."""

        def __init__(self):
            super().__init__()
            self.weights = sample_model("base")

        def forward(self, scale):
            return {"loss": scale.mean() * sum(weight.float().square().sum() for weight in self.parameters())}

    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=40, per_device_train_batch_size=1, use_cpu=True, report_to="none",
        logging_steps=20, save_strategy="no", disable_tqdm=True, remove_unused_columns=False, learning_rate=1e-4,
    )  # fmt: skip
    names = {"Trainer": transformers.Trainer, "model": Model(), "args": args, "dataset": [{"scale": 1.0}] * 40}
    exec(in_trainer, names)
    entries = [row for row in names["trainer"].state.log_history if "opdkernels/mask_recall" in row]
    assert [row["step"] for row in entries] == [20, 40]
    assert entries[1]["opdkernels/mask_recall"] > 0
    assert opdkernels.UpdateTracker(masks="m.safetensors").logging_steps is None
    assert "UpdateTracker(masks=" in in_lightning

    def train_step(model, batch):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + batch)

    logged = []
    names = {
        "model": sample_model("base"),
        "batches": [0.01] * 40,
        "train_step": train_step,
        "log": lambda values, step: logged.append((step, values)),
    }
    exec(in_loop, names)
    assert [step for step, _ in logged] == [20, 40]
    listed = re.findall(r"^\| `(opdkernels/\w+)` \|", page("guides/track.md"), re.MULTILINE)
    assert set(listed) == logged[0][1].keys() | {"opdkernels/nonfinite"}


def test_sharing_guide_names_what_exists(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    upload, to_wandb = blocks(page("guides/share.md"))
    calls = []
    monkeypatch.setitem(opdkernels.__dict__, "push_to_hub", lambda *a, **k: calls.append((a, k)) or {"url": "URL"})
    exec(upload, {})
    assert capsys.readouterr().out == "URL\n"
    ((arguments, options),) = calls
    signature = inspect.signature(importlib.import_module("opdkernels.hub").push_to_hub)
    signature.bind(*arguments, **options)
    assert (folder / arguments[0]).is_file()
    recorded = []
    run = types.SimpleNamespace(summary={}, log=recorded.append)
    wandb = types.SimpleNamespace(
        init=lambda project: setattr(wandb, "run", run),
        Table=lambda columns, data: (columns, data),
        Html=lambda file, inject: file.read(),
        plot=types.SimpleNamespace(bar=lambda *a, **k: a, line=lambda *a, **k: a),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    exec(to_wandb, {})
    assert "opdkernels/verdict" in run.summary
    assert "opdkernels/report" in recorded[0]


@pytest.mark.parametrize("module", ["tracking.tracker", "tracking.weights", "hub.card", "hub.products"])
def test_examples_of_docstrings_run(module):
    results = doctest.testmod(importlib.import_module(f"opdkernels.{module}"))
    assert results.attempted
    assert not results.failed
