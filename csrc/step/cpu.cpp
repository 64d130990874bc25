// `step` over the blocks of all tensors, taken by the threads dynamically. One thread processes a block, so results are
// bit-identical for any number of threads.
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/cpu/boundary.h"
#include "../common/cpu/parallel.h"
#include "cpu.h"

namespace {
bool misaligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes != 0; }

// What is wrong with a row, or null. Python validates the tensors; this refuses what a kernel cannot serve, whoever
// built the table.
const char* row_error(const StepRow& t, const StepOptions& o, int64_t num_scalar_rows) {
  const opd_u32 known = STEP_PARAM_BF16 | STEP_GRAD_BF16 | STEP_GRAD_COMPACT | STEP_MASK_INDICES | STEP_MASK_INDICES_64 |
                        STEP_HAS_INIT_VALUE | STEP_HAS_STEP_GROUP | STEP_HAS_MAX_EXP_AVG_SQ | STEP_HAS_CHANGED;
  const bool indices = t.flags & STEP_MASK_INDICES, is_bf16 = t.flags & STEP_PARAM_BF16;
  const bool is_step = o.kind == STEP_ADAMW || o.kind == STEP_SGD;
  if (t.flags & ~known || (t.flags & STEP_MASK_INDICES_64 && !indices)) return "unknown flags";
  if (t.size < 0 || t.numel < t.size || (!indices && t.numel != t.size)) return "sizes that do not fit";
  if (!t.size) return nullptr;
  if (!t.param || !t.mask || (!indices && !t.block_counts)) return "a null pointer";
  const size_t param_bytes = is_bf16 ? 2 : 4, index_bytes = t.flags & STEP_MASK_INDICES_64 ? 8 : 4;
  if (misaligned(t.param, param_bytes) || misaligned(t.init_value, param_bytes) ||
      misaligned(t.grad, t.flags & STEP_GRAD_BF16 ? 2 : 4) || misaligned(t.mask, indices ? index_bytes : 1) ||
      misaligned(t.block_counts, 8) || misaligned(t.exp_avg, 4) || misaligned(t.exp_avg_sq, 4) ||
      misaligned(t.max_exp_avg_sq, 4) || misaligned(t.residual, 2))
    return "a misaligned pointer";
  if (!indices && t.block_counts[(t.size + OPD_STEP_BLOCK - 1) / OPD_STEP_BLOCK] == 0) return nullptr;
  const bool has_residual = is_bf16 && (o.precision == STEP_SPLIT_MASTER || o.precision == STEP_KAHAN);
  if (!t.grad || (o.kind != STEP_SGD && !t.exp_avg) || (o.kind == STEP_ADAMW && !t.exp_avg_sq) ||
      (is_step && has_residual && !t.residual) || !(t.flags & STEP_HAS_INIT_VALUE) != !t.init_value ||
      !(t.flags & STEP_HAS_STEP_GROUP) != !t.step_group || !(t.flags & STEP_HAS_MAX_EXP_AVG_SQ) != !t.max_exp_avg_sq ||
      !(t.flags & STEP_HAS_CHANGED) != !t.changed)
    return "a null pointer, or one that its flags do not announce";
  if (is_step && (t.scalar_row < 0 || t.scalar_row >= num_scalar_rows)) return "no row of scalars";
  return nullptr;
}
}  // namespace

void masked_step(const StepRow* rows, int64_t count, int64_t row_bytes, const StepOptions& options,
                 int64_t num_scalar_rows, int threads) {
  if (row_bytes != (int64_t)sizeof(StepRow))
    throw std::invalid_argument("the compiled extension is of another version of opdkernels; build it again");
  if (count < 0 || options.kind < STEP_ADAMW || options.kind > STEP_SCATTER || options.precision < STEP_NEAREST ||
      options.precision > STEP_STOCHASTIC)
    throw std::invalid_argument("masked_step: unknown kind, precision or number of tensors");
  const StepKernels& kernels = OPD_KERNELS(step_kernels);
  std::vector<int64_t> first(count + 1, 0);
  int64_t active = 0;
  for (int64_t i = 0; i < count; i++) {
    const StepRow& t = rows[i];
    if (const char* error = row_error(t, options, num_scalar_rows))
      throw std::invalid_argument("masked_step: tensor " + std::to_string(i) + " has " + error);
    const int64_t blocks = (t.size + OPD_STEP_BLOCK - 1) / OPD_STEP_BLOCK;
    first[i + 1] = first[i] + blocks;
    active += t.flags & STEP_MASK_INDICES || !t.size ? t.size : t.block_counts[blocks];
  }
  // Ranges of complete blocks; the tensor of a block is looked up once per range.
  const int64_t coordinates = first.back() * OPD_STEP_BLOCK;
  const int workers = active < SERIAL_BELOW ? 1 : threads;
  const auto for_blocks = [&](auto body) {
    parallel_ranges(coordinates, workers, OPD_STEP_BLOCK, [&](int, int64_t start, int64_t stop) {
      size_t i = 0;
      for (int64_t block = start / OPD_STEP_BLOCK; block < stop / OPD_STEP_BLOCK; block++) {
        while (block >= first[i + 1]) i++;
        body((int64_t)i, block - first[i]);
      }
    });
  };
  // All masks are checked before any tensor changes: a mask may have changed in memory since Python read it.
  std::atomic<int64_t> inconsistent{-1};
  for_blocks([&](int64_t i, int64_t block) {
    if (!kernels.check(&rows[i], block, num_scalar_rows)) inconsistent = i;
  });
  if (inconsistent >= 0)
    throw std::invalid_argument("masked_step: the mask or the step groups of tensor " +
                                std::to_string(inconsistent.load()) + " changed after they were validated");
  for_blocks([&](int64_t i, int64_t block) { kernels.block(&rows[i], &options, block); });
}

// rows: [count] StepRow (opdkernels/ops/step/layout.py: STEP_ROW).
OPD_EXPORT int opd_masked_step(const StepRow* rows, int64_t count, int64_t row_bytes, const float* scalars,
                               int64_t num_scalar_rows, const float* grad_scale, const float* clip, int64_t maximize,
                               int64_t kind, int64_t nesterov, int64_t precision, int64_t seed, int64_t threads) {
  return guarded([&] {
    const StepOptions options{scalars, grad_scale, clip, maximize, precision, seed, nesterov, kind};
    masked_step(rows, count, row_bytes, options, num_scalar_rows, narrow(threads));
  });
}
