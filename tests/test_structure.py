"""The package keeps its layout: imports go down only, without circles; a kernel family is the same files everywhere."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "opdkernels"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Top to bottom; a package imports from its own layer and from those below.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"api", "doctor", "hub"},
    {"experiments", "report", "compat"},
    {"benchmark", "distillation", "tracking"},
    {"analysis", "optim", "sync"},
    {"metrics", "masks", "patch", "spectral"},
    {"runs"},
    {"ops"},
    {"checkpoint"},
    {"backends"},
    {"config", "formatting", "progress", "bits", "outputs", "files", "untrusted", "models"},
    {"errors", "version", "native"},
]

FAMILIES = sorted(path.parent.name for path in (PACKAGE / "ops").glob("*/__init__.py"))
FAMILY_FILES = (
    "opdkernels/ops/{0}/__init__.py",
    "opdkernels/ops/{0}/cpu.py",
    "opdkernels/ops/{0}/cuda.py",
    "opdkernels/ops/{0}/triton.py",
    "csrc/{0}/{0}.h",
    "csrc/{0}/cpu.h",
    "csrc/{0}/cpu.inl",
    "csrc/{0}/cpu.cpp",
    "csrc/{0}/cuda.cu",
    "tests/ops/{0}/cases.py",
    "tests/ops/{0}/test_{0}.py",
    "benchmarks/bench_{0}.py",
)
CUDA_FILES = ("csrc/{0}/cuda.cu", "opdkernels/ops/{0}/cuda.py")
CPU_FILES = ("csrc/{0}/{0}.h", "csrc/{0}/cpu.h", "csrc/{0}/cpu.inl", "csrc/{0}/cpu.cpp", "opdkernels/ops/{0}/cpu.py")
GAPS = (
    {  # files that a family does not have, and why
        ("gram", file): "Triton uses matrix units, which plain CUDA C++ does not reach" for file in CUDA_FILES
    }
    | {
        ("divergence", file): "products of matrices: torch's own on the CPU, tile by tile, and Triton's on a GPU"
        for file in (*CPU_FILES, *CUDA_FILES)
    }
    | {
        (
            "null",
            file,
        ): "its input is histograms, which are on the host; they are thousands of times smaller than tensors"
        for file in (*CUDA_FILES, "opdkernels/ops/{0}/triton.py")
    }
)


def name_of(path: Path) -> str:
    """The dotted name of a module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def top_level(module: str) -> str:
    """The package or module directly under opdkernels."""
    return module.split(".")[1]


def layer_of(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


NAMES = {name_of(path) for path in MODULES}


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, also in functions, but not for type checkers only."""
    result = set()
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            result |= (submodules & NAMES) or {node.module}
    return {name for name in result if name.startswith("opdkernels.")}


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree without those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield child
            yield from runtime_nodes(child)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    if path == PACKAGE / "__init__.py":
        return  # the public names, imported lazily
    layer = layer_of(top_level(name_of(path)))
    for imported in imported_modules(path):
        assert layer_of(top_level(imported)) >= layer, f"{name_of(path)} imports {imported}, from a layer above"


def test_no_module_imports_itself_through_others():
    """No circles, imports inside functions included."""
    graph = {name_of(path): imported_modules(path) - {name_of(path)} for path in MODULES}
    for name in graph:  # a package's __init__ may collect its own modules
        graph[name] = {module for module in graph[name] if not name.startswith(f"{module}.")}
    circles = [circle for name in sorted(graph) if (circle := path_to_itself(name, graph))]
    assert circles == []


def path_to_itself(start: str, graph: dict[str, set[str]]) -> list[str]:
    """The shortest chain of imports from a module back to itself; empty if there is none."""
    chains = [[start]]
    seen = set()
    for chain in chains:
        for module in graph.get(chain[-1], ()):
            if module == start:
                return [*chain, start]
            if module not in seen:
                seen.add(module)
                chains.append([*chain, module])
    return []


@pytest.mark.parametrize(("family", "file"), list(itertools.product(FAMILIES, FAMILY_FILES)))
def test_family_has_every_file_or_a_stated_gap(family, file):
    assert (ROOT / file.format(family)).is_file() != ((family, file) in GAPS)


def test_folders_are_kernel_families():
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - {"common"}
    assert folders == set(FAMILIES) - {"divergence"}
    tests = {path.name for path in (ROOT / "tests" / "ops").iterdir() if path.is_dir()} - {"__pycache__"}
    assert tests == set(FAMILIES)


DEVICE_CODE = re.compile(r"torch\.cuda\.|pin_memory|\bcuda\.(Stream|Event)\b")
DEVICE_FILES = {"doctor.py": "reports what torch says of GPUs"}


def test_only_backends_and_kernel_launchers_know_devices():
    offenders = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if DEVICE_CODE.search(path.read_text()) and path.relative_to(PACKAGE).parts[0] not in ("backends", "ops")
    }
    assert offenders == set(DEVICE_FILES)


FORMAT_MODULES = ("safetensors", "torch_pickle", "sharded", "hub", "folder", "formats")
FORMAT_USERS = {
    "patch": "writes files in the layout of the trained checkpoint's, byte for byte",
    "masks": "files of masks have the layout of safetensors",
    "sync": "its files have the layout of safetensors",
    "distillation": "its training states are files of torch.save",
}


def test_only_checkpoint_knows_file_formats():
    readers = {f"opdkernels.checkpoint.{name}" for name in FORMAT_MODULES}
    offenders = {
        top_level(name_of(path))
        for path in MODULES
        if imported_modules(path) & readers and path.relative_to(PACKAGE).parts[0] != "checkpoint"
    }
    assert offenders == set(FORMAT_USERS)


def test_no_kernel_source_includes_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert "torch/" not in path.read_text()


def test_pages_quote_the_committed_measurements():
    from benchmarks.pages import render

    for path, text in render().items():
        assert path.read_text() == text, "run python3 -m benchmarks.pages: kernels or results have changed"


def test_readme_is_short_and_its_links_work_on_a_package_index():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    repository = re.search(r'^Repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert repository
    for link in re.findall(r"\]\(([^)]*)\)", text):
        if link.startswith(f"{repository[1]}/"):
            file = link.removeprefix(f"{repository[1]}/").split("/main/", 1)[1]
            assert (ROOT / file).is_file(), link
        else:
            assert link.startswith("https://"), link


def test_missing_snapshot_metrics_give_empty_cells():
    from benchmarks.experiments import SNAPSHOT_COLUMNS, snapshot_table

    row = {"step": 5, **dict.fromkeys(SNAPSHOT_COLUMNS), "changed_visible": 0.5}
    assert snapshot_table([row])[-1] == "| 5 | 50.0 % |  |  |  |  |  |"


def test_experiments_page_agrees_with_committed_results():
    from benchmarks.experiments import PAGE, RESULTS, render

    assert render() == PAGE.read_text(), "run python -m benchmarks.experiments"
    for results in RESULTS.glob("*.json"):
        assert f"<!-- {results.stem} -->" in PAGE.read_text()
