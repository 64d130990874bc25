// The arithmetic of one coordinate of `delta`: what a bfloat16 deployment sees of w -> v.
#pragma once
#include "../common/numeric.h"

#define OPD_BINS 32768       // magnitudes of bfloat16
#define OPD_MAX_CUTS 4
#define OPD_ULP_BINS 35      // "< -16", -16 .. 16, "> 16"
#define OPD_THRESHOLDS 5

// Magnitude pattern of bf16(w' - w) for two bfloat16 patterns.
OPD_FN opd_u32 visible_delta(opd_u16 w, opd_u16 v) {
  return float_to_bf16(bf16_to_float(v) - bf16_to_float(w)) & 0x7FFFu;
}

// The class of a coordinate: 0 unchanged, else 1 + how many cuts the visible delta exceeds.
OPD_FN opd_u16 change_class(opd_u16 magnitude, const opd_u16* cuts) {
  return (opd_u16)((opd_u16)(magnitude > 0) + (opd_u16)(magnitude > cuts[0]) + (opd_u16)(magnitude > cuts[1]) +
                   (opd_u16)(magnitude > cuts[2]) + (opd_u16)(magnitude > cuts[3]));
}

// Patterns in the order of the values they stand for, +0 and -0 both in the middle; sixteen bits hold them.
OPD_FN opd_u16 ordered(opd_u16 b) {
  opd_u16 magnitude = (opd_u16)(b & 0x7FFF);
  return (opd_u16)(b & 0x8000 ? 0x8000 - magnitude : 0x8000 + magnitude);
}

// The signed distance in steps of bfloat16, clipped to the outer bins.
OPD_FN opd_u16 ulp_bin(opd_u16 w, opd_u16 v) {
  const opd_u16 reach = OPD_ULP_BINS / 2;
  opd_u16 from = ordered(w), to = ordered(v), larger = to > from ? to : from;
  opd_u16 up = (opd_u16)(larger - from), down = (opd_u16)(larger - to);
  return (opd_u16)(reach + (up < reach ? up : reach) - (down < reach ? down : reach));
}

// A coordinate counts only when w, w' and their visible difference are finite.
OPD_FN int coordinate_finite(opd_u16 w, opd_u16 v) {
  return (w & 0x7FFFu) < 0x7F80u && (v & 0x7FFFu) < 0x7F80u && visible_delta(w, v) < 0x7F80u;
}
