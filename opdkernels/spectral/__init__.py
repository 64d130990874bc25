"""Spectra of a pair of matrices: exact, from Gram matrices (exact.py), and randomized, of the top alone (randomized.py)."""

from opdkernels.spectral.randomized import RandomizedSVD, randomized_svd

__all__ = ["RandomizedSVD", "randomized_svd"]
