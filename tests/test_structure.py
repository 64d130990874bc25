"""The package keeps its layers: imports go down only, and every kernel family has the same files."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "opdkernels"

# Top to bottom; a package imports from its own layer and from those below.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"api", "doctor"},
    {"report", "experiments", "compat"},
    {"distillation"},
    {"analysis", "optim"},
    {"metrics", "masks", "patch", "spectral"},
    {"runs"},
    {"ops"},
    {"checkpoint"},
    {"backends"},
    {"config", "progress", "formatting", "bits", "files"},
    {"errors", "version", "_C"},
]
FAMILIES = ("delta", "overlap", "quantile", "gram", "patch", "step", "divergence")
FILES = (
    "opdkernels/ops/{0}/__init__.py",
    "opdkernels/ops/{0}/cpu.py",
    "opdkernels/ops/{0}/cuda.py",
    "opdkernels/ops/{0}/triton.py",
    "csrc/{0}/{0}.h",
    "csrc/{0}/cpu.inl",
    "csrc/{0}/cpu.cpp",
    "csrc/{0}/cuda.cu",
    "tests/ops/{0}/test_{0}.py",
    "tests/ops/{0}/test_{0}_cuda.py",
    "tests/ops/{0}/test_{0}_triton.py",
    "benchmarks/bench_{0}.py",
)
CUDA = ("csrc/{0}/cuda.cu", "opdkernels/ops/{0}/cuda.py", "tests/ops/{0}/test_{0}_cuda.py")
CPU = ("csrc/{0}/{0}.h", "csrc/{0}/cpu.inl", "csrc/{0}/cpu.cpp", "opdkernels/ops/{0}/cpu.py")
GAPS = {  # what a family has no file for, and why
    ("gram", file): "Triton runs on matrix units, which plain CUDA C++ does not reach" for file in CUDA
} | {
    ("divergence", file): "products of matrices: torch's own on the CPU, tile by tile, and Triton's on a GPU"
    for file in (*CPU, *CUDA)
}


def layer_of(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "opdkernels":
                found |= {f"opdkernels.{a.name}" for a in node.names}
    return {name.split(".")[1] for name in found if name.startswith("opdkernels.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_down_only(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return  # the package's names, loaded late
    for imported in imports_of(path):
        if imported not in {n for names in LAYERS for n in names}:
            continue  # a name of the package itself, such as InputError
        assert layer_of(imported) >= layer_of(own), f"{path.name} imports {imported}, from a layer above"


@pytest.mark.parametrize(("family", "file"), list(itertools.product(FAMILIES, FILES)))
def test_every_family_has_every_file_or_a_named_gap(family, file):
    assert (ROOT / file.format(family)).is_file() != ((family, file) in GAPS)


@pytest.mark.parametrize("folder", ["opdkernels/ops", "csrc", "tests/ops"])
def test_every_folder_is_a_family(folder):
    found = {path.name for path in (ROOT / folder).iterdir() if path.is_dir()} - {"common", "__pycache__"}
    assert found == set(FAMILIES) - ({"divergence"} if folder == "csrc" else set())


def test_no_kernel_source_includes_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert "torch/" not in path.read_text()


def test_readme_quotes_the_committed_measurements():
    import json

    from benchmarks.run import table

    measured = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert measured
    for results in measured:
        assert table(json.loads(results.read_text())) in (ROOT / "README.md").read_text()


def test_missing_snapshot_metrics_give_empty_cells():
    from benchmarks.experiments import SNAPSHOT_COLUMNS, snapshot_table

    assert (
        snapshot_table([{"step": 5, **dict.fromkeys(SNAPSHOT_COLUMNS), "changed_visible": 0.5}])[-1]
        == "| 5 | 50.0 % |  |  |  |  |  |"
    )


def test_experiments_page_agrees_with_committed_results():
    from benchmarks.experiments import PAGE, RESULTS, render

    assert render() == PAGE.read_text(), "run python -m benchmarks.experiments"
    for results in RESULTS.glob("*.json"):
        assert f"<!-- {results.stem} -->" in PAGE.read_text()
