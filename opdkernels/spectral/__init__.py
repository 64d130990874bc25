"""Spectra of a pair of matrices: exact, from Gram matrices (exact.py), and randomized, of the top alone (randomized.py)."""
