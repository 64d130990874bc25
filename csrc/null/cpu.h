// The CPU kernel of `null`: its function for one tensor, which each instruction set defines, and the tables it reads.
#pragma once
#include "../common/cpu/kernels.h"
#include "null.h"

#define NULL_SPACINGS 256                    // exponent fields
#define NULL_ROWS (NULL_SPACINGS + 8)        // octaves of a window and of those around it, at most
#define NULL_WIDTH (NULL_ROWS * 128)
#define NULL_ERF_NODES (13 * 32 + 1)         // of a table of erf, 1/64 apart, up to 6.5
#define NULL_ERF_TERMS 7
#define NULL_SIZE_STEPS 512                  // per octave of sizes, from 1/32 of the spacing to 2
#define NULL_SIZES (6 * NULL_SIZE_STEPS + 1)

// Functions of a normal update, filled once.
struct NormalTables {
  double erf[NULL_ERF_NODES][NULL_ERF_TERMS];  // Taylor coefficients at each node
  double log_energy[2][NULL_SIZES];            // log2 E[k^2] by log2 of the standard deviation; [uniform]
};

struct NullTensor {
  const opd_i64* bin_bits;                   // ascending
  const opd_i64 *base, *delta;               // coordinates whose |W|, |visible delta| is in the bin
  opd_i64 bins;
  bool uniform;
};
struct NullOptions {
  const double* ratios;                      // sizes of near-zero masks
  const double* fractions;                   // of the coordinates, for the top energy
  const opd_i64* limits;                     // bf16 bits
  int n_ratios, n_fractions, n_limits;
};
// Outputs for one tensor, as for `opd_null`; `expected` and `visible` may be null.
struct NullOutputs {
  double *fits, *near_zero, *top_energy, *below, *expected;
  double* visible;                           // [NULL_NUM_KINDS], `visible_stride` apart
  opd_i64 visible_stride;
  opd_i64* chosen;
};

struct NullKernels {
  size_t scratch_bytes;                      // of one thread
  void (*fit)(const NullTensor& tensor, const NullOptions& options, const NormalTables& tables, void* scratch,
              const NullOutputs& outputs);
};
OPD_DECLARE_KERNELS(NullKernels, null_kernels)

// Fits the nulls of each tensor; tensors, outputs: [count].
void fit_nulls(const NullTensor* tensors, int64_t count, const NullOptions& options, int threads,
               const NullOutputs* outputs);
