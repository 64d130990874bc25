// Operations on two 16-bit values in a 32-bit word, and shared memory by 32-bit addresses, for loops with a budget of
// instructions (tests/backends/cuda/test_budgets.py). On a device each is one or two instructions; elsewhere, for
// fibers, the same in C++.
#pragma once
#include "grid.h"

// The OFFSET of bin 0 of a table that begins with bin OPD_SMEM_FIRST_BIN.
#define OPD_BIN_0(table) (table - 4 * OPD_SMEM_FIRST_BIN)

// Code that hardly any coordinate runs. With OPD_BUDGET it is replaced by a trap, so that the instructions of a loop
// are those of the common path.
#if defined(OPD_BUDGET)
#define OPD_RARE(...) asm volatile("trap;")
#elif !defined(OPD_RARE)
#define OPD_RARE(...) __VA_ARGS__
#endif

#if defined(__CUDA_ARCH__)
// Sixteen bytes at an address aligned to them. Volatile: loaded here, not where they are first used.
__device__ __forceinline__ Vector load_now(const void* at) {
  Vector x;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "l"(at));
  return x;
}

// An address in shared memory. The constant OFFSET of an access, in bytes, is part of its instruction; a generic
// pointer would be computed again, in three instructions, for every access.
typedef opd_u32 SharedAddress;
__device__ __forceinline__ SharedAddress shared_address(const void* at) {
  SharedAddress address = (SharedAddress)__cvta_generic_to_shared(at);
  asm volatile("" : "+r"(address));  // kept in a register
  return address;
}
// The address of element `lower half of word`, or `upper half`, of a table of four-byte elements.
__device__ __forceinline__ SharedAddress element_of_lower(SharedAddress table, opd_u32 word) {
  return __dp2a_lo(word, 4u, table);
}
__device__ __forceinline__ SharedAddress element_of_upper(SharedAddress table, opd_u32 word) {
  return __dp2a_lo(word, 0x400u, table);
}
// What a table in shared memory stores of an address in shared memory, and the address again.
__device__ __forceinline__ opd_u32 stored_address(SharedAddress base, opd_u32 bytes) { return base + bytes; }
__device__ __forceinline__ SharedAddress loaded_address(SharedAddress, opd_u32 stored) { return stored; }
// Adds one, in one instruction; lanes with the same address are combined.
template <int OFFSET>
__device__ __forceinline__ void shared_increment(SharedAddress at) {
  asm volatile("red.shared.add.u32 [%0+%1], 1;" ::"r"(at), "n"(OFFSET));
}
template <int OFFSET>
__device__ __forceinline__ void shared_store(SharedAddress at, opd_u32 x) {
  asm volatile("st.shared.u32 [%0+%1], %2;" ::"r"(at), "n"(OFFSET), "r"(x) : "memory");
}
template <int OFFSET>
__device__ __forceinline__ opd_u32 shared_load(SharedAddress at) {
  opd_u32 x;
  asm volatile("ld.shared.u32 %0, [%1+%2];" : "=r"(x) : "r"(at), "n"(OFFSET) : "memory");
  return x;
}
// x plus the x of the lane `distance` below, if there is one.
__device__ __forceinline__ opd_u32 add_lane_below(opd_u32 x, int distance, int) {
  asm volatile("{ .reg .pred p; .reg .u32 r; shfl.sync.up.b32 r|p, %0, %1, 0, -1; @p add.u32 %0, %0, r; }"
               : "+r"(x)
               : "r"(distance));
  return x;
}
// For each half: 0xFFFF if its sign bit is set, else 0.
__device__ __forceinline__ opd_u32 sign_masks(opd_u32 x) {
  opd_u32 masks;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(masks) : "r"(x));
  return masks;
}
// For each half: max(x + y, z), unsigned.
__device__ __forceinline__ opd_u32 max_of_sums(opd_u32 x, opd_u32 y, opd_u32 z) { return __viaddmax_u16x2(x, y, z); }
// For each half: 1 if it is not zero, else 0.
__device__ __forceinline__ opd_u32 nonzero_halves(opd_u32 x) { return __vminu2(x, 0x00010001u); }
// Lower half of a times byte 0 of b, plus upper half of a times byte 1 of b, plus c; signed.
__device__ __forceinline__ int dot_halves(int a, int b, int c) { return __dp2a_lo(a, b, c); }
// x between 0 and `upper`.
__device__ __forceinline__ int clamp_to(int x, int upper) { return __vimin_s32_relu(x, upper); }
// For each half, a finite bfloat16: 1 if |b - a|, rounded to bfloat16, exceeds that of `threshold`, else 0. The fused
// -1 a + b is rounded once; rounding it to fp32 first gives the same (tests/ops/overlap/test_overlap.py).
__device__ __forceinline__ opd_u32 changed_halves(opd_u32 a, opd_u32 b, opd_u32 threshold) {
  opd_u32 delta;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(delta) : "r"(a), "r"(0xBF80BF80u), "r"(b));
