// The CPU kernels of `step`: their functions for one thread, which each instruction set defines, and for callers.
#pragma once
#include "../common/cpu/kernels.h"
#include "step.h"

struct StepKernels {
  // Updates the active coordinates of one block of a tensor.
  void (*block)(const StepRow* row, const StepOptions* options, opd_i64 block);
  // Whether the mask and the step groups of one block are consistent.
  int (*check)(const StepRow* row, opd_i64 block, opd_i64 num_scalar_rows);
};
OPD_DECLARE_KERNELS(StepKernels, step_kernels)

// One masked step of all tensors, or a gather or a scatter of theirs (options.kind). row_bytes is the size of a row for
// the caller. Throws std::invalid_argument for a table that no kernel can serve; nothing has changed then.
void masked_step(const StepRow* rows, int64_t count, int64_t row_bytes, const StepOptions& options,
                 int64_t num_scalar_rows, int threads);
