"""The record of a matrix's spectra, from which its figures follow in geometry.py; compute.py makes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from opdkernels.runs.records import Records
from opdkernels.spectral import principal
from opdkernels.spectral.exact import RATIOS

SCHEMA_VERSION = 1
SUBSPACE = ("projection", "projection_left", "projection_right", "rotation_left", "rotation_right")
ARRAYS = ("source", "trained", "delta", "bounds", "subspace", "masks", "mask_sizes")
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


def to_table(records: list[SpectrumRecord]) -> pa.Table:
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(r, name) for r in records])
        for name in ("index", "part", "view", "m", "n", "method", "reason", "seconds", "energy", "remainder")
    }
    for name in ARRAYS:
        arrays = [getattr(r, name).ravel() for r in records]
        offsets = np.concatenate(([0], np.cumsum([a.size for a in arrays])))
        columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(np.concatenate(arrays)))
    return pa.table(columns, metadata={"opdkernels_spectra": str(SCHEMA_VERSION)})


def from_table(table: pa.Table) -> Iterator[SpectrumRecord]:
    if (table.schema.metadata or {}).get(b"opdkernels_spectra") != str(SCHEMA_VERSION).encode():
        raise ValueError("written by another version of opdkernels")
    lists = {name: table[name].combine_chunks() for name in ARRAYS}
    plain = table.drop_columns(list(ARRAYS)).to_pylist()
    shapes = {
        "bounds": (2, -1),
        "subspace": (len(SUBSPACE), -1),
        "masks": (len(RATIOS), len(principal.SUBSETS), -1),
        "mask_sizes": (len(RATIOS), -1),
    }
    for i, row in enumerate(plain):
        arrays = {name: lists[name][i].values.to_numpy(zero_copy_only=False) for name in ARRAYS}
        yield SpectrumRecord(
            **row, **{name: a.reshape(shapes[name]) if name in shapes and a.size else a for name, a in arrays.items()}
        )


def spectra(folder: Path | None) -> Records[SpectrumRecord]:
    """The spectra of a run, kept in `folder`."""
    return Records(folder, to_table, from_table)
