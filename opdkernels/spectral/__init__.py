"""Spectra of a pair of matrices: exact from Gram matrices (exact.py), or only the top, randomized (randomized.py)."""

from opdkernels.spectral.randomized import RandomizedSVD, randomized_svd

__all__ = ["RandomizedSVD", "randomized_svd"]
