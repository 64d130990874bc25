"""Factorisations of source matrices on disk, found again by the content of the matrix: a run with one more checkpoint, or
one that goes on after a kill, does not make them twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from opdkernels.analysis.records import write_atomically
from opdkernels.spectral.exact import Factor

VERSION = "1"  # of how they are made


class Factors:
    """The folder's factorisations: one file a matrix, its name the digest of the matrix. May be deleted at any time."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, w: torch.Tensor, visible: bool, keep: int, make: Callable[[], Factor]) -> Factor:
        """The factor of w [m, n], stored and contiguous, in a view, with `keep` vectors: from the folder, or made and kept there."""
        facts = f"{VERSION} {w.dtype} {list(w.shape)} {visible} {keep}".encode()
        digest = hashlib.blake2b(facts, digest_size=20)
        digest.update(w.view(-1).view(torch.uint8).numpy().data)
        path = self.folder / f"{digest.hexdigest()}.safetensors"
        short = min(w.shape)
        try:
            kept = load_file(path)
            factor = Factor(kept["sigma"], kept["vectors"])
            if factor.sigma.shape == (short,) and factor.vectors.shape == (short, keep):
                return factor
        except (OSError, KeyError, SafetensorError):  # not there, or damaged: made again
            pass
        factor = make()
        write_atomically(path, save({"sigma": factor.sigma, "vectors": factor.vectors}))
        return factor
