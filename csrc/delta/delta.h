// The arithmetic of `delta` for one coordinate, what a bfloat16 deployment sees of w -> v, and the layout of its
// outputs. opdkernels/ops/delta/layout.py repeats the layout (tests/ops/test_layout.py compares).
#pragma once
#include "../common/numeric.h"

#define OPD_MAX_VISIBLE_THRESHOLDS 4  // bfloat16 bits that visible |delta| is compared with
#define OPD_STORED_THRESHOLDS 5       // values that stored |delta| is compared with
#define OPD_ULP_BINS 35               // "< -16", -16 .. 16, "> 16"
#define OPD_MANTISSAS 128             // bins of one exponent: their values share one scale
#define OPD_LIMITS (2 * OPD_STORED_THRESHOLDS)  // one for <, one for <=

// Rows of `tables`, int64 [HIST_BASE_OVER + thresholds][OPD_BINS].
enum DeltaTable { HIST_BASE, HIST_DELTA, HIST_TRAINED_CHANGED, HIST_BASE_CHANGED, HIST_DELTA_STORED, HIST_BASE_OVER };

// Elements of `counts`, int64 [NUM_COUNTS].
enum DeltaCount {
  COUNT_NUMEL, COUNT_NONFINITE, COUNT_BIT_EQUAL, COUNT_UNCHANGED_RTOL, COUNT_LT,
  COUNT_LE = COUNT_LT + OPD_STORED_THRESHOLDS, COUNT_ULP = COUNT_LE + OPD_STORED_THRESHOLDS,
  NUM_COUNTS = COUNT_ULP + OPD_ULP_BINS
};

// Rows of `sums`, int64 [NUM_SUMS][OPD_SUM_LIMBS].
enum DeltaSum { SUM_BASE_SQ, SUM_TRAINED_SQ, SUM_DELTA_SQ, SUM_DELTA_ABS, NUM_SUMS };

// Magnitude bits of bf16(w' - w), for the bits of two bfloat16 numbers.
OPD_FN opd_u32 visible_delta(opd_u16 w, opd_u16 v) {
  return float_to_bf16(bf16_to_float(v) - bf16_to_float(w)) & 0x7FFFu;
}

// The class of a coordinate: 0 unchanged, else 1 + the number of thresholds that the visible delta exceeds.
OPD_FN opd_u16 change_class(opd_u16 magnitude, const opd_u16* threshold_bits) {
  return (opd_u16)((opd_u16)(magnitude > 0) + (opd_u16)(magnitude > threshold_bits[0]) +
                   (opd_u16)(magnitude > threshold_bits[1]) + (opd_u16)(magnitude > threshold_bits[2]) +
                   (opd_u16)(magnitude > threshold_bits[3]));
}

// Bits mapped to the order of their values, +0 and -0 both to the middle; sixteen bits hold them.
OPD_FN opd_u16 ordered(opd_u16 b) {
  opd_u16 magnitude = (opd_u16)(b & 0x7FFF);
  return (opd_u16)(b & 0x8000 ? 0x8000 - magnitude : 0x8000 + magnitude);
}

// The bin of the signed distance in bfloat16 steps, clipped to the outer bins.
OPD_FN opd_u16 ulp_bin(opd_u16 w, opd_u16 v) {
  const opd_u16 reach = OPD_ULP_BINS / 2;
  opd_u16 from = ordered(w), to = ordered(v), larger = to > from ? to : from;
  opd_u16 up = (opd_u16)(larger - from), down = (opd_u16)(larger - to);
  return (opd_u16)(reach + (up < reach ? up : reach) - (down < reach ? down : reach));
}

// A coordinate is counted only if w, w' and their visible difference are finite.
OPD_FN int coordinate_finite(opd_u16 w, opd_u16 v) {
  return (w & 0x7FFFu) < OPD_INFINITY_BITS && (v & 0x7FFFu) < OPD_INFINITY_BITS &&
         visible_delta(w, v) < OPD_INFINITY_BITS;
}
