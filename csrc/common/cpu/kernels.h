// The table of CPU kernels: one instance per instruction set, chosen at run time.
#pragma once
#include "../../delta/delta.h"
#include "../../gram/gram.h"
#include "../../overlap/overlap.h"
#include "../../patch/patch.h"
#include "../../quantile/quantile.h"
#include "../../step/step.h"

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

#define OPD_GROUP_BINS (16 * OPD_BINS)                // a set of four runs above |w|

// What one thread counts. 32-bit counters as above.
struct OverlapWork {
  opd_u32 two[65536];                                 // two runs and |w| < 2: two change bits above 14 bits of |w|
  opd_u32 sets[65536];                                // more than four runs: by the set of runs that changed
  opd_u32* groups;                                    // [runs / 4, rounded up][16][OPD_BINS]
  opd_i64 nonfinite;
  bool groups_used;
};

#define OPD_QUANTILE_BITS 11
#define OPD_QUANTILE_BINS (1 << OPD_QUANTILE_BITS)
#define OPD_QUANTILE_GRAIN 1024

struct QuantileBracket {
  opd_u64 low, high;                                  // keys; low is even and high odd
  void* keys;                                         // receives the keys in [low, high], where these are more than one value
  opd_i64 capacity;                                   // of keys; 64 bytes beyond it are written too
  opd_i64 above, above_masked, inside, inside_masked; // above counts NaN as well; inside_masked only where low and high are one value
  int overflow;                                       // keys were left out: there was no room
};

// A matrix pair: strides in elements.
struct GramInput {
  const void *source, *trained;
  int source_dtype, trained_dtype;
  opd_i64 source_row, source_column, trained_row, trained_column;
};

enum Dtype { BF16 = 0, FP16 = 1, FP32 = 2, FP64 = 3 };

struct Kernels {
  // Counts coordinates [0, n) of a pair; mask, if given, receives one bit a coordinate, set where the visible delta exceeds cuts[0].
  void (*delta)(const void* source, int source_dtype, const void* trained, int trained_dtype, opd_i64 n,
                const DeltaOptions* options, DeltaWork* work, unsigned char* mask);
  // Counts coordinates [0, n) of a source and its runs.
  void (*overlap)(const void* source, int source_dtype, const void* const* trained, const int* trained_dtypes, int runs, opd_i64 n,
                  opd_u32 cut, OverlapWork* work);
  // One pass over fp32 or fp64: fills the brackets; nan[2] receives the NaN, and those of them in the mask.
  void (*quantile_scan)(const void* values, int dtype, const unsigned char* mask, opd_i64 n, int smallest, QuantileBracket* brackets,
                        int n_brackets, opd_i64* nan);
  // Adds the keys in [low, high] to bins of width 2^shift, the others to bins[OPD_QUANTILE_BINS].
  void (*quantile_narrow)(const void* values, int dtype, opd_i64 n, int smallest, opd_u64 low, opd_u64 high, int shift, opd_i64* bins);
  // Two-byte dtypes: counts by magnitude pattern, doubled, plus the mask bit. table: [65536].
  void (*quantile_table)(const opd_u16* values, const unsigned char* mask, opd_i64 n, opd_i64* table);
  // Packs up to OPD_GRAM_ROWS rows of one panel of columns of w and of its change, fp64 where wide, else fp32.
  void (*gram_pack)(const GramInput* input, int wide, int visible, int rows, opd_i64 n, int panel, void* w, void* d);
  // Adds one panel of columns of x^T y of packed rows, or of its upper triangle, to into [n][n]; `block` rows are summed before
  // they are in fp64.
  void (*gram_columns)(int wide, const void* x, const void* y, int upper, int rows, int block, opd_i64 n, int panel, double* into);
  int gram_panel_bytes;                               // of one row of a panel
  // Updates the active coordinates of one block of a tensor.
  void (*step_block)(const StepRow* row, const StepOptions* options, opd_i64 block);
  // One block of n coordinates of `bytes` bytes: receives its positions, what is stored of the changed and the digests of both
  // sides; values must have room for all n. Returns how many changed.
  int (*patch_gather)(const void* source, const void* trained, int bytes, int n, int difference, unsigned char* positions, void* values,
                      opd_u64* source_digest, opd_u64* trained_digest);
  // The block put together again, and its digest; `readable` values can be read. Returns 0 where the positions are not valid.
  int (*patch_scatter)(const void* source, int bytes, int n, int difference, int count, const unsigned char* positions,
                       const void* values, opd_i64 readable, void* out, opd_u64* digest);
  // Whether the positions of a block are valid.
  int (*patch_check)(const unsigned char* positions, int count, int n);
  // The digest of a block of so many bytes.
  void (*patch_digest)(const void* data, int bytes, opd_u64* digest);
};

const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
