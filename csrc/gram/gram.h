// The arithmetic of `gram` for one coordinate: w and delta of each view. opdkernels/ops/gram/layout.py repeats the
// constants (tests/ops/test_layout.py compares).
#pragma once
#include "../common/numeric.h"

#define OPD_GRAM_ROWS 512   // rows packed at a time: the result is read and written once per so many
#define OPD_GRAM_BLOCK 256  // rows summed in registers at a time in fp64, at most so many in fp32

// Bits of `parts`: W^T W, W^T delta, delta^T delta.
enum GramPart { GRAM_PART_BASE = 1, GRAM_PART_CROSS = 2, GRAM_PART_DELTA = 4 };

struct GramValue { float w, d; };
struct GramValue64 { double w, d; };

OPD_FN GramValue gram_stored(float w, float v) { GramValue x; x.w = w; x.d = v - w; return x; }
OPD_FN GramValue64 gram_stored(double w, double v) { GramValue64 x; x.w = w; x.d = v - w; return x; }
OPD_FN GramValue gram_visible(float w, float v) {
  GramValue x;
  x.w = bf16_to_float(float_to_bf16(w));
  x.d = bf16_to_float(float_to_bf16(bf16_to_float(float_to_bf16(v)) - x.w));
  return x;
}
