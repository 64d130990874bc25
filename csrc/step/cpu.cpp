// `step` over the blocks of all tensors, taken by the threads dynamically. One thread processes a block, so results are
// bit-identical for any number of threads.
#include "../common/cpu/dispatch.h"
#include "../common/cpu/parallel.h"

void masked_step(const StepRow* rows, int64_t count, const StepOptions& options, int threads) {
  const Kernels& kernel = kernels();
  std::vector<int64_t> first(count + 1, 0);
  int64_t active = 0;
  for (int64_t i = 0; i < count; i++) {
    const StepRow& t = rows[i];
    const int64_t blocks = (t.size + OPD_STEP_BLOCK - 1) / OPD_STEP_BLOCK;
    first[i + 1] = first[i] + blocks;
    active += t.flags & STEP_MASK_INDICES ? t.size : t.block_counts[blocks];
  }
  // Ranges of complete blocks; the tensor of a block is looked up once per range.
  const int64_t coordinates = first.back() * OPD_STEP_BLOCK;
  const int workers = active < SERIAL_BELOW ? 1 : threads;
  parallel_ranges(coordinates, workers, OPD_STEP_BLOCK, [&](int, int64_t start, int64_t stop) {
    size_t i = 0;
    for (int64_t block = start / OPD_STEP_BLOCK; block < stop / OPD_STEP_BLOCK; block++) {
      while (block >= first[i + 1]) i++;
      kernel.step_block(&rows[i], &options, block - first[i]);
    }
  });
}
