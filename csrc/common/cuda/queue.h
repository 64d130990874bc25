// A queue per warp in shared memory: each lane takes sixteen-bit values of adjacent coordinates, two per word, and the
// few that need more work are counted 32 at a time, with no lane idle.
#pragma once
#include "packed.h"

#define OPD_QUEUE_REST (OPD_WARP - 1)  // elements that may be left after a step; a queue also holds all of a step

// The coordinates of two bytes that a lane takes of a step of its warp, which is 512 adjacent ones: eight from `at` on,
// where `left` exist, and eight from 256 further on. `whole`: all of them exist, and their addresses are aligned.
__device__ __forceinline__ void load_step(const char* at, opd_i64 left, bool whole, opd_u32* words) {
  Vector x[2] = {};
  if (whole) {
    x[0] = load_now(at), x[1] = load_now(at + 512);
  } else {
    OPD_RARE(_Pragma("unroll") for (int h = 0; h < 2; h++) {
      const opd_i64 exist = left - 256 * h;
      x[h] = load<8>(at + 512 * h, 2, 0, exist > 8 ? 8 : exist);
    });
  }
#pragma unroll
  for (int k = 0; k < 8; k++) words[k] = x[k / 4].word[k % 4];
}

// Appends the coordinates of a step that `bits` names: bit k the one in the lower halves of words k, bit 16 + k the one
// in the upper halves. An element has the half of `a` in its lower half, that of `b` in its upper. Returns the number
// that the warp appended; all lanes take part.
template <int WORDS>
__device__ __forceinline__ opd_u32 append_to_queue(SharedAddress end, opd_u32 bits, const opd_u32* a,
                                                   const opd_u32* b) {
  const opd_u32 lane = threadIdx.x % OPD_WARP, here = __popc(bits);
  opd_u32 up_to_here = here;  // after the loop: in this lane and those before it
#pragma unroll
  for (int d = 1; d < OPD_WARP; d *= 2) up_to_here = add_lane_below(up_to_here, d, (int)lane);
  const opd_u32 appended = __shfl_sync(OPD_ALL_LANES, up_to_here, OPD_WARP - 1);
  SharedAddress to = end + 4 * (up_to_here - here);
#pragma unroll
  for (int k = 0; k < WORDS; k++) {
    if (bits >> k & 1) {
      shared_store<0>(to, lower_halves(a[k], b[k]));
      to += 4;
    }
    if (bits >> k & 0x10000u) {
      shared_store<0>(to, upper_halves(a[k], b[k]));
      to += 4;
    }
  }
  return appended;
}

// Counts the last elements of a queue, 32 at a time. Returns how many are left, less than 32.
template <class Count>
__device__ __forceinline__ opd_u32 drain_queue(SharedAddress queue, opd_u32 queued, Count count) {
  const opd_u32 lane = threadIdx.x % OPD_WARP;
  __syncwarp();
#pragma unroll 1
  while (queued >= OPD_WARP) {
    queued -= OPD_WARP;
    count(shared_load<0>(queue + 4 * (queued + lane)));
  }
  __syncwarp();  // the next step writes where some lanes may still read
  return queued;
}
