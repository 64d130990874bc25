// The arithmetic of one coordinate of `overlap`: which runs visibly changed it.
#pragma once
#include "../common/numeric.h"

#define OPD_MAX_RUNS 16

// |bf16(w') - bf16(w)| before it is rounded, as bits. Of magnitudes, the order of bits is the order of values.
OPD_FN opd_u32 difference_bits(opd_u16 w, opd_u16 v) {
  return float_bits(bf16_to_float(v) - bf16_to_float(w)) & 0x7FFFFFFFu;
}

// The least difference whose rounding exceeds `cut`: rounding is monotone, so one comparison replaces it. The midpoint
// above an even pattern rounds down to it, the midpoint above an odd one rounds away from it.
OPD_FN opd_u32 change_limit(opd_u32 cut) { return (cut << 16) + 0x8001u - (cut & 1u); }

// Inf or NaN on either side, or a difference that rounds to Inf: from the midpoint above the largest finite bfloat16 on.
OPD_FN int difference_finite(opd_u32 bits) { return bits < 0x7F7F8000u; }
