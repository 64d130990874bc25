"""Triton reads TRITON_INTERPRET when a kernel is decorated, so kernels are run and compiled in processes of their own.

The tests of a family run in the interpreter: `test_interpreter.py` starts a pytest for them. The others need the compiler.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FAMILIES = [
    "test_delta.py",
    "test_quantile.py",
    "test_overlap.py",
    "test_gram.py",
    "test_patch.py",
    "test_step.py",
    "test_divergence.py",
]
collect_ignore = ["test_interpreter.py", "test_compiled.py"] if INTERPRETED else FAMILIES


@pytest.fixture(scope="session", autouse=True)
def interpreted_language():
    """Patched once: the interpreter patches the language anew at every call within a kernel, which takes most of its time."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
