"""Layout of the outputs and kernel parameters of `delta`, written once for Python and Triton.

csrc/delta/delta.h repeats it for C++ and CUDA; tests/ops/test_layout.py compares.
"""

from __future__ import annotations

MAX_VISIBLE_THRESHOLDS = 4  # bf16 bits that visible |delta| is compared with
NUM_STORED_THRESHOLDS = 5  # values that stored |delta| is compared with
ULP_REACH = 16
ULP_BINS = 2 * ULP_REACH + 3  # signed distance in bf16 steps: "< -16", -16 .. 16, "> 16"
MANTISSAS = 128  # bins of one exponent: their values share one scale

# Rows of `tables`, int64 [HIST_BASE_OVER + len(threshold_bits), BINS].
HIST_BASE, HIST_DELTA, HIST_TRAINED_CHANGED, HIST_BASE_CHANGED, HIST_DELTA_STORED, HIST_BASE_OVER = range(6)
# A bin is in use if one of these rows counts in it; the others are subsets of HIST_BASE.
ROWS_OF_BINS = (HIST_BASE, HIST_DELTA, HIST_TRAINED_CHANGED, HIST_DELTA_STORED)

# Elements of `counts`, int64 [NUM_COUNTS]; LT and LE hold one element per stored threshold.
COUNT_NUMEL, COUNT_NONFINITE, COUNT_BIT_EQUAL, COUNT_UNCHANGED_RTOL, COUNT_LT = range(5)
COUNT_LE = COUNT_LT + NUM_STORED_THRESHOLDS
COUNT_ULP = COUNT_LE + NUM_STORED_THRESHOLDS
NUM_COUNTS = COUNT_ULP + ULP_BINS

# Rows of `sums`, int64 [NUM_SUMS, SUM_LIMBS].
SUM_BASE_SQ, SUM_TRAINED_SQ, SUM_DELTA_SQ, SUM_DELTA_ABS = range(4)
NUM_SUMS = 4

# Parameters of Triton's kernels (`kernel_params`): visible thresholds, limits of stored |delta| in ascending order, and
# for each limit the element of `counts` that it belongs to.
NUM_LIMITS = 2 * NUM_STORED_THRESHOLDS  # one for <, one for <=
PARAM_VISIBLE = 0
PARAM_LIMITS = PARAM_VISIBLE + MAX_VISIBLE_THRESHOLDS
PARAM_COUNTS = PARAM_LIMITS + NUM_LIMITS
NUM_PARAMS = PARAM_COUNTS + NUM_LIMITS
