// `overlap` on a CUDA device: the base and all runs are read once, and one number says which runs changed a coordinate.
//
// Runs are taken in groups of four. A coordinate adds one to the joint table [set, |w|] of a group, where the set has
// one bit for each run of the group that changed it. The first group counts every coordinate, the others those that
// they changed. For at most four runs the joint counts are sums of the same table; for more, a table of 2^runs sets
// holds them.
//
// Of the first group, the lowest-numbered sets are counted in shared memory, as many as fit (twelve with 227 KB), for
// |w| from 2^-31 to below 2; the rest is counted in the tables in global memory. Zeros that no run changed are counted
// in registers.
#include "overlap.h"
#include "../common/cuda/grid.h"

#define OPD_VALUES 8  // coordinates that a thread takes per step

// bfloat16 bits of coordinates [i, i + 8), zeros from n on.
__device__ __forceinline__ void load_bf16_bits(const void* data, int dtype, opd_i64 i, opd_i64 n, opd_u16* bits) {
  if (dtype == FP32) {
#pragma unroll
    for (int part = 0; part < 2; part++) {
      const Vector x = load<4>(data, 4, i + 4 * part, n);
#pragma unroll
      for (int j = 0; j < 4; j++) bits[4 * part + j] = bf16_bits_of(x, FP32, j);
    }
  } else if (dtype == FP64) {
#pragma unroll
    for (int part = 0; part < 4; part++) {
      const Vector x = load<2>(data, 8, i + 2 * part, n);
#pragma unroll
      for (int j = 0; j < 2; j++) bits[2 * part + j] = bf16_bits_of(x, FP64, j);
    }
  } else {
    const Vector x = load<8>(data, 2, i, n);
#pragma unroll
    for (int j = 0; j < 8; j++) bits[j] = dtype == BF16 ? half_of(x, j) : bf16_bits_of(x, FP16, j);
  }
}

// base: [n]; trained: [runs] addresses of [n]; dtypes: int64 [runs]; joint: 32-bit [groups][OPD_GROUP_SETS][OPD_BINS];
// sets: 32-bit [2^runs] for more than four runs, else null; counts: int64 [OVERLAP_NUM_COUNTS]; limit: the least
// difference that is a change, as fp32 bits. All tables are added to.
extern "C" __global__ void __launch_bounds__(1024, 1)
overlap_count(const void* base, opd_i64 base_dtype, const opd_i64* trained, const opd_i64* dtypes, opd_u32* joint,
              opd_u32* sets,
              opd_i64* counts, opd_i64 n, opd_i64 runs, opd_i64 limit, opd_i64 smem_rows) {
  OPD_DYNAMIC_SHARED(shared);
  opd_u32* smem_tables = (opd_u32*)(shared + OPD_SMEM_HEADER_BYTES);
  for (int i = threadIdx.x; i < (int)smem_rows * OPD_SMEM_BINS; i += blockDim.x) smem_tables[i] = 0;
  __syncthreads();

  opd_u32 zeros = 0, nonfinite = 0;
  const opd_i64 tile = (opd_i64)blockDim.x * OPD_VALUES, step = gridDim.x * tile;
  for (opd_i64 i = blockIdx.x * tile + (opd_i64)threadIdx.x * OPD_VALUES; i < n; i += step) {
    opd_u16 w[OPD_VALUES], v[OPD_VALUES];
    opd_u32 changed[OPD_VALUES] = {}, infinite = 0;
    load_bf16_bits(base, (int)base_dtype, i, n, w);
#pragma unroll 1
    for (int run = 0; run < (int)runs; run++) {
      load_bf16_bits((const void*)trained[run], (int)dtypes[run], i, n, v);
#pragma unroll
      for (int j = 0; j < OPD_VALUES; j++) {
        const opd_u32 difference = difference_bits(w[j], v[j]);
        changed[j] |= (opd_u32)(difference >= (opd_u32)limit) << run;
        infinite |= (opd_u32)!difference_finite(difference) << j;
      }
    }
#pragma unroll
    for (int j = 0; j < OPD_VALUES; j++) {
      if (i + j >= n) continue;
      if (infinite >> j & 1) {
        nonfinite++;
        continue;
      }
      const opd_u32 magnitude = w[j] & 0x7FFFu, set = changed[j] & (OPD_GROUP_SETS - 1);
      if (!set && !magnitude) zeros++;
      else add_to_table(smem_tables, (int)smem_rows, (int)set, joint + set * OPD_BINS, magnitude);
      if (!sets || !changed[j]) continue;
      atomicAdd(sets + changed[j], 1u);
      for (int group = 1; group * OPD_GROUP < (int)runs; group++) {
        const opd_u32 part = changed[j] >> group * OPD_GROUP & (OPD_GROUP_SETS - 1);
        if (part) atomicAdd(joint + (group * OPD_GROUP_SETS + part) * OPD_BINS + magnitude, 1u);
      }
    }
  }
  zeros = warp_sum(zeros);
  nonfinite = warp_sum(nonfinite);
  if (threadIdx.x % OPD_WARP == 0) {
    if (zeros) atomicAdd(joint, zeros);
    add_count(counts + OVERLAP_COUNT_NONFINITE, nonfinite);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) add_count(counts + OVERLAP_COUNT_NUMEL, n);
  __syncthreads();
  flush_tables(smem_tables, (int)smem_rows, joint, OPD_BINS);
}
OPD_LAUNCHER(overlap_count)
