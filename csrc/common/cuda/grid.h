// What the CUDA kernels share: loads, sums over a warp, exact sums by atomics, and the launcher. Compiled by nvcc and
// NVRTC, and by g++ with a header that emulates the device (tests/backends/cuda/fiber_shim.h). Includes only numeric.h.
// opdkernels/backends/layout.py repeats the constants (tests/ops/test_layout.py compares).
#pragma once
#include "../numeric.h"

#define OPD_WARP 32
#define OPD_ALL_LANES 0xFFFFFFFFu
#define OPD_SMEM_HEADER_BYTES 35840  // of a block's shared memory, before the tables
// The bins of a histogram of bfloat16 magnitudes that a table in shared memory holds, 16 KiB: from 2^-31 to below 2, as
// nearly all weights and their changes are.
#define OPD_SMEM_FIRST_BIN 12288
#define OPD_SMEM_BINS 4096

typedef unsigned char opd_u8;

#if defined(__CUDACC__)
#define OPD_DYNAMIC_SHARED(name) extern __shared__ __align__(16) opd_u8 name[]
#define OPD_CONSTANT __constant__ const
#endif

// Every argument of a kernel is eight bytes, a pointer or an opd_i64, so that one launcher serves C, ctypes and CuPy.
#if defined(__CUDACC_RTC__)
#define OPD_LAUNCHER(kernel)  // CuPy launches a kernel by its name
#elif defined(__CUDACC__)
template <class... P>
int opd_launch(void (*kernel)(P...), const opd_i64* arguments, int count, opd_i64 blocks, int threads, int shared_bytes,
               int device, void* stream) {
  static_assert(((sizeof(P) == 8) && ...), "an argument of a kernel is a pointer or an opd_i64");
  if (count != (int)sizeof...(P)) return cudaErrorInvalidValue;
  void* slots[sizeof...(P)];
  for (int i = 0; i < count; i++) slots[i] = (void*)(arguments + i);
  const void* function = (const void*)kernel;
  cudaError_t status = cudaSetDevice(device);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status == cudaSuccess)
    status = cudaLaunchKernel(function, dim3((unsigned)blocks), dim3((unsigned)threads), slots, (size_t)shared_bytes,
                              (cudaStream_t)stream);
  if (status != cudaSuccess) cudaGetLastError();  // cleared: the next launch reports its own
  return status;
}
#define OPD_LAUNCHER(kernel)                                                                                          \
  extern "C" int kernel##_launch(const opd_i64* arguments, int count, opd_i64 blocks, int threads, int shared_bytes,  \
                                 int device, void* stream) {                                                          \
    return opd_launch(kernel, arguments, count, blocks, threads, shared_bytes, device, stream);                       \
  }
#endif

// Up to sixteen bytes of adjacent values, as in memory.
struct Vector { opd_u32 word[4]; };

// Values [i, i + V) of `bytes` bytes each, bytes being 1 if V is 16; zeros from n on. One load of V * bytes bytes,
// which is 4, 8 or 16, if all of them exist and the address is aligned to it. Streamed: the caches are for tables.
template <int V>
__device__ __forceinline__ Vector load(const void* data, int bytes, opd_i64 i, opd_i64 n) {
  Vector x = {{0, 0, 0, 0}};
  const char* at = (const char*)data + i * bytes;
  const opd_u64 width = (opd_u64)(V * bytes);
  if (i + V <= n && ((opd_u64)at & (width - 1)) == 0) {
    if (width == 16) {
      uint4 four = __ldcs((const uint4*)at);
      x.word[0] = four.x; x.word[1] = four.y; x.word[2] = four.z; x.word[3] = four.w;
    } else if (width == 8) {
      uint2 two = __ldcs((const uint2*)at);
      x.word[0] = two.x; x.word[1] = two.y;
    } else {
      x.word[0] = __ldcs((const opd_u32*)at);
    }
    return x;
  }
#pragma unroll
  for (int j = 0; j < V; j++) {
    if (i + j >= n) continue;
    if (V == 16) {
      x.word[j >> 2 & 3] |= (opd_u32)__ldcs((const opd_u8*)at + j) << 8 * (j & 3);
    } else if (bytes == 2) {
      x.word[j >> 1 & 3] |= (opd_u32)__ldcs((const opd_u16*)at + j) << 16 * (j & 1);
    } else if (bytes == 4) {
      x.word[j & 3] = __ldcs((const opd_u32*)at + j);
    } else {
      opd_u64 wide = __ldcs((const opd_u64*)at + j);
      x.word[2 * j & 3] = (opd_u32)wide;
      x.word[(2 * j + 1) & 3] = (opd_u32)(wide >> 32);
    }
  }
  return x;
}

