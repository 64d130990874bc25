// The active coordinates of a bitmap. A warp takes a block of 2,048, whose first active coordinate is element
// block_counts[block] of the compact arrays.
//
// A warp reads the bits of its block, writes the positions of the set ones into a queue in shared memory, and takes
// 32 of the queue at a time. So no lane idles at any density, compact arrays are read and written a full line at a
// time, and of dense ones only the 32-byte sectors that hold an active coordinate. One lane per coordinate would load
// as much and, at a density of 20 %, issue five times the instructions: more than an H100 has time for while memory
// delivers the bytes. Wider loads of dense arrays would save instructions only where nearly everything is active.
#pragma once
#include "grid.h"

#define OPD_MASK_BLOCK 2048
#define OPD_MASK_WORDS (OPD_MASK_BLOCK / OPD_WARP)
#define OPD_QUEUE_BYTES (2 * OPD_MASK_BLOCK)  // per warp
#define OPD_QUEUE_THREADS 256
#define OPD_QUEUE_BLOCKS 4  // per multiprocessor: half of its threads, 128 KB of queues

// Bits [32 i, 32 i + 32) of a bitmap of n coordinates at any address; zeros from bit n.
__device__ __forceinline__ opd_u32 mask_word(const opd_u8* mask, opd_i64 i, opd_i64 n) {
  const opd_u8* at = mask + 4 * i;
  const opd_i64 left = n - 32 * i;
  if (left >= 32 && ((opd_u64)at & 3) == 0) return *(const opd_u32*)at;
  opd_u32 word = 0;
  for (int byte = 0; byte < 4; byte++)
    if (8 * byte < left) word |= (opd_u32)at[byte] << 8 * byte;
  return left >= 32 ? word : left > 0 ? word & ((1u << left) - 1) : 0;
}

__device__ __forceinline__ opd_u16* warp_queue(opd_u8* shared) {
  return (opd_u16*)(shared + threadIdx.x / OPD_WARP * OPD_QUEUE_BYTES);
}

// Queues the positions of a block's set bits in order and returns their number. All lanes take part: one word at a
// time, one bit per lane. No two lanes access the same bank, and the time does not depend on the density.
__device__ __forceinline__ int queue_active(const opd_u8* mask, opd_i64 block, opd_i64 n, opd_u16* queue) {
  const int lane = threadIdx.x % OPD_WARP;
  const opd_u32 below = (1u << lane) - 1;
  int queued = 0;
#pragma unroll
  for (int half = 0; half < OPD_MASK_WORDS; half += OPD_WARP) {
    const opd_u32 lane_word = mask_word(mask, block * OPD_MASK_WORDS + half + lane, n);
#pragma unroll 4
    for (int w = 0; w < OPD_WARP; w++) {
      const opd_u32 word = __shfl_sync(OPD_ALL_LANES, lane_word, w);
      if (word >> lane & 1) queue[queued + __popc(word & below)] = (opd_u16)(32 * (half + w) + lane);
      queued += __popc(word);
    }
  }
  __syncwarp();
  return queued;
}