#if __CUDA_ARCH__ >= 900
  return __viaddmin_s16x2_relu(delta & 0x7FFF7FFFu, __vneg2(threshold), 0x00010001u);
#else
  return ((delta & 0x7FFF7FFFu) + (0x7FFF7FFFu - threshold)) >> 15 & 0x00010001u;
#endif
}
// The lower, or upper, halves of a and b: that of a in the lower half.
__device__ __forceinline__ opd_u32 lower_halves(opd_u32 a, opd_u32 b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ opd_u32 upper_halves(opd_u32 a, opd_u32 b) { return __byte_perm(a, b, 0x7632); }
#else
__device__ __forceinline__ Vector load_now(const void* at) {
  const uint4 four = *(const uint4*)at;
  return {{four.x, four.y, four.z, four.w}};
}
typedef opd_u8* SharedAddress;
__device__ __forceinline__ SharedAddress shared_address(const void* at) { return (SharedAddress)at; }
__device__ __forceinline__ SharedAddress element_of_lower(SharedAddress table, opd_u32 word) {
  return table + 4 * (word & 0xFFFFu);
}
__device__ __forceinline__ SharedAddress element_of_upper(SharedAddress table, opd_u32 word) {
  return table + 4 * (word >> 16);
}
__device__ __forceinline__ opd_u32 stored_address(SharedAddress, opd_u32 bytes) { return bytes; }
__device__ __forceinline__ SharedAddress loaded_address(SharedAddress base, opd_u32 stored) { return base + stored; }
template <int OFFSET>
__device__ __forceinline__ void shared_increment(SharedAddress at) {
  atomicAdd((opd_u32*)(at + OFFSET), 1u);
}
template <int OFFSET>
__device__ __forceinline__ void shared_store(SharedAddress at, opd_u32 x) {
  *(opd_u32*)(at + OFFSET) = x;
}
template <int OFFSET>
__device__ __forceinline__ opd_u32 shared_load(SharedAddress at) {
  return *(opd_u32*)(at + OFFSET);
}
__device__ __forceinline__ opd_u32 add_lane_below(opd_u32 x, int distance, int lane) {
  const opd_u32 below = __shfl_up_sync(OPD_ALL_LANES, x, distance);
  return lane >= distance ? x + below : x;
}
OPD_FN opd_u32 halves(opd_u32 low, opd_u32 high) { return (low & 0xFFFFu) | high << 16; }
OPD_FN opd_u32 larger_half(opd_u32 a, opd_u32 b) {
  return (a & 0xFFFFu) > (b & 0xFFFFu) ? a & 0xFFFFu : b & 0xFFFFu;
}
OPD_FN opd_u32 sign_masks(opd_u32 x) { return halves(x & 0x8000u ? 0xFFFFu : 0, x >> 31 ? 0xFFFFu : 0); }
OPD_FN opd_u32 max_of_sums(opd_u32 x, opd_u32 y, opd_u32 z) {
  return halves(larger_half(x + y, z), larger_half((x >> 16) + (y >> 16), z >> 16));
}
OPD_FN opd_u32 nonzero_halves(opd_u32 x) { return halves((x & 0xFFFFu) != 0, x >> 16 != 0); }
OPD_FN int dot_halves(int a, int b, int c) {
  return (int)(short)a * (int)(signed char)b + (a >> 16) * (int)(signed char)(b >> 8) + c;
}
OPD_FN int clamp_to(int x, int upper) { return x < 0 ? 0 : x < upper ? x : upper; }
OPD_FN opd_u32 changed_half(opd_u16 a, opd_u16 b, opd_u32 threshold) {
  return (float_to_bf16(bf16_to_float(b) - bf16_to_float(a)) & 0x7FFFu) > threshold;
}
OPD_FN opd_u32 changed_halves(opd_u32 a, opd_u32 b, opd_u32 threshold) {
  return halves(changed_half((opd_u16)a, (opd_u16)b, threshold & 0xFFFFu),
                changed_half((opd_u16)(a >> 16), (opd_u16)(b >> 16), threshold >> 16));
}
OPD_FN opd_u32 lower_halves(opd_u32 a, opd_u32 b) { return halves(a, b); }
OPD_FN opd_u32 upper_halves(opd_u32 a, opd_u32 b) { return halves(a >> 16, b >> 16); }
#endif
