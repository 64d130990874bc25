"""Similarity of the top directions of an update to those of the last checkpoint of its run, per matrix.

Sim_K(t, T) = ||V_K(t)^T V_K(T)||^2 / K for the K = 16 top singular vectors of delta at checkpoint t and at the last
one, T. It is 1 when training only continues along directions it already has, and K / n for unrelated directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from opdkernels.runs.store import ArrowStore

TOP = 16
DEFICIENT = 1e-6  # s_K / s_1 below which the last of the K vectors are arbitrary
SCHEMA_VERSION = 2
Vectors = tuple[torch.Tensor, torch.Tensor]  # left [m, K] and right [n, K]


@dataclass(frozen=True)
class Similarity:
    """Sim_K of one matrix to the last checkpoint, at each checkpoint.

    Attributes:
        index: Number of the tensor in the pair.
        part: Number of the matrix in a stack of experts, -1 for a single matrix.
        m: Rows.
        n: Columns.
        run: Digest of the checkpoints that were compared.
        left: Sim_K of the left vectors, NaN where an update has fewer than K directions, float64 [checkpoints].
        right: The same for the right vectors.
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


def subspace_similarity(a: torch.Tensor, b: torch.Tensor) -> float:
    """||A^T B||^2 / K of orthonormal A, B [n, K]."""
    return float((a.T @ b).square().sum()) / a.shape[1]


def similarity_to_last(tops: Sequence[Vectors | None]) -> tuple[np.ndarray, np.ndarray]:
    """Sim_K of the vectors of each checkpoint to those of the last, left and right [checkpoints]."""
    last = tops[-1]

    def similarities(side: int) -> np.ndarray:
        return np.array([subspace_similarity(top[side], last[side]) if top and last else np.nan for top in tops])

    return similarities(0), similarities(1)


def open_similarities(folder: Path | None) -> ArrowStore[Similarity]:
    """The similarities of a run, stored in `folder` or, if it is None, in memory only."""
    return ArrowStore(folder, Similarity, SCHEMA_VERSION)
