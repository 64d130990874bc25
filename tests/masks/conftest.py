"""The small checkpoints of the analysis tests."""

from tests.analysis.conftest import pair  # noqa: F401
