"""Factorisations of source matrices on disk, found again by the content of the matrix: a run with one more checkpoint, or
one that goes on after a kill, does not make them twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from opdkernels.files import write_atomically
from opdkernels.spectral.exact import Factor

VERSION = "1"  # of how they are made


class Factors:
    """The folder's factorisations: one file a matrix, its name the digest of the matrix. May be deleted between runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()

    def of(self, w: torch.Tensor, visible: bool, keep: int, make: Callable[[], Factor]) -> Factor:
        """The factor of w [m, n], stored and contiguous, in a view, with `keep` vectors: from the folder, or made and kept there."""
        facts = f"{VERSION} {w.dtype} {list(w.shape)} {visible} {keep}".encode()
        digest = hashlib.blake2b(facts, digest_size=20)
        digest.update(w.view(-1).view(torch.uint8).numpy().data)
        path = self.folder / f"{digest.hexdigest()}.safetensors"
        short = min(w.shape)
        try:
            kept = load(path.read_bytes())
            factor = Factor(kept["sigma"], kept["vectors"])
            whole = factor.sigma.shape == (short,) and factor.vectors.shape == (short, keep)
            if whole and torch.equal(kept["digest"], digest_of(factor)):
                return factor
        except (OSError, KeyError, SafetensorError):  # not there, or damaged: made again
            pass
        factor = make()
        write_atomically(path, save({"sigma": factor.sigma, "vectors": factor.vectors, "digest": digest_of(factor)}))
        return factor


def digest_of(factor: Factor) -> torch.Tensor:
    digest = hashlib.blake2b(factor.sigma.numpy().data, digest_size=16)
    digest.update(factor.vectors.numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
