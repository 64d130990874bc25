"""LAPACK on the CPU: that of torch, or the OpenBLAS that NumPy's wheels carry, called through ctypes.

torch's wheels for x86 carry MKL, whose reduction of a symmetric matrix to tridiagonal form takes about twice as long as
OpenBLAS's on processors of AMD. There NumPy's OpenBLAS is used where it is found, elsewhere torch. The choice depends
on the machine only, so that a resumed run computes what the first one did. OPDKERNELS_LAPACK=torch or openblas
overrides it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from opdkernels.errors import UsageError, printable

VARIABLE = "OPDKERNELS_LAPACK"
CHOICES = ("auto", "torch", "openblas")
ROUTINES = ("dsytrd", "dsterf", "dstebz", "dstein", "dormtr")


def chosen_library() -> str:
    """The library in use: "openblas" or "torch". Raises UsageError as `openblas`."""
    return "torch" if openblas() is None else "openblas"


def openblas() -> ctypes.CDLL | None:
    """NumPy's OpenBLAS, if it is to be used.

    Raises:
        UsageError: OPDKERNELS_LAPACK is not valid, or names a library that is not there.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise UsageError(f"{VARIABLE} is {printable(choice)}; set it to one of {', '.join(CHOICES)}")
    if choice == "torch" or (choice == "auto" and not is_amd()):
        return None
    library = load_openblas()
    if choice == "openblas" and library is None:
        raise UsageError(f"{VARIABLE} is openblas, and NumPy carries none here; unset it")
    return library


@functools.cache
def is_amd() -> bool:
    """Whether the processor is of AMD."""
    with contextlib.suppress(OSError):
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return False


@functools.cache
def load_openblas() -> ctypes.CDLL | None:
    """The library in NumPy's wheel, with 64-bit integers; None if NumPy has another BLAS or other names."""
    for path in sorted(Path(np.__file__).parent.with_name("numpy.libs").glob("libscipy_openblas64_*")):
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path))
            for name in ROUTINES:
                library[f"scipy_{name}_64_"].restype = None
            library.scipy_openblas_set_num_threads64_.argtypes = (ctypes.c_int,)
            return library
    return None


class OneThread:
    """NumPy's OpenBLAS without threads of its own, for callers that use threads themselves. Contexts may overlap: the
    last one to end restores the number of threads."""

    def __init__(self) -> None:
        self._lock, self._users, self._before = threading.Lock(), 0, 0

    def __enter__(self) -> None:
        library = load_openblas()
        with self._lock:
            if library is not None and not self._users:
                self._before = library.scipy_openblas_get_num_threads64_()
                library.scipy_openblas_set_num_threads64_(1)
            self._users += 1

    def __exit__(self, *error: object) -> None:
        library = load_openblas()
        with self._lock:
            self._users -= 1
            if library is not None and not self._users:
                library.scipy_openblas_set_num_threads64_(self._before)


ONE_THREAD = OneThread()


def call(name: str, *arguments: Any) -> int:
    """Calls a routine of LAPACK, whose last argument is `info`, and returns that.

    Args:
        name: One of ROUTINES.
        arguments: Texts of one letter, integers, floats, or contiguous arrays.

    Raises:
        RuntimeError: An argument is invalid.
    """
    library = load_openblas()
    assert library is not None
    passed: list[Any] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            passed.append(ctypes.c_void_p(argument.ctypes.data))
        elif isinstance(argument, str):
            passed.append(ctypes.c_char_p(argument.encode()))
        else:
            passed.append(ctypes.byref((ctypes.c_double if isinstance(argument, float) else ctypes.c_int64)(argument)))
    info = ctypes.c_int64()
    lengths = [ctypes.c_size_t(1)] * sum(
        isinstance(argument, str) for argument in arguments
    )  # Fortran passes them last
    library[f"scipy_{name}_64_"](*passed, ctypes.byref(info), *lengths)
    if info.value < 0:
        raise RuntimeError(f"argument {-info.value} of {name} is invalid")
    return info.value
