"""The house stands as docs/architecture says: imports run down only, and every kernel family has its place in every column."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "opdkernels"

# Top to bottom; a file imports from its own floor and from those below.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"api", "doctor"},
    {"report", "distill"},
    {"analysis", "optim"},
    {"masks", "patch", "spectral"},
    {"ops"},
    {"backends", "checkpoint"},
    {"options", "progress", "bits", "files"},
    {"errors", "version", "_C"},
]
FAMILIES = ("delta", "overlap", "quantile", "gram", "patch", "step", "divergence")
COLUMNS = (
    "opdkernels/ops/{}.py",
    "csrc/{}.h",
    "csrc/cpu/{}.inl",
    "opdkernels/backends/triton/{}.py",
    "csrc/cuda/{}.cu",
    "opdkernels/backends/cuda/{}.py",
    "tests/ops/test_{}.py",
    "tests/backends/triton/test_{}.py",
    "tests/backends/cuda/test_{}.py",
    "benchmarks/bench_{}.py",
)
CPU = ("csrc/{}.h", "csrc/cpu/{}.inl")
CUDA = ("csrc/cuda/{}.cu", "opdkernels/backends/cuda/{}.py", "tests/backends/cuda/test_{}.py")
GAPS = {  # what a family has no file for, and why
    (family, column): why
    for family, why in {
        "gram": "Triton serves: its products run on matrix units, which plain CUDA C++ does not reach",
    }.items()
    for column in CUDA
} | {
    ("divergence", column): "products of matrices: on the CPU torch's own, tile by tile, on a GPU Triton's"
    for column in (*CPU, *CUDA)
}


def floor_of(module: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if module in names)


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
        if imported not in {n for names in FLOORS for n in names}:
            continue  # a name of the package itself, such as InputError
        assert floor_of(imported) >= floor_of(own), f"{path.name} imports {imported}, from a floor above"


@pytest.mark.parametrize(("family", "column"), list(itertools.product(FAMILIES, COLUMNS)))
def test_every_family_has_its_file_in_every_column_or_a_named_gap(family, column):
    assert (ROOT / column.format(family)).is_file() != ((family, column) in GAPS)


def test_every_file_of_the_grid_is_a_family():
    for folder, suffix in (
        ("opdkernels/ops", ".py"),
        ("csrc/cpu", ".inl"),
        ("opdkernels/backends/triton", ".py"),
        ("opdkernels/backends/cuda", ".py"),
        ("csrc/cuda", ".cu"),
    ):
        names = {p.stem for p in (ROOT / folder).glob(f"*{suffix}")} - {
            "__init__",
            "isa",
            "exact_sum",
            "launch",
            "numeric",
            "sources",
            "tiles",
        }
        assert names == {family for family in FAMILIES if (family, f"{folder}/{{}}{suffix}") not in GAPS}


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


def test_marks_without_a_figure_have_an_empty_cell():
    from benchmarks.experiments import MARKS, marks_table

    assert (
        marks_table([{"step": 5, **dict.fromkeys(MARKS), "changed_visible": 0.5}])[-1]
        == "| 5 | 50.0 % |  |  |  |  |  |"
    )


def test_the_page_of_experiments_quotes_the_results_that_are_kept():
    from benchmarks.experiments import PAGE, RESULTS, show

    assert show() == PAGE.read_text(), "run python -m benchmarks.experiments"
    for results in RESULTS.glob("*.json"):
        assert f"<!-- {results.stem} -->" in PAGE.read_text()
