// The arithmetic of `overlap` for one coordinate, which runs visibly changed it, and the layout of its outputs.
// opdkernels/ops/overlap/layout.py repeats the layout (tests/ops/test_layout.py compares).
#pragma once
#include "../common/numeric.h"

#define OPD_MAX_RUNS 16
#define OPD_GROUP 4                      // runs that share a joint table
#define OPD_GROUP_SETS (1 << OPD_GROUP)  // sets of runs of one group

// Elements of `counts`, int64 [2].
enum OverlapCount { OVERLAP_COUNT_NUMEL, OVERLAP_COUNT_NONFINITE, OVERLAP_NUM_COUNTS };

// |bf16(w') - bf16(w)| before it is rounded, as bits. The order of the bits of magnitudes is the order of their values.
OPD_FN opd_u32 difference_bits(opd_u16 w, opd_u16 v) {
  return float_bits(bf16_to_float(v) - bf16_to_float(w)) & 0x7FFFFFFFu;
}

// The least difference whose rounding exceeds a threshold: rounding is monotone, so one comparison replaces it. The
// midpoint above even bits rounds down to them, the midpoint above odd bits rounds away from them.
OPD_FN opd_u32 change_limit(opd_u32 threshold_bits) { return (threshold_bits << 16) + 0x8001u - (threshold_bits & 1u); }

// False for Inf or NaN on either side and for a difference that rounds to Inf, from the midpoint above the largest
// finite bfloat16 on.
OPD_FN int difference_finite(opd_u32 bits) { return bits < 0x7F7F8000u; }
