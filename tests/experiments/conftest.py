"""Experiments run on the tiny models of the distillation tests."""

from tests.distillation.conftest import options, places  # noqa: F401
