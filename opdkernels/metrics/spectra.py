"""The record of a matrix's spectra, from which its figures follow in geometry.py; compute.py makes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from opdkernels.runs.store import ArrowStore

SCHEMA_VERSION = 2
SUBSPACE = ("projection", "projection_left", "projection_right", "rotation_left", "rotation_right")
NOTHING = np.zeros(0)
UNDERFLOW = "delta is below 1e-154: fp64 does not hold its squares"
FINAL = ("delta is zero", "delta is below", "non-finite")  # reasons that will not change


@dataclass(frozen=True)
class SpectrumRecord:
    """Spectra of one matrix in one view, or the reason why there are none.

    `source`, `trained`, `delta`: singular values; of method "topk" only the top of `delta`, with guaranteed `bounds`
    [2, top] and the share of the energy, `remainder`, that may be missing from their squares. `energy`: that of delta.
    `method`: "gram", fp64 Gram matrices; "gram_mixed", W^T delta of them in fp32 blocks; "svd"; "topk"; "" for none.
    `subspace` [5, ratios] as SUBSPACE names them. `masks` int64 [ratios, subsets, counts] as in spectral.principal,
    `mask_sizes` [ratios, 3] their size and what they take of ties.
    """

    index: int
    part: int
    view: str
    m: int
    n: int
    method: str = ""
    reason: str = ""
    seconds: float = 0.0
    energy: float = 0.0
    remainder: float = 0.0
    source: np.ndarray = field(default_factory=lambda: NOTHING)
    trained: np.ndarray = field(default_factory=lambda: NOTHING)
    delta: np.ndarray = field(default_factory=lambda: NOTHING)
    bounds: np.ndarray = field(default_factory=lambda: NOTHING)
    subspace: np.ndarray = field(default_factory=lambda: NOTHING)
    masks: np.ndarray = field(default_factory=lambda: NOTHING.astype(np.int64))
    mask_sizes: np.ndarray = field(default_factory=lambda: NOTHING.astype(np.int64))

    @property
    def key(self) -> tuple[int, int, str]:
        return self.index, self.part, self.view


def open_spectra(folder: Path | None) -> ArrowStore[SpectrumRecord]:
    """The spectra of a run, stored in `folder` or, if it is None, in memory only."""
    return ArrowStore(folder, SpectrumRecord, SCHEMA_VERSION)
