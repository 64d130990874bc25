// The CPU kernels of `overlap`: their functions for one thread, which each instruction set defines, and for callers.
#pragma once
#include "../common/cpu/kernels.h"
#include "overlap.h"

#define OPD_GROUP_BINS (OPD_GROUP_SETS * OPD_BINS)  // of a joint table: the set of four runs above |w|

// The counts of one thread. A thread counts fewer than 2^31 coordinates before a fold.
struct OverlapWork {
  opd_u32 two[65536];                         // two runs and |w| < 2: two change bits above 14 bits of |w|
  opd_u32 sets[65536];                        // more than four runs: by the set of runs that changed
  opd_u32* groups;                            // [runs / 4, rounded up][OPD_GROUP_SETS][OPD_BINS]
  opd_i64 nonfinite;
  bool groups_used;
};

struct OverlapKernels {
  // Counts coordinates [0, n) of a base and its runs; trained and trained_dtypes: [runs].
  void (*count)(const void* base, int base_dtype, const void* const* trained, const int* trained_dtypes, int runs,
                opd_i64 n, opd_u32 threshold_bits, OverlapWork* work);
};
OPD_DECLARE_KERNELS(OverlapKernels, overlap_kernels)

// Adds the counts of a base and its runs to the outputs, int64: hist_base [OPD_BINS], hist_changed [runs][OPD_BINS],
// both [runs][runs], hist_num_runs [runs + 1] (coordinates that exactly j runs changed), counts [OVERLAP_NUM_COUNTS].
void overlap(const void* base, int base_dtype, const void* const* trained, const int* trained_dtypes, int runs,
             int64_t n, int threshold_bits, int threads, int64_t* hist_base, int64_t* hist_changed, int64_t* both,
             int64_t* hist_num_runs, int64_t* counts);