OPD_FN opd_u16 half_of(const Vector& x, int j) { return (opd_u16)(x.word[j >> 1 & 3] >> 16 * (j & 1)); }
OPD_FN float single_of(const Vector& x, int j) { return bits_float(x.word[j & 3]); }
OPD_FN double double_of(const Vector& x, int j) {
  return bits_double((opd_u64)x.word[(2 * j + 1) & 3] << 32 | x.word[2 * j & 3]);
}

// The bfloat16 bits of value j; a double is rounded to float first, as in torch.
OPD_FN opd_u16 bf16_bits_of(const Vector& x, int dtype, int j) {
  if (dtype == BF16) return half_of(x, j);
  if (dtype == FP16) return float_to_bf16(fp16_to_float(half_of(x, j)));
  return float_to_bf16(dtype == FP32 ? single_of(x, j) : (float)double_of(x, j));
}

__device__ __forceinline__ bool is_in_smem(opd_u32 bin) { return bin - OPD_SMEM_FIRST_BIN < OPD_SMEM_BINS; }

// Adds to one bin of a histogram of bfloat16 magnitudes: in shared memory for the first `smem_rows` rows, else in
// `table` in global memory. Returns whether it is in shared memory. Weights mostly use a few hundred bins, a dozen
// lines of the L2 cache, whose atomic units take one increment after another.
__device__ __forceinline__ bool add_to_table(opd_u32* smem_tables, int smem_rows, int row, opd_u32* table, opd_u32 bin,
                                             opd_u32 count = 1) {
  const bool in_smem = row < smem_rows && is_in_smem(bin);
  if (in_smem) atomicAdd(smem_tables + row * OPD_SMEM_BINS + (bin - OPD_SMEM_FIRST_BIN), count);
  else atomicAdd(table + bin, count);
  return in_smem;
}

// Sum and maximum over a warp, in every lane; all lanes take part.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int lane = OPD_WARP / 2; lane; lane /= 2) x += __shfl_xor_sync(OPD_ALL_LANES, x, lane);
  return x;
}
template <class T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int lane = OPD_WARP / 2; lane; lane /= 2) {
    T other = __shfl_xor_sync(OPD_ALL_LANES, x, lane);
    x = other > x ? other : x;
  }
  return x;
}

// The sum of x over this lane and those before it; all lanes take part.
template <class T>
__device__ __forceinline__ T warp_scan(T x) {
#pragma unroll
  for (int d = 1; d < OPD_WARP; d *= 2) {
    const T below = __shfl_up_sync(OPD_ALL_LANES, x, d);
    x += (int)(threadIdx.x % OPD_WARP) >= d ? below : 0;
  }
  return x;
}

// A byte of the change bits of eight coordinates, of which each of 8 / V lanes in a row has V: in the first of these
// lanes.
template <int V>
__device__ __forceinline__ opd_u32 byte_of_lanes(opd_u32 bits) {
#pragma unroll
  for (int have = V; have < 8; have *= 2) bits |= __shfl_down_sync(OPD_ALL_LANES, bits, have / V) << have;
  return bits;
}

__device__ __forceinline__ void add_count(opd_i64* to, opd_i64 count) {
  if (count) atomicAdd((opd_u64*)to, (opd_u64)count);
}

// Whether this block is the last of the grid to call it: it then sees what all blocks added before, with __ldcg, which
// reads the L2 cache. `ticket` in global memory is 0 before the first call, and `is_last` in shared memory. All threads
// take part.
__device__ __forceinline__ bool is_last_block(opd_u32* ticket, opd_u32* is_last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return *is_last != 0;
}

// sum_add of numeric.h by atomics: the limbs are the same for any order of threads.
__device__ __forceinline__ void sum_add_atomic(opd_i64* limbs, opd_i64 integer, int shift) {
  opd_i64 parts[3] = {0, 0, 0};
  sum_add(parts, integer, shift & 31);
  for (int k = 0; k < 3; k++) add_count(limbs + (shift >> 5) + k, parts[k]);
}
