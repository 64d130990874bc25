"""Layout of the outputs of `null`.

csrc/null/null.h repeats it for C++; tests/ops/test_layout.py compares.
"""

from __future__ import annotations

KINDS = ("sign", "normal", "empirical")
NUM_KINDS = 3

# Columns of `fits`, float64 [tensors, NUM_KINDS, NUM_FITS].
FIT_SIZE, FIT_DISTANCE, FIT_CHANGED, FIT_CHANGED_SD, FIT_UNCHANGED = range(5)
NUM_FITS = 5
