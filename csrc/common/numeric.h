// How numbers are widened, rounded and summed, and the constants of every kernel family. Compiled by g++, clang, nvcc
// and NVRTC alike; includes nothing. opdkernels/backends/layout.py repeats the constants (tests/ops/test_layout.py
// compares).
#pragma once

#if defined(__CUDACC__)
#define OPD_FN __host__ __device__ __forceinline__
#else
#define OPD_FN static inline __attribute__((always_inline))
#endif

typedef unsigned short opd_u16;
typedef unsigned int opd_u32;
typedef unsigned long long opd_u64;
typedef long long opd_i64;

enum Dtype { BF16 = 0, FP16 = 1, FP32 = 2, FP64 = 3 };
OPD_FN int element_bytes(int dtype) { return dtype == FP64 ? 8 : dtype == FP32 ? 4 : 2; }

#define OPD_BINS 32768            // magnitudes of bfloat16: bins of a histogram
#define OPD_INFINITY_BITS 0x7F80u // magnitude bits of bfloat16 infinity; NaN is above, every finite magnitude below

// Bit patterns of floats. A union is defined behaviour in GCC, Clang and NVCC, vectorises, and needs no header.
OPD_FN opd_u32 float_bits(float x) { union { float f; opd_u32 u; } c; c.f = x; return c.u; }
OPD_FN float bits_float(opd_u32 u) { union { opd_u32 u; float f; } c; c.u = u; return c.f; }
OPD_FN opd_u64 double_bits(double x) { union { double f; opd_u64 u; } c; c.f = x; return c.u; }
OPD_FN double bits_double(opd_u64 u) { union { opd_u64 u; double f; } c; c.u = u; return c.f; }

// bfloat16: the upper half of a float.
OPD_FN float bf16_to_float(opd_u16 b) { return bits_float((opd_u32)b << 16); }
// Rounds to nearest even. A NaN stays a (quiet) NaN; overflow goes to infinity, as in hardware.
OPD_FN opd_u16 float_to_bf16(float x) {
  opd_u32 u = float_bits(x);
  opd_u32 nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
  opd_u32 rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return (opd_u16)(nan ? (u >> 16) | 0x40u : rounded);
}

// IEEE half, widened exactly. Scaling by 2^112 turns the 5-bit exponent into an 8-bit one and handles subnormals.
OPD_FN float fp16_to_float(opd_u16 h) {
  opd_u32 magnitude = (opd_u32)(h & 0x7FFFu) << 13;
  float scaled = bits_float(magnitude) * 5.192296858534828e33f;  // 2^112
  opd_u32 special = magnitude >= 0x0F800000u;                     // Inf or NaN: exponent all ones
  opd_u32 bits = special ? (magnitude | 0x7F800000u) : float_bits(scaled);
  return bits_float(bits | ((opd_u32)(h & 0x8000u) << 16));
}

// Exact sums. A double is an integer times 2^-1074; a sum is stored as OPD_SUM_LIMBS signed 64-bit limbs of radix 2^32
// in that unit. Values here are finite in bfloat16, so squares stay below 2^256: 44 limbs hold 2^63 of them. Integer
// addition is associative, so the order, the number of threads and the slicing cannot change a sum.
#define OPD_SUM_LIMBS 44
#define OPD_SUM_SHIFT 1074

// Adds integer * 2^shift units (shift >= 0).
OPD_FN void sum_add(opd_i64* limbs, opd_i64 integer, int shift) {
  int limb = shift >> 5, bits = shift & 31;
  opd_i64 low = integer & 0xFFFFFFFF, high = integer >> 32;      // integer = high * 2^32 + low, low >= 0
  opd_u64 shifted = (opd_u64)low << bits;                        // < 2^63
  limbs[limb] += (opd_i64)(shifted & 0xFFFFFFFFu);
  opd_i64 middle = (opd_i64)(shifted >> 32);
  opd_i64 upper_low = (high & 0xFFFFFFFF);
  opd_i64 upper_high = high >> 32;                               // 0 or -1
  opd_u64 upper = (opd_u64)upper_low << bits;
  limbs[limb + 1] += middle + (opd_i64)(upper & 0xFFFFFFFFu);
  limbs[limb + 2] += (opd_i64)(upper >> 32);
  if (upper_high) limbs[limb + 2] -= (opd_i64)1 << bits;         // sign extension of the top word
}
