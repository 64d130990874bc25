// `overlap` on a CUDA device: the source and all runs are read once, and one number says which runs changed a coordinate.
//
// Runs are taken in groups of four. A coordinate adds one to the joint table [set, |w|] of a group, where the set has a bit for
// each run of the group that changed it. The first group counts every coordinate, the others those that they changed. Of at
// most four runs the joint counts are sums of the same table; of more, a table of 2^runs sets holds them.
//
// Of the first group, the sets that leave the most unchanged count in shared memory, as many as fit (twelve with 227 KB), for |w| from
// 2^-31 and below 2; the rest goes to the tables in memory. Zeros that no run changed are counted in registers.
#include "overlap.h"
#include "../common/cuda/grid.h"

#define OPD_BINS 32768
#define OPD_GROUP 4           // runs that share a table
#define OPD_GROUP_SETS 16
#define OPD_EIGHT 8           // coordinates that a thread takes at a time

enum Count { NUMEL, NONFINITE };

// bfloat16 patterns of coordinates [i, i + 8), zeros from n on.
__device__ __forceinline__ void load_patterns(const void* data, int dtype, opd_i64 i, opd_i64 n, opd_u16* patterns) {
  if (dtype == FP32) {
#pragma unroll
    for (int part = 0; part < 2; part++) {
      const Vector x = load<4>(data, 4, i + 4 * part, n);
#pragma unroll
      for (int j = 0; j < 4; j++) patterns[4 * part + j] = pattern_of(x, FP32, j);
    }
  } else if (dtype == FP64) {
#pragma unroll
    for (int part = 0; part < 4; part++) {
      const Vector x = load<2>(data, 8, i + 2 * part, n);
#pragma unroll
      for (int j = 0; j < 2; j++) patterns[2 * part + j] = pattern_of(x, FP64, j);
    }
  } else {
    const Vector x = load<8>(data, 2, i, n);
#pragma unroll
    for (int j = 0; j < 8; j++) patterns[j] = dtype == BF16 ? half_of(x, j) : pattern_of(x, FP16, j);
  }
}

// trained, dtypes: [runs]; joint: 32-bit [groups][16][2^15]; sets: 32-bit [2^runs] of more than four runs, else null; counts: the
// operator's; limit: the least difference that is a change. All tables are added to.
extern "C" __global__ void __launch_bounds__(1024, 1)
overlap_count(const void* source, opd_i64 source_dtype, const opd_i64* trained, const opd_i64* dtypes, opd_u32* joint, opd_u32* sets,
              opd_i64* counts, opd_i64 n, opd_i64 runs, opd_i64 limit, opd_i64 near_rows) {
  OPD_DYNAMIC_SHARED(shared);
  opd_u32* near_by = (opd_u32*)(shared + OPD_SMALL_BYTES);
  for (int i = threadIdx.x; i < (int)near_rows * OPD_NEAR_BINS; i += blockDim.x) near_by[i] = 0;
  __syncthreads();

  opd_u32 zeros = 0, lost = 0;
  const opd_i64 tile = (opd_i64)blockDim.x * OPD_EIGHT, step = gridDim.x * tile;
  for (opd_i64 i = blockIdx.x * tile + (opd_i64)threadIdx.x * OPD_EIGHT; i < n; i += step) {
    opd_u16 w[OPD_EIGHT], v[OPD_EIGHT];
    opd_u32 changed[OPD_EIGHT] = {}, infinite = 0;
    load_patterns(source, (int)source_dtype, i, n, w);
#pragma unroll 1
    for (int run = 0; run < (int)runs; run++) {
      load_patterns((const void*)trained[run], (int)dtypes[run], i, n, v);
#pragma unroll
      for (int j = 0; j < OPD_EIGHT; j++) {
        const opd_u32 difference = difference_bits(w[j], v[j]);
        changed[j] |= (opd_u32)(difference >= (opd_u32)limit) << run;
        infinite |= (opd_u32)!difference_finite(difference) << j;
      }
    }
#pragma unroll
    for (int j = 0; j < OPD_EIGHT; j++) {
      if (i + j >= n) continue;
      if (infinite >> j & 1) {
        lost++;
        continue;
      }
      const opd_u32 magnitude = w[j] & 0x7FFFu, set = changed[j] & (OPD_GROUP_SETS - 1);
      if (!set && !magnitude) zeros++;
      else add_to_table(near_by, (int)near_rows, (int)set, joint + set * OPD_BINS, magnitude);
      if (!sets || !changed[j]) continue;
      atomicAdd(sets + changed[j], 1u);
      for (int group = 1; group * OPD_GROUP < (int)runs; group++) {
        const opd_u32 part = changed[j] >> group * OPD_GROUP & (OPD_GROUP_SETS - 1);
        if (part) atomicAdd(joint + (group * OPD_GROUP_SETS + part) * OPD_BINS + magnitude, 1u);
      }
    }
  }
  zeros = warp_sum(zeros);
  lost = warp_sum(lost);
  if (threadIdx.x % OPD_WARP == 0) {
    if (zeros) atomicAdd(joint, zeros);
    add_count(counts + NONFINITE, lost);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) add_count(counts + NUMEL, n);
  __syncthreads();
  flush_tables(near_by, (int)near_rows, joint, OPD_BINS);
}
OPD_LAUNCHER(overlap_count)
