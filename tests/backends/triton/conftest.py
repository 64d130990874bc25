"""Tests that need Triton's compiler, and the one that starts the tests in Triton's interpreter (tests/ops/conftest.py)."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
