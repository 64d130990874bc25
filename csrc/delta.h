// The arithmetic of one coordinate of `delta`: what a bfloat16 deployment sees of w -> v.
#pragma once
#include "numeric.h"

#define OPD_BINS 32768       // magnitudes of bfloat16
#define OPD_MAX_CUTS 4
#define OPD_ULP_BINS 35      // "< -16", -16 .. 16, "> 16"
#define OPD_THRESHOLDS 5

// Magnitude pattern of bf16(w' - w) for two bfloat16 patterns.
OPD_FN opd_u32 visible_delta(opd_u16 w, opd_u16 v) {
  return float_to_bf16(bf16_to_float(v) - bf16_to_float(w)) & 0x7FFFu;
}

// The class of a coordinate: 0 unchanged, else 1 + how many cuts the visible delta exceeds.
OPD_FN opd_u32 change_class(opd_u32 magnitude, const opd_u32* cuts) {
  return (opd_u32)(magnitude > 0) + (opd_u32)(magnitude > cuts[0]) + (magnitude > cuts[1]) + (magnitude > cuts[2]) + (magnitude > cuts[3]);
}

// Patterns in the order of the values they stand for; +0 and -0 are both 0.
OPD_FN int ordered(opd_u16 b) { int magnitude = b & 0x7FFF; return b & 0x8000 ? -magnitude : magnitude; }

OPD_FN int ulp_bin(opd_u16 w, opd_u16 v) {
  int distance = ordered(v) - ordered(w) + OPD_ULP_BINS / 2;
  distance = distance < 0 ? 0 : distance;
  return distance >= OPD_ULP_BINS ? OPD_ULP_BINS - 1 : distance;
}

// A coordinate counts only when w, w' and their visible difference are finite.
OPD_FN int coordinate_finite(opd_u16 w, opd_u16 v) {
  return (w & 0x7FFFu) < 0x7F80u && (v & 0x7FFFu) < 0x7F80u && visible_delta(w, v) < 0x7F80u;
}
