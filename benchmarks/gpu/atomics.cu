// Cycles that an instruction of a warp on shared memory takes of a multiprocessor: increments as the histograms of the
// kernels use them, additions of a number that is not a constant, and stores. benchmarks/gpu/atomics.py chooses the
// addresses of the lanes and launches one block per multiprocessor.
#include "../../csrc/common/cuda/grid.h"
#include "../../csrc/common/cuda/packed.h"

#define OPD_ADDRESSES 16      // of a thread, each in a register
#define OPD_REPEATS 256       // of all of them
#define OPD_TABLE_WORDS 8192  // in shared memory

enum Instruction { INCREMENT, ADD, STORE };

// `words` [OPD_ADDRESSES][threads]: the words of the table that each thread changes in turn. Writes the cycles of every
// block to `cycles` [blocks], and its table to `tables` [blocks][OPD_TABLE_WORDS].
template <int INSTRUCTION>
__device__ __forceinline__ void measure(const opd_u32* words, opd_u32 value, opd_i64* cycles, opd_u32* tables) {
  OPD_DYNAMIC_SHARED(shared);
  opd_u32* table = (opd_u32*)shared;
  for (int i = threadIdx.x; i < OPD_TABLE_WORDS; i += blockDim.x) table[i] = 0;
  opd_u32* places[OPD_ADDRESSES];
  SharedAddress addresses[OPD_ADDRESSES];
#pragma unroll
  for (int k = 0; k < OPD_ADDRESSES; k++) {
    places[k] = table + words[k * blockDim.x + threadIdx.x];
    addresses[k] = shared_address(places[k]);
  }
  __syncthreads();
  const opd_i64 begin = clock64();
#pragma unroll 1
  for (int i = 0; i < OPD_REPEATS; i++) {
#pragma unroll
    for (int k = 0; k < OPD_ADDRESSES; k++) {
      if (INSTRUCTION == INCREMENT) shared_increment<0>(addresses[k]);
      if (INSTRUCTION == ADD) atomicAdd(places[k], value);
      if (INSTRUCTION == STORE) shared_store<0>(addresses[k], value);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begin;
  for (int i = threadIdx.x; i < OPD_TABLE_WORDS; i += blockDim.x)
    tables[(opd_i64)blockIdx.x * OPD_TABLE_WORDS + i] = table[i];
}

extern "C" __global__ void __launch_bounds__(768, 1)
    atomics_increment(const opd_u32* words, opd_i64 value, opd_i64* cycles, opd_u32* tables) {
  measure<INCREMENT>(words, (opd_u32)value, cycles, tables);
}
OPD_LAUNCHER(atomics_increment)

extern "C" __global__ void __launch_bounds__(768, 1)
    atomics_add(const opd_u32* words, opd_i64 value, opd_i64* cycles, opd_u32* tables) {
  measure<ADD>(words, (opd_u32)value, cycles, tables);
}
OPD_LAUNCHER(atomics_add)

extern "C" __global__ void __launch_bounds__(768, 1)
    atomics_store(const opd_u32* words, opd_i64 value, opd_i64* cycles, opd_u32* tables) {
  measure<STORE>(words, (opd_u32)value, cycles, tables);
}
OPD_LAUNCHER(atomics_store)
