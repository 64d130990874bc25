// The CPU kernels of `delta`: their functions for one thread, which each instruction set defines, and for callers.
#pragma once
#include "../common/cpu/kernels.h"
#include "delta.h"

#define OPD_STEPS 7                            // bfloat16 steps from w to v, up or down, that a table counts
#define OPD_MORE_STEPS (2 * OPD_STEPS + 1)     // its row of coordinates with more steps; they are also counted alone
#define OPD_EQUAL_BITS (OPD_MORE_STEPS + 1)    // its row of those that are equal in all bits, in wider pairs
#define OPD_STEP_ROWS (OPD_EQUAL_BITS + 1)

// The counts of one thread. 32-bit counters stay in cache; a thread counts fewer than 2^31 coordinates before a fold.
struct DeltaWork {
  opd_u32 hist_base[65536];                   // by all 16 bits of w: no masking in the hot loop
  opd_u32 hist_delta[OPD_BINS];               // visible |delta|
  // [class][|w|], by `change_class`; class 0 collects what differs in bits but not in value.
  opd_u32 hist_base_by_class[(OPD_MAX_VISIBLE_THRESHOLDS + 2) * OPD_BINS];
  opd_u32 hist_trained_changed[OPD_BINS + 1]; // the last bin collects what differs in bits but not in value
  opd_u32 hist_base_changed[OPD_BINS];        // stored view
  opd_u32 hist_delta_stored[OPD_BINS];        // bfloat16 pairs: signed corrections to `hist_delta`
  opd_u32 ulp[4][64];                         // four copies: adjacent coordinates rarely wait for each other's store
  opd_i64 lt[OPD_STORED_THRESHOLDS], le[OPD_STORED_THRESHOLDS];  // bfloat16 pairs: signed corrections
  opd_i64 sums[NUM_SUMS][OPD_SUM_LIMBS];      // bfloat16 pairs: corrections to the last two
  opd_i64 nonfinite, bit_equal, unchanged_rtol;
  double max_delta;

  // What csrc/delta/steps.inl counts.
  opd_u32 by_step[OPD_STEP_ROWS][65536];  // [steps + OPD_STEPS][all 16 bits of w]
  opd_u32 hist_delta_blocks[OPD_BINS];    // wider pairs: stored |delta|; its counts below thresholds follow from it
  opd_i64 signs_of_zero;                  // +0 against -0 among OPD_MORE_STEPS: these do not differ in value
  int smallest = OPD_BINS, largest = -1;  // the bins of |w| in use in `by_step`, besides bin 0; none: largest is -1
};

struct DeltaOptions {
  opd_u32 threshold_bits[OPD_MAX_VISIBLE_THRESHOLDS];  // unused ones are 0x7FFF, which nothing exceeds
  int n_thresholds;
  double thresholds[OPD_STORED_THRESHOLDS];
};

struct DeltaKernels {
  // Counts coordinates [0, n) of a pair. mask, if not null, receives one bit per coordinate, set where the visible
  // delta exceeds threshold_bits[0].
  void (*count)(const void* base, int base_dtype, const void* trained, int trained_dtype, opd_i64 n,
                const DeltaOptions* options, DeltaWork* work, unsigned char* mask);
};
OPD_DECLARE_KERNELS(DeltaKernels, delta_kernels)

// Adds the counts of a pair to the outputs. base, trained: [n]; tables: int64 [HIST_BASE_OVER +
// n_thresholds][OPD_BINS]; counts: int64 [NUM_COUNTS]; sums: int64 [NUM_SUMS][OPD_SUM_LIMBS]; maximum: [1]; mask: [(n +
// 7) / 8], overwritten, or null.
void delta(const void* base, int base_dtype, const void* trained, int trained_dtype, int64_t n,
           const DeltaOptions& options, int threads, int64_t* tables, int64_t* counts, int64_t* sums, double* maximum,
           unsigned char* mask);
