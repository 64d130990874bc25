"""Factorisations of base matrices on disk, keyed by the content of the matrix: a run with one more checkpoint, or a
resumed run, does not compute them again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from opdkernels.errors import InputError
from opdkernels.files import remove_leftovers, write_atomically
from opdkernels.spectral.exact import Factor
from opdkernels.untrusted import read_file

MAX_FACTOR_BYTES = 2**40
VERSION = "1"  # of the computation


class FactorCache:
    """Factorisations in a folder: one file per matrix, named by the digest of the matrix. It may be deleted between
    runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)

    def get(self, w: torch.Tensor, visible: bool, num_vectors: int, compute: Callable[[], Factor]) -> Factor:
        """The factor of w [m, n], stored and contiguous, in a view: loaded, or computed and stored."""
        description = f"{VERSION} {w.dtype} {list(w.shape)} {visible} {num_vectors}".encode()
        digest = hashlib.blake2b(description, digest_size=20)
        digest.update(w.view(-1).view(torch.uint8).numpy().data)
        path = self.folder / f"{digest.hexdigest()}.safetensors"
        short = min(w.shape)
        try:
            stored = load(read_file(path, max_bytes=MAX_FACTOR_BYTES, remedy="delete it"))
            factor = Factor(stored["sigma"], stored["vectors"])
            complete = factor.sigma.shape == (short,) and factor.vectors.shape == (short, num_vectors)
            if complete and torch.equal(stored["digest"], digest_of(factor)):
                return factor
        except (InputError, KeyError, SafetensorError):  # absent or damaged: computed again
            pass
        factor = compute()
        write_atomically(path, save({"sigma": factor.sigma, "vectors": factor.vectors, "digest": digest_of(factor)}))
        return factor


def digest_of(factor: Factor) -> torch.Tensor:
    """uint8 [16]."""
    digest = hashlib.blake2b(factor.sigma.numpy().data, digest_size=16)
    digest.update(factor.vectors.numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
