// The arithmetic of one coordinate of `gram`: what it takes of w and w' in each view.
#pragma once
#include "../common/numeric.h"

#define OPD_GRAM_ROWS 512    // rows packed at a time: the result is touched once for them
#define OPD_GRAM_BLOCK 256   // rows summed at a time in fp64

struct GramValue { float w, d; };
struct GramWide { double w, d; };

OPD_FN GramValue gram_stored(float w, float v) { GramValue x; x.w = w; x.d = v - w; return x; }
OPD_FN GramWide gram_stored(double w, double v) { GramWide x; x.w = w; x.d = v - w; return x; }
OPD_FN GramValue gram_visible(float w, float v) {
  GramValue x;
  x.w = bf16_to_float(float_to_bf16(w));
  x.d = bf16_to_float(float_to_bf16(bf16_to_float(float_to_bf16(v)) - x.w));
  return x;
}
