"""The compiled CPU kernels: the library `_cpu.so` of this folder, called through ctypes.

The library knows neither Python nor torch, so that one build serves every version of both. Importing this module raises
ImportError if the library is missing or of another version of opdkernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

INTERFACE = 4  # OPD_INTERFACE of csrc/common/cpu/boundary.h
ERRORS = {1: ValueError, 2: MemoryError, 3: RuntimeError}  # by `Status` of csrc/common/cpu/boundary.h
PTR, INT, NAME = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p  # types of arguments


def load_library() -> ctypes.CDLL:
    """The library. Raises ImportError, or ModuleNotFoundError if there is none."""
    path = Path(__file__).with_name("_cpu.so")
    if not path.is_file():
        raise ModuleNotFoundError("none was built at install", name=__name__)
    try:
        library = ctypes.CDLL(str(path))
        interface = library.opd_interface()
    except (OSError, AttributeError) as error:
        raise ImportError(str(error)) from error
    if interface != INTERFACE:
        raise ImportError(f"{path.name} is of another version of opdkernels; reinstall opdkernels")
    return library


LIBRARY = load_library()
LIBRARY.opd_error_message.restype = NAME
LIBRARY.opd_compiler.restype = NAME


def raise_error(status: int, function: Any, arguments: tuple[Any, ...]) -> None:
    """Raise the error that a function of the library returned, if any."""
    if status:
        raise ERRORS[status](LIBRARY.opd_error_message().decode())


def declare(name: str, *types: Any) -> Callable[..., None]:
    """A function of the library that returns a status; the GIL is released while it runs.

    Args:
        name: Name of the C function.
        types: PTR, INT or NAME for each argument; PTR takes addresses, ctypes arrays and None.

    Returns:
        The function. It raises ValueError for arguments that it refuses, MemoryError, or RuntimeError.
    """
    function = LIBRARY[name]
    function.argtypes = types
    function.errcheck = raise_error  # type: ignore[assignment]
    return function


_available_isas = declare("opd_available_isas", PTR)
_current_isa = declare("opd_current_isa", PTR)
_use_isa = declare("opd_use_isa", NAME)
_guard_mapping = declare("opd_guard_mapping", PTR, INT, PTR)
mapping_faults = LIBRARY.opd_mapping_faults
mapping_faults.argtypes, mapping_faults.restype = (INT,), INT
unguard_mapping = LIBRARY.opd_unguard_mapping
unguard_mapping.argtypes, unguard_mapping.restype = (INT,), None

compiler: str = LIBRARY.opd_compiler().decode()
openmp = bool(LIBRARY.opd_openmp())


def available_isas() -> list[str]:
    """Instruction sets of this processor and this build, least capable first."""
    names = ctypes.c_char_p()
    _available_isas(ctypes.byref(names))
    return (names.value or b"").decode().split(",")


def current_isa() -> str:
    """The instruction set in use. Raises ValueError if OPDKERNELS_ISA names another one than the available ones."""
    name = ctypes.c_char_p()
    _current_isa(ctypes.byref(name))
    return (name.value or b"").decode()


def use_isa(name: str) -> None:
    """Use another instruction set. Raises ValueError if it is not available."""
    _use_isa(name.encode())


def guard_mapping(address: int, nbytes: int) -> int:
    """Let reads beyond the end of a mapped file that is truncated give zeros instead of ending the process.

    Args:
        address: Address of the mapping.
        nbytes: Its size in bytes.

    Returns:
        A handle for `mapping_faults`, the number of pages that were read so, and for `unguard_mapping`.

    Raises:
        RuntimeError: 4,096 files are guarded already.
    """
    handle = ctypes.c_int64()
    _guard_mapping(address, nbytes, ctypes.byref(handle))
    return handle.value
