// `quantile` on a CUDA device: a pass counts one digit, sixteen bits, of the magnitudes whose upper digits equal a
// prefix. The threshold is found digit by digit, most significant first (opdkernels/ops/quantile/gpu_common.py), in one
// pass for two-byte dtypes, two for fp32, four for fp64. The order of the bits of magnitudes is the order of the
// magnitudes.
//
// The first digit, which every value has, is counted in shared memory if it is below that of 2, in one table outside
// the mask and one inside; later digits, of the few values that share a threshold's upper ones, in the tables in global
// memory. Zeros, which may be most of a change, are counted in registers. A NaN counts as the largest magnitude bits,
// beyond infinity.
#include "quantile.h"
#include "../common/cuda/grid.h"

template <int BYTES> struct Magnitude {};
template <> struct Magnitude<2> {
  typedef opd_u32 Key;
  static __device__ __forceinline__ Key of(const Vector& x, int j) { return half_of(x, j) & 0x7FFFu; }
};
template <> struct Magnitude<4> {
  typedef opd_u32 Key;
  static __device__ __forceinline__ Key of(const Vector& x, int j) {
    float value = single_of(x, j);
    return value == value ? magnitude_key(value, 0) >> 1 : 0x7FFFFFFFu;
  }
};
template <> struct Magnitude<8> {
  typedef opd_u64 Key;
  static __device__ __forceinline__ Key of(const Vector& x, int j) {
    double value = double_of(x, j);
    return value == value ? magnitude_key(value, 0) >> 1 : 0x7FFFFFFFFFFFFFFFull;
  }
};

// values: [n]; mask: uint8 [(n + 7) / 8] or null; prefixes: int64 [n_prefixes]; tables: 32-bit
// [n_prefixes][2][OPD_DIGITS], outside and inside the mask, added to. smem_rows is 0 but for the first digit.
template <int BYTES>
__device__ __forceinline__ void count(const void* values, const opd_u8* mask, const opd_i64* prefixes, opd_u32* tables,
                                      opd_i64 n, int shift,
                                      int n_prefixes, int smem_rows) {
  typedef typename Magnitude<BYTES>::Key Key;
  const int V = 16 / BYTES;
  OPD_DYNAMIC_SHARED(shared);
  opd_u32* smem_tables = (opd_u32*)(shared + OPD_SMEM_HEADER_BYTES);
  for (int i = threadIdx.x; i < smem_rows * OPD_SMEM_DIGITS; i += blockDim.x) smem_tables[i] = 0;
  __syncthreads();

  opd_u32 zeros[2] = {0, 0};
  const opd_i64 tile = (opd_i64)blockDim.x * V, step = gridDim.x * tile;
  opd_i64 i = blockIdx.x * tile + (opd_i64)threadIdx.x * V;
  Vector x = load<V>(values, BYTES, i, n);
  opd_u32 bits = mask && i < n ? mask[i >> 3] >> (i & 7) : 0;
  for (; i < n; i += step) {
    const opd_i64 next = i + step;
    const Vector next_x = load<V>(values, BYTES, next, n);
    const opd_u32 next_bits = mask && next < n ? mask[next >> 3] >> (next & 7) : 0;
#pragma unroll
    for (int j = 0; j < V; j++) {
      if (i + j >= n) continue;
      const Key key = Magnitude<BYTES>::of(x, j);
      const opd_u32 inside = bits >> j & 1, digit = (opd_u32)(key >> shift) & (OPD_DIGITS - 1);
      if (key == 0) {
        zeros[0] += 1 - inside;
        zeros[1] += inside;
      } else if ((int)inside < smem_rows && digit < OPD_SMEM_DIGITS) {
        atomicAdd(smem_tables + inside * OPD_SMEM_DIGITS + digit, 1u);
      } else {
        const opd_i64 upper = (opd_i64)(key >> shift >> 16);
        for (int p = 0; p < n_prefixes; p++)
          if (upper == prefixes[p]) atomicAdd(tables + ((opd_i64)2 * p + inside) * OPD_DIGITS + digit, 1u);
      }
    }
    x = next_x;
    bits = next_bits;
  }
  for (int inside = 0; inside < 2; inside++) {
    const opd_u32 total = warp_sum(zeros[inside]);
    if (threadIdx.x % OPD_WARP || !total) continue;
    for (int p = 0; p < n_prefixes; p++)
      if (prefixes[p] == 0) atomicAdd(tables + ((opd_i64)2 * p + inside) * OPD_DIGITS, total);
  }
  __syncthreads();
  for (int row = 0; row < smem_rows; row++)
    for (int digit = threadIdx.x; digit < OPD_SMEM_DIGITS; digit += blockDim.x) {
      const opd_u32 count = smem_tables[row * OPD_SMEM_DIGITS + digit];
      if (count) atomicAdd(tables + row * OPD_DIGITS + digit, count);
    }
}

#define OPD_QUANTILE_COUNT(name, BYTES)                                                                               \
  extern "C" __global__ void __launch_bounds__(1024, 1)                                                               \
  name(const void* values, const opd_u8* mask, const opd_i64* prefixes, opd_u32* tables, opd_i64 n, opd_i64 shift,    \
       opd_i64 n_prefixes, opd_i64 smem_rows) {                                                                       \
    count<BYTES>(values, mask, prefixes, tables, n, (int)shift, (int)n_prefixes, (int)smem_rows);                     \
  }                                                                                                                   \
  OPD_LAUNCHER(name)

OPD_QUANTILE_COUNT(quantile_count_2, 2)
OPD_QUANTILE_COUNT(quantile_count_4, 4)
OPD_QUANTILE_COUNT(quantile_count_8, 8)
