// The CPU kernels of `quantile`: their functions for one thread, which each instruction set defines, and for callers.
#pragma once
#include "../common/cpu/kernels.h"
#include "quantile.h"

#define OPD_QUANTILE_BITS 11
#define OPD_QUANTILE_BINS (1 << OPD_QUANTILE_BITS)
#define OPD_QUANTILE_GRAIN 1024

struct QuantileBracket {
  opd_u64 low, high;                          // keys; low is even and high odd
  void* keys;                                 // receives the keys in [low, high], if these are more than one value
  opd_i64 capacity;                           // of keys; 64 bytes beyond it are written too
  opd_i64 above, above_masked;                // keys above high; NaN included
  opd_i64 inside, inside_masked;              // keys in [low, high]; inside_masked only if these are one value
  int overflow;                               // keys were dropped: `keys` was full
};

struct QuantileKernels {
  // One pass over fp32 or fp64 values: fills the brackets; nan[2] receives the NaN, and those within the mask.
  void (*scan)(const void* values, int dtype, const unsigned char* mask, opd_i64 n, int smallest,
               QuantileBracket* brackets, int n_brackets, opd_i64* nan);
  // Adds the keys in [low, high] to bins of width 2^shift, the others to bins[OPD_QUANTILE_BINS].
  void (*narrow)(const void* values, int dtype, opd_i64 n, int smallest, opd_u64 low, opd_u64 high, int shift,
                 opd_i64* bins);
  // Two-byte dtypes: counts by twice the magnitude bits plus the mask bit. table: [65536].
  void (*table)(const opd_u16* values, const unsigned char* mask, opd_i64 n, opd_i64* table);
};
OPD_DECLARE_KERNELS(QuantileKernels, quantile_kernels)

struct QuantileResult {
  double threshold;                                   // NaN if every value is
  int64_t above, tied, above_masked, tied_masked, nan;
};
// The k-th largest or smallest magnitude for each k, and the counts of values beyond it and tied with it. values: [n];
// k, results: [num_k]; mask: [(n + 7) / 8] or null.
void quantile(const void* values, int dtype, int64_t n, const int64_t* k, int num_k, bool largest,
              const unsigned char* mask, int threads, QuantileResult* results);
