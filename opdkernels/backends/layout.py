"""Constants that the Python, Triton, C++ and CUDA code of more than one kernel family share, written once.

The C headers repeat them; tests/ops/test_layout.py compares. What only one family uses is in
`opdkernels/ops/<family>/layout.py`.
"""

from __future__ import annotations

import torch

# csrc/common/numeric.h
DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
BINS = 1 << 15  # magnitudes of bfloat16: bins of a histogram
INFINITY_BITS = 0x7F80  # magnitude bits of bf16 infinity; NaN is above, every finite magnitude below
SUM_LIMBS = 44  # of an exact sum: signed int64 limbs of radix 2^32 ...
SUM_SHIFT = 1074  # ... in units of 2^-1074, the smallest subnormal double

# csrc/common/cuda/grid.h
WARP = 32  # threads
SMEM_HEADER_BYTES = 35 << 10  # of a block's shared memory, before the tables
SMEM_BINS = 1 << 12  # bins of a histogram that a table in shared memory holds: magnitudes from 2^-31 to below 2
SMEM_TABLE_BYTES = 4 * SMEM_BINS

# csrc/common/cuda/active.h
QUEUE_SIZE = 2048  # coordinates that a warp queues at a time: a block of a mask
QUEUE_BLOCKS_PER_SM = 4
