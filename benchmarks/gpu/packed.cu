// The functions of csrc/common/cuda/packed.h that are written once for GPUs and once in plain C, on any words:
// benchmarks/gpu/packed.py compares both with NumPy.
#include "../../csrc/common/cuda/grid.h"
#include "../../csrc/common/cuda/packed.h"

// `words` [3][n] and `results` [8][n], for n threads in full warps.
extern "C" __global__ void packed_functions(const opd_u32* words, opd_u32* results, opd_i64 n) {
  const opd_i64 i = (opd_i64)blockIdx.x * blockDim.x + threadIdx.x;
  const opd_u32 x = words[i], y = words[n + i], z = words[2 * n + i];
  const int lane = (int)(i % OPD_WARP), distance = 1 << (i / OPD_WARP % 5);
  results[i] = add_lane_below(x, distance, lane);
  results[n + i] = sign_masks(x);
  results[2 * n + i] = max_of_sums(x, y, z);
  results[3 * n + i] = nonzero_halves(x);
  results[4 * n + i] = (opd_u32)dot_halves((int)x, (int)y, (int)z >> 8);
  results[5 * n + i] = (opd_u32)clamp_to((int)x, (int)(y >> 1));
  results[6 * n + i] = lower_halves(x, y);
  results[7 * n + i] = upper_halves(x, y);
}
OPD_LAUNCHER(packed_functions)
