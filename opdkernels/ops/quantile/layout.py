"""Layout of the outputs and tables of `quantile`, written once for Python and Triton.

csrc/quantile/quantile.h repeats it for C++ and CUDA; tests/ops/test_layout.py compares.
"""

from __future__ import annotations

# Columns of `counts`, int64 [K, NUM_COUNTS].
COUNT_ABOVE, COUNT_TIED, COUNT_ABOVE_MASKED, COUNT_TIED_MASKED, COUNT_NAN = range(5)
NUM_COUNTS = 5

DIGIT_BITS = 16  # of a magnitude, that a pass on a GPU counts
DIGITS = 1 << DIGIT_BITS
SMEM_DIGITS = 1 << 14  # of a table in shared memory: the first digit of every magnitude below 2, for any dtype
SMEM_DIGIT_BYTES = 4 * SMEM_DIGITS
