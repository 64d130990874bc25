// The table of CPU kernels: one instance per instruction set, chosen at run time.
#pragma once
#include "../delta.h"

// What one thread counts. 32-bit counters stay in cache; a thread sees fewer than 2^31 coordinates before a fold.
struct DeltaWork {
  opd_u32 source[65536];                              // by the full 16-bit pattern of w: no masking in the hot loop
  opd_u32 delta[OPD_BINS];
  opd_u32 changed[(OPD_MAX_CUTS + 2) * OPD_BINS];     // by class; class 0 collects what differs in bits but not in value
  opd_u32 trained[OPD_BINS + 1];                      // the last bin likewise
  opd_u32 moved[OPD_BINS];
  opd_u32 stored[OPD_BINS];                           // bfloat16 pairs: signed corrections to `delta`
  opd_u32 ulp[4][64];                                 // four copies: neighbours rarely wait for each other's store
  opd_i64 lt[OPD_THRESHOLDS], le[OPD_THRESHOLDS];     // bfloat16 pairs: signed corrections
  opd_i64 sums[4][OPD_SUM_LIMBS];                     // w^2, w'^2, delta^2, |delta|; bfloat16 pairs: corrections to the last two
  opd_i64 nonfinite, bit_equal, eta_unchanged;
  double max_delta;
};

struct DeltaOptions {
  opd_u32 cuts[OPD_MAX_CUTS];                         // unused ones are 0x7FFF, which nothing exceeds
  int n_cuts;
  double thresholds[OPD_THRESHOLDS];
};

enum Dtype { BF16 = 0, FP16 = 1, FP32 = 2, FP64 = 3 };

struct Kernels {
  // Counts coordinates [0, n) of a pair; mask, if given, receives one bit a coordinate, set where the visible delta exceeds cuts[0].
  void (*delta)(const void* source, int source_dtype, const void* trained, int trained_dtype, opd_i64 n,
                const DeltaOptions* options, DeltaWork* work, unsigned char* mask);
};

const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
