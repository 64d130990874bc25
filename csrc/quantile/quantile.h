// The arithmetic of one value of `quantile`: its key, an unsigned integer in the order of magnitudes whose low bit is free
// for a mask bit. With `smallest` the order is reversed, so that the wanted values are on top in either case.
#pragma once
#include "../common/numeric.h"

#define OPD_TOP32 0xFF000000u                 // |infinity|, the largest key (or, reversed, zero); a NaN is above either way
#define OPD_TOP64 0xFFE0000000000000ull

OPD_FN opd_u32 magnitude_key(float x, int smallest) {
  opd_u32 doubled = float_bits(x) << 1;       // the sign falls out
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
