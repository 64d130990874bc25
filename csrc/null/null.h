// The arithmetic of `null` for one value: rounding, expected squares of visible deltas, the spacing at a weight.
// opdkernels/ops/null/layout.py repeats the layout (tests/ops/test_layout.py compares).
#pragma once
#include "../common/numeric.h"

enum NullKind { NULL_KIND_SIGN, NULL_KIND_NORMAL, NULL_KIND_EMPIRICAL, NULL_NUM_KINDS };
// Columns of `fits`, double [tensors][NULL_NUM_KINDS][NULL_NUM_FITS].
enum NullFit { NULL_FIT_SIZE, NULL_FIT_DISTANCE, NULL_FIT_CHANGED, NULL_FIT_CHANGED_SD, NULL_FIT_UNCHANGED,
               NULL_NUM_FITS };

#define NULL_LOWEST_ROW (-6)        // spacing of the subnormals, 2^-133, as an exponent field
#define NULL_MAX_ROWS 40            // octaves of the empirical update, from the largest down
#define NULL_DENSITY_BINS 8         // per octave, for the density of the empirical update
#define NULL_MIN_EXPOSURE 256       // coordinates that could have shown an update of a bin's size
#define NULL_MIN_COUNT 256          // least number of visible updates from which the density is estimated
#define NULL_MIN_MOVED 0.8          // fraction of small weights that must have moved; with fewer, the update is a mask
#define NULL_ROOT_TWO_OVER_PI 0.79788456080286535588

// The magnitude with these bf16 bits.
OPD_FN double bits_magnitude(opd_i64 bits) { return bits_float((opd_u32)bits << 16); }

// Exponent field that determines the spacing at bf16 bits: 2^(it - 134). Subnormals have that of exponent 1.
OPD_FN int spacing_exponent(opd_i64 bits) { return bits >> 7 ? (int)(bits >> 7) : 1; }

// The fraction of a bin's coordinates for which the spacing is half as wide (opdkernels/ops/null/histograms.py).
OPD_FN double half_spacing(opd_i64 bits, bool uniform) {
  return (bits & 127) == 0 && bits >= 256 ? (uniform ? 1.0 / 3 : 0.5) : 0.0;
}

// Octave of x > 0, as an exponent field that may be 0 or less.
OPD_FN int octave(double x) {
  int exponent;
  __builtin_frexp(x, &exponent);
  return exponent + 126;
}

// A magnitude rounded to bf16, nearest even; larger values become the largest finite one.
OPD_FN double round_magnitude(double x) {
  if (x < 0x1p-126) return __builtin_rint(x * 0x1p133) * 0x1p-133;
  const opd_u64 bits = double_bits(x);
  const double rounded = bits_double((bits + ((1ull << 44) - 1) + (bits >> 45 & 1)) & ~0ull << 45);
  const double largest = bits_magnitude(OPD_INFINITY_BITS - 1);
  return rounded < largest ? rounded : largest;
}

// E[k^2], in squares of the spacing, for an update of x spacings.
OPD_FN double rounded_square(double x, bool uniform) {
  const double floor = __builtin_floor(uniform ? x : x + 0.5);
  return floor * floor + (uniform ? (2 * floor + 1) * (x - floor) : 0.0);
}
// The same on a grid with the steps from j spacings below a power of two that are longer than j: beyond it the spacing
// is double. One weight of 128 for each j, on half of the signs.
OPD_FN double rounded_square_with_carry(double x) {
  double square = rounded_square(x, false), carried = 0;
  if (x < 1 || x >= 16) return square;  // beyond, jumps are small and average out
  for (int below = 1; below <= 16 && x >= below; below++) {
    const double steps = below + 2 * __builtin_floor((x - below) / 2 + 0.5);
    carried += steps * steps - square;
  }
  return square + carried / 256;
}
// Integral of `rounded_square` from 0 to x.
OPD_FN double rounded_square_integral(double x, bool uniform) {
  const double floor = __builtin_floor(uniform ? x : x + 0.5);
  if (!uniform)
    return (floor - 1) * floor * (2 * floor - 1) / 6 + floor * floor * (floor > 0 ? x - (floor - 0.5) : 0.0);
  const double part = x - floor, steps = (floor - 1) * floor * (2 * floor - 1) / 6 + floor * floor / 2;
  return steps + floor * floor * part + (floor + 0.5) * part * part;
}
