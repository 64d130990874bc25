"""Tests of Triton's compiler, and the test that starts those in its interpreter (tests/ops/conftest.py)."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
