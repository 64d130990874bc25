"""Arguments of `gram`, written once for Python and Triton.

csrc/gram/gram.h repeats them for C++; tests/ops/test_layout.py compares.
"""

from __future__ import annotations

# Bits of the operator's `parts`: W^T W, W^T delta, delta^T delta.
PART_BASE, PART_CROSS, PART_DELTA = 1, 2, 4
MAX_BLOCK = 256  # rows summed in fp32
