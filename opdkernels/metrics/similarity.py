"""How near the top directions of an update are to those of the last checkpoint of its run, matrix by matrix.

Sim_K(t, T) = ||V_K(t)^T V_K(T)||^2 / K, of the K = 16 top singular vectors of delta at t and at the end T: 1 once training
only grows along directions that it has found, K / n for unrelated ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from opdkernels.runs.store import ArrowStore

TOP = 16
DEFICIENT = 1e-6  # s_K / s_1 below which the last of the K vectors are any
SCHEMA_VERSION = 2
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


def similarity_to_last(tops: Sequence[Vectors | None]) -> tuple[np.ndarray, np.ndarray]:
    """Sim_K of each to the last, left and right."""
    last = tops[-1]
    sides = [[similar(top[side], last[side]) if top and last else float("nan") for top in tops] for side in (0, 1)]
    return np.array(sides[0]), np.array(sides[1])


def open_similarities(folder: Path | None) -> ArrowStore[Similarity]:
    """The similarities of a run, stored in `folder` or, if it is None, in memory only."""
    return ArrowStore(folder, Similarity, SCHEMA_VERSION)
