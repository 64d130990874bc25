"""The record of a matrix's spectra: analysis/matrix_spectra.py fills it, geometry.py computes its metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from opdkernels.runs.store import ArrowStore

SCHEMA_VERSION = 4
SUBSPACE = ("projection", "projection_left", "projection_right", "rotation_left", "rotation_right")
COMPOSITES = ("principal", "principal_not_low", "nonprincipal_or_low")
NO_VALUES = np.zeros(0)
UNDERFLOW = "delta is below 1e-154: fp64 does not hold its squares"
FINAL = ("delta is zero", "delta is below", "non-finite")  # reasons that will not change


@dataclass(frozen=True)
class SpectrumRecord:
    """Spectra of one matrix in one view, or the reason why there are none.

    Attributes:
        index: Number of the tensor in the pair.
        part: Number of the matrix in a stack of experts, -1 for a single matrix.
        view: "stored" or "visible".
        m: Rows.
        n: Columns.
        method: "gram": fp64 Gram matrices; "gram_mixed": the same with W^T delta in fp32 blocks; "svd"; "topk"; or ""
            if there are none.
        reason: Why there are no spectra.
        seconds: Computing time.
        energy: Sum of delta^2.
        remainder: Method "topk": fraction of the energy that may be missing from the squares of `delta`.
        base: Singular values of W, descending.
        trained: Singular values of W'.
        delta: Singular values of delta; method "topk": only the largest.
        bounds: Method "topk": guaranteed lower and upper bounds of `delta` [2, top].
        subspace: The metrics named by SUBSPACE [5, ratios].
        masks: Mask counts as in `spectral.principal`, int64 [ratios, subsets, counts].
        mask_sizes: Size of the masks, and how many tied coordinates each takes [ratios, 3].
        null_coverage: Coverage of COMPOSITES expected under the null and magnitude-conditioned, mean and standard
            deviation [2, ratios, masks, 2]; empty if unknown, as the following fields.
        null_subspace: The metrics named by SUBSPACE under the null, mean and standard deviation [5, ratios, 2].
        null_drift: Drift under the null, mean and standard deviation [2].
        profile_factors: How the variance of the null at each |W| changes the stable rank and the energy of the top 16
            of a random update [2].
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
    base: np.ndarray = field(default_factory=lambda: NO_VALUES)
    trained: np.ndarray = field(default_factory=lambda: NO_VALUES)
    delta: np.ndarray = field(default_factory=lambda: NO_VALUES)
    bounds: np.ndarray = field(default_factory=lambda: NO_VALUES)
    subspace: np.ndarray = field(default_factory=lambda: NO_VALUES)
    masks: np.ndarray = field(default_factory=lambda: NO_VALUES.astype(np.int64))
    mask_sizes: np.ndarray = field(default_factory=lambda: NO_VALUES.astype(np.int64))
    null_coverage: np.ndarray = field(default_factory=lambda: NO_VALUES)
    null_subspace: np.ndarray = field(default_factory=lambda: NO_VALUES)
    null_drift: np.ndarray = field(default_factory=lambda: NO_VALUES)
    profile_factors: np.ndarray = field(default_factory=lambda: NO_VALUES)

    @property
    def key(self) -> tuple[int, int, str]:
        return self.index, self.part, self.view


def open_spectra(folder: Path | None) -> ArrowStore[SpectrumRecord]:
    """The spectra of a run, stored in `folder` or, if it is None, in memory only."""
    return ArrowStore(folder, SpectrumRecord, SCHEMA_VERSION)
