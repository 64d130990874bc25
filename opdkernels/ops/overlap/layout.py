"""Layout of the outputs and tables of `overlap`, written once for Python and Triton.

csrc/overlap/overlap.h repeats it for C++ and CUDA; tests/ops/test_layout.py compares.
"""

from __future__ import annotations

MAX_RUNS = 16
GROUP = 4  # runs that share a joint table
GROUP_SETS = 1 << GROUP  # sets of runs of one group

# Elements of `counts`, int64 [NUM_COUNTS].
COUNT_NUMEL, COUNT_NONFINITE = range(2)
NUM_COUNTS = 2
