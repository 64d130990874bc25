// The table of CPU kernels, one instance per instruction set, chosen at run time, and the structures they work on.
#pragma once
#include "../../delta/delta.h"
#include "../../gram/gram.h"
#include "../../overlap/overlap.h"
#include "../../patch/patch.h"
#include "../../quantile/quantile.h"
#include "../../step/step.h"

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
};

struct DeltaOptions {
  opd_u32 threshold_bits[OPD_MAX_VISIBLE_THRESHOLDS];  // unused ones are 0x7FFF, which nothing exceeds
  int n_thresholds;
  double thresholds[OPD_STORED_THRESHOLDS];
};

#define OPD_GROUP_BINS (OPD_GROUP_SETS * OPD_BINS)  // of a joint table: the set of four runs above |w|

// The counts of one thread. 32-bit counters as above.
struct OverlapWork {
  opd_u32 two[65536];                         // two runs and |w| < 2: two change bits above 14 bits of |w|
  opd_u32 sets[65536];                        // more than four runs: by the set of runs that changed
  opd_u32* groups;                            // [runs / 4, rounded up][OPD_GROUP_SETS][OPD_BINS]
  opd_i64 nonfinite;
  bool groups_used;
};

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

// A pair of matrices; strides in elements.
struct GramInput {
  const void *base, *trained;
  int base_dtype, trained_dtype;
  opd_i64 base_row, base_column, trained_row, trained_column;
};

struct Kernels {
  // Counts coordinates [0, n) of a pair. mask, if not null, receives one bit per coordinate, set where the visible
  // delta exceeds threshold_bits[0].
  void (*delta)(const void* base, int base_dtype, const void* trained, int trained_dtype, opd_i64 n,
                const DeltaOptions* options, DeltaWork* work, unsigned char* mask);
  // Counts coordinates [0, n) of a base and its runs; trained and trained_dtypes: [runs].
  void (*overlap)(const void* base, int base_dtype, const void* const* trained, const int* trained_dtypes, int runs,
                  opd_i64 n, opd_u32 threshold_bits, OverlapWork* work);
  // One pass over fp32 or fp64 values: fills the brackets; nan[2] receives the NaN, and those within the mask.
  void (*quantile_scan)(const void* values, int dtype, const unsigned char* mask, opd_i64 n, int smallest,
                        QuantileBracket* brackets, int n_brackets, opd_i64* nan);
  // Adds the keys in [low, high] to bins of width 2^shift, the others to bins[OPD_QUANTILE_BINS].
  void (*quantile_narrow)(const void* values, int dtype, opd_i64 n, int smallest, opd_u64 low, opd_u64 high, int shift,
                          opd_i64* bins);
  // Two-byte dtypes: counts by twice the magnitude bits plus the mask bit. table: [65536].
  void (*quantile_table)(const opd_u16* values, const unsigned char* mask, opd_i64 n, opd_i64* table);
  // Packs up to OPD_GRAM_ROWS rows of one panel of columns of w and of delta, in fp64 or fp32.
  void (*gram_pack)(const GramInput* input, int fp64, int visible, int rows, opd_i64 n, int panel, void* w, void* d);
  // Adds one panel of columns of x^T y of packed rows, or of its upper triangle, to out [n][n]; `block` rows are summed
  // in registers before they are added in fp64.
  void (*gram_columns)(int fp64, const void* x, const void* y, int upper, int rows, int block, opd_i64 n, int panel,
                       double* out);
  int gram_panel_bytes;                       // per row of a panel
  // Updates the active coordinates of one block of a tensor.
  void (*step_block)(const StepRow* row, const StepOptions* options, opd_i64 block);
  // Whether the mask and the step groups of one block are consistent.
  int (*step_check)(const StepRow* row, opd_i64 block, opd_i64 num_scalar_rows);
  // Gathers one block of n coordinates of `bytes` bytes: its positions, stored values and the digests of base and
  // trained; values must have a capacity of n. Returns the number of changed coordinates.
  int (*patch_gather)(const void* base, const void* trained, int bytes, int n, int difference, unsigned char* positions,
                      void* values, opd_u64* base_digest, opd_u64* trained_digest);
  // Restores one block and computes its digest; `readable` values can be read. Returns 0 if the positions are invalid.
  int (*patch_scatter)(const void* base, int bytes, int n, int difference, int count, const unsigned char* positions,
                       const void* values, opd_i64 readable, void* out, opd_u64* digest);
  // Whether the positions of a block are valid.
  int (*patch_check)(const unsigned char* positions, int count, int n);
  // The digest of a block of so many bytes.
  void (*patch_digest)(const void* data, int bytes, opd_u64* digest);
};

const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
