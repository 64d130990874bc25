"""The record of one matched tensor: its tally, from which every per-coordinate metric follows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from opdkernels.ops.delta.many import SparseTally
from opdkernels.runs.store import ArrowStore

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class TallyRecord:
    """One matched tensor: its index in the pair, its tally, or why there is none (`failure`)."""

    index: int
    name: str
    trained_name: str
    shape: tuple[int, ...]
    dtype_base: str
    dtype_trained: str
    how: str
    tally: SparseTally | None
    failure: str = ""

    @property
    def key(self) -> int:
        return self.index


def open_tallies(folder: Path | None) -> ArrowStore[TallyRecord]:
    """The tallies of a run, stored in `folder` or, if it is None, in memory only."""
    return ArrowStore(folder, TallyRecord, SCHEMA_VERSION)
