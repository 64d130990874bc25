"""How near the top directions of an update are to those of the last checkpoint of its run, matrix by matrix.

Sim_K(t, T) = ||V_K(t)^T V_K(T)||^2 / K, of the K = 16 top singular vectors of delta at t and at the end T: 1 once training
only grows along directions that it has found, K / n for unrelated ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from opdkernels.runs.records import Records

TOP = 16
DEFICIENT = 1e-6  # s_K / s_1 below which the last of the K vectors are any
SCHEMA_VERSION = 1
Vectors = tuple[torch.Tensor, torch.Tensor]  # left [m, K] and right [n, K]


@dataclass(frozen=True)
class Similarity:
    """Of one matrix of the source, at each checkpoint: Sim_K to the last; NaN where an update has fewer than K directions.

    `run`: which checkpoints these were. `left`, `right` [checkpoints].
    """

    index: int
    part: int
    m: int
    n: int
    run: str
    left: np.ndarray
    right: np.ndarray

    @property
    def key(self) -> tuple[int, int]:
        return self.index, self.part


def similar(a: torch.Tensor, b: torch.Tensor) -> float:
    """||A^T B||^2 / K of orthonormal [n, K]."""
    return float((a.T @ b).square().sum()) / a.shape[1]


def to_the_last(tops: Sequence[Vectors | None]) -> tuple[np.ndarray, np.ndarray]:
    """Sim_K of each to the last, left and right."""
    last = tops[-1]
    sides = [[similar(top[side], last[side]) if top and last else float("nan") for top in tops] for side in (0, 1)]
    return np.array(sides[0]), np.array(sides[1])


def to_table(records: list[Similarity]) -> pa.Table:
    columns = {name: pa.array([getattr(r, name) for r in records]) for name in ("index", "part", "m", "n", "run")}
    columns |= {
        name: pa.array([getattr(r, name) for r in records], pa.list_(pa.float64())) for name in ("left", "right")
    }
    return pa.table(columns, metadata={"opdkernels_similarity": str(SCHEMA_VERSION)})


def from_table(table: pa.Table) -> Iterator[Similarity]:
    if (table.schema.metadata or {}).get(b"opdkernels_similarity") != str(SCHEMA_VERSION).encode():
        raise ValueError("written by another version of opdkernels")
    for row in table.to_pylist():
        yield Similarity(**{**row, "left": np.array(row["left"], float), "right": np.array(row["right"], float)})


def similarities(folder: Path | None) -> Records[Similarity]:
    """The similarities of a run, kept in `folder`."""
    return Records(folder, to_table, from_table)
