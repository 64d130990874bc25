// The arithmetic of `quantile` for one value: its key, an unsigned integer in the order of magnitudes whose low bit is
// free for a mask bit. With `smallest` the order is reversed, so that the top k keys are the chosen values in either
// case. opdkernels/ops/quantile/layout.py repeats the layout (tests/ops/test_layout.py compares).
#pragma once
#include "../common/numeric.h"

#define OPD_DIGIT_BITS 16  // of a magnitude, that a pass on a GPU counts
#define OPD_DIGITS 65536
// Of a table in shared memory, 64 KiB: the first digit of every magnitude below 2, for any dtype.
#define OPD_SMEM_DIGITS 16384

// Columns of `counts`, int64 [K][QUANTILE_NUM_COUNTS].
enum QuantileCount {
  QUANTILE_COUNT_ABOVE, QUANTILE_COUNT_TIED, QUANTILE_COUNT_ABOVE_MASKED, QUANTILE_COUNT_TIED_MASKED,
  QUANTILE_COUNT_NAN, QUANTILE_NUM_COUNTS
};

// The key of |infinity|, the largest (or, reversed, of zero); a NaN is above either way.
#define OPD_TOP32 0xFF000000u
#define OPD_TOP64 0xFFE0000000000000ull

OPD_FN opd_u32 magnitude_key(float x, int smallest) {
  opd_u32 doubled = float_bits(x) << 1;       // drops the sign
  return smallest ? OPD_TOP32 - doubled : doubled;
}
OPD_FN opd_u64 magnitude_key(double x, int smallest) {
  opd_u64 doubled = double_bits(x) << 1;
  return smallest ? OPD_TOP64 - doubled : doubled;
}

OPD_FN double key_magnitude(opd_u32 key, int smallest) {
  opd_u32 doubled = smallest ? OPD_TOP32 - (key & ~1u) : key & ~1u;
  return bits_float(doubled >> 1);
}
OPD_FN double key_magnitude(opd_u64 key, int smallest) {
  opd_u64 doubled = smallest ? OPD_TOP64 - (key & ~1ull) : key & ~1ull;
  return bits_double(doubled >> 1);
}
