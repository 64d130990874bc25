"""The tests of a kernel family: reference, CPU kernels and GPU kernels.

`test_<family>_triton.py` runs in Triton's interpreter, which Triton enables when a kernel is decorated:
tests/backends/triton/test_interpreter.py starts a pytest process for these files. A test in `test_<family>_cuda.py`
that breaks a kernel runs in a forked process (tests/backends/cuda/conftest.py).
"""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

import pytest

from tests.backends.cuda.conftest import pytest_pyfunc_call  # noqa: F401

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if INTERPRETED else ["*/test_*_triton.py"]


@pytest.fixture(scope="session", autouse=True)
def patched_interpreter():
    """Patches `triton.language` once: the interpreter spends most of its time patching it at every call."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
