// `step` over the blocks of all tensors, shared by the threads as they come: every block is one thread's, so threads change nothing.
#include "../common/cpu/dispatch.h"
#include "../common/cpu/parallel.h"

void masked_step(const std::vector<StepTensor>& tensors, int threads) {
  const Kernels& kernel = kernels();
  std::vector<int64_t> first(tensors.size() + 1, 0);
  int64_t active = 0;
  for (size_t i = 0; i < tensors.size(); i++) {
    const StepTensor& t = tensors[i];
    first[i + 1] = first[i] + ((t.bits ? t.n : t.active) + OPD_STEP_BLOCK - 1) / OPD_STEP_BLOCK;
    active += t.active;
  }
  // Ranges of whole blocks; the tensor of a block is looked up once a range.
  parallel_ranges(first.back() * OPD_STEP_BLOCK, active < SERIAL_BELOW ? 1 : threads, OPD_STEP_BLOCK, [&](int, int64_t start, int64_t stop) {
    size_t i = 0;
    for (int64_t block = start / OPD_STEP_BLOCK; block < stop / OPD_STEP_BLOCK; block++) {
      while (block >= first[i + 1]) i++;
      kernel.step_block(&tensors[i], block - first[i]);
    }
  });
}
