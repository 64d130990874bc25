"""The library of CPU kernels: its C functions have the types that Python passes, and another library is refused."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from opdkernels.backends import cpu
from opdkernels.backends.cpu import INT, PTR

ROOT = Path(__file__).parents[2]
FAMILIES = sorted(path.parent.name for path in (ROOT / "csrc").glob("*/cpu.cpp"))
FUNCTION = re.compile(r"^OPD_EXPORT int (opd_\w+)\(([^)]*)\)", re.MULTILINE)

pytestmark = pytest.mark.skipif(cpu.native is None, reason="the compiled kernels are not built")


def c_functions(path: Path) -> dict[str, list[type]]:
    """The exported functions of a C++ file that return a status, and the types of their parameters."""
    functions = {}
    for name, parameters in FUNCTION.findall(path.read_text()):
        types = [" ".join(parameter.split()[:-1]) for parameter in parameters.split(",")]
        for spelled in types:
            assert spelled.endswith("*") or spelled in ("int64_t", "uintptr_t"), f"{name} takes {spelled}"
        functions[name] = [INT if spelled == "int64_t" else PTR for spelled in types]
    return functions


@pytest.mark.parametrize("family", FAMILIES)
def test_python_declares_the_types_of_the_c_functions(family):
    """ctypes would pass any number of arguments of any type to any function."""
    expected = c_functions(ROOT / "csrc" / family / "cpu.cpp")
    module = importlib.import_module(f"opdkernels.ops.{family}.cpu")
    declared = [value for value in vars(module).values() if isinstance(value, ctypes._CFuncPtr)]
    assert {function.__name__: list(function.argtypes) for function in declared} == expected


def test_errors_of_the_library_are_exceptions():
    digest = importlib.import_module("opdkernels.ops.patch.cpu").DIGEST
    with pytest.raises(ValueError, match="coordinates must have 1, 2, 4 or 8 bytes"):
        digest(0, 3, 0, 1, 0)
    with pytest.raises(ValueError, match="an integer has more than 32 bits"):
        digest(0, 1, 0, 1 << 40, 0)
    with pytest.raises(ValueError, match="sizes must not be negative"):
        digest(0, 1, -1, 1, 0)
    with pytest.raises(ctypes.ArgumentError):
        digest(0, 1.5, 0, 1, 0)
    digest(0, 1, 0, 1, 0)  # nothing to do


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('extern "C" int opd_interface() { return -1; }', "_cpu.so is of another version of opdkernels; reinstall"),
        ('extern "C" int other() { return 1; }', "opd_interface"),
    ],
)
def test_library_of_another_version_is_refused(tmp_path, source, message):
    """Its functions might take other arguments."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no compiler")
    shutil.copy(ROOT / "opdkernels" / "native.py", tmp_path)
    (tmp_path / "library.cpp").write_text(source)
    command = [compiler, "-shared", "-fPIC", "library.cpp", "-o", "_cpu.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(ImportError, match=message):
        load_copy(tmp_path)


def test_missing_or_damaged_library_is_an_import_error(tmp_path):
    shutil.copy(ROOT / "opdkernels" / "native.py", tmp_path)
    with pytest.raises(ModuleNotFoundError, match="none was built at install"):
        load_copy(tmp_path)
    (tmp_path / "_cpu.so").write_bytes(b"\x7fELF")
    with pytest.raises(ImportError, match=r"file too short|invalid ELF"):
        load_copy(tmp_path)


def load_copy(folder: Path) -> None:
    """Executes the copy of `native.py` in a folder."""
    spec = importlib.util.spec_from_file_location("copied_C", folder / "native.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
