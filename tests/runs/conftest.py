"""The pair of checkpoints of the analysis tests."""

from tests.analysis.conftest import pair

__all__ = ["pair"]
