// The CPU kernels of `gram`: their functions for one thread, which each instruction set defines, and for callers.
#pragma once
#include "../common/cpu/kernels.h"
#include "gram.h"

// A pair of matrices; strides in elements.
struct GramInput {
  const void *base, *trained;
  int base_dtype, trained_dtype;
  opd_i64 base_row, base_column, trained_row, trained_column;
};

struct GramKernels {
  // Packs up to OPD_GRAM_ROWS rows of one panel of columns of w and of delta, in fp64 or fp32.
  void (*pack)(const GramInput* input, int fp64, int visible, int rows, opd_i64 n, int panel, void* w, void* d);
  // Adds one panel of columns of x^T y of packed rows, or of its upper triangle, to out [n][n]; `block` rows are summed
  // in registers before they are added in fp64.
  void (*columns)(int fp64, const void* x, const void* y, int upper, int rows, int block, opd_i64 n, int panel,
                  double* out);
  int panel_bytes;  // per row of a panel
};
OPD_DECLARE_KERNELS(GramKernels, gram_kernels)

// Adds W^T W, W^T delta and delta^T delta of row blocks [rows][n], those whose GramPart bit is set in `parts`, to out
// [number of parts][n][n]; of the symmetric ones only the upper triangles. `block` rows of W^T delta are summed in fp32
// before they are added in fp64; 0: everything in fp64.
void gram(const GramInput& input, int64_t rows, int64_t n, int parts, bool visible, int block, int threads,
          double* out);
