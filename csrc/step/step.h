// The arithmetic of one active coordinate of a masked optimizer step, as torch.optim rounds it (foreach=False, fp32): the same
// operations in the same order, fused where torch's are.
#pragma once
#include "../common/numeric.h"

#if defined(__CUDACC__)
#define OPD_FMA(a, b, c) fmaf(a, b, c)
#define OPD_SQRT(x) sqrtf(x)
#else
#define OPD_FMA(a, b, c) __builtin_fmaf(a, b, c)
#define OPD_SQRT(x) __builtin_sqrtf(x)
#endif

// Scalars, each computed in double and rounded once: rows of OPD_STEP_SCALARS in the order of opdkernels/ops/step/__init__.py.
#define OPD_STEP_SCALARS 8
struct AdamWScalars { float decay, weight, beta2, square, bias, eps, size; };
struct SgdScalars { float decay, momentum, damp, first, size; };
OPD_FN AdamWScalars step_adamw_scalars(const float* row) { return {row[0], row[1], row[2], row[3], row[4], row[5], row[6]}; }
OPD_FN SgdScalars step_sgd_scalars(const float* row) { return {row[0], row[1], row[2], row[3], row[6]}; }

enum StepPrecision { STEP_NEAREST = 0, STEP_EXACT = 1, STEP_KAHAN = 2, STEP_STOCHASTIC = 3 };

OPD_FN float step_lerp(float a, float b, float weight) {
  return weight < 0.5f ? OPD_FMA(weight, b - a, a) : OPD_FMA(weight - 1.0f, b - a, b);
}

// m and v are moved on; the largest v so far, where amsgrad keeps it, is `most`, else null.
OPD_FN float step_adamw(float p, float g, float* m, float* v, float* most, AdamWScalars s) {
  p *= s.decay;
  *m = step_lerp(*m, g, s.weight);
  *v = OPD_FMA(s.square * g, g, *v * s.beta2);
  float second = *v;
  if (most) {
    second = *most != *most || second != second ? *most + second : second > *most ? second : *most;  // a NaN stays
    *most = second;
  }
  return p + s.size * *m / (OPD_SQRT(second) / s.bias + s.eps);
}

// `pull` is what weight decay draws to zero: the weight, or its distance from where it began. The buffer is null without momentum.
OPD_FN float step_sgd(float p, float g, float pull, float* buffer, int nesterov, SgdScalars s) {
  if (s.decay != 0.0f) g = OPD_FMA(s.decay, pull, g);
  if (buffer) {
    *buffer = s.first != 0.0f ? g : OPD_FMA(s.damp, g, *buffer * s.momentum);
    g = nesterov ? OPD_FMA(s.momentum, *buffer, g) : *buffer;
  }
  return OPD_FMA(s.size, g, p);
}

// A bf16 weight and the 16 bits that it lacks of an fp32 master. The weight is the master rounded to nearest, ties away from
// zero, so that the bits alone tell which way it was rounded. A zero that would have been rounded up from below is not of a
// step's making: someone else set the weight, and the remainder is none of its.
OPD_FN float step_master(opd_u16 weight, opd_u16 remainder) {
  if (!(weight & 0x7FFFu) && (remainder >> 15)) remainder = 0;
  return bits_float(((opd_u32)(opd_u16)(weight - (remainder >> 15)) << 16) | remainder);
}
OPD_FN opd_u16 step_weight(float master, opd_u16* remainder) {
  const opd_u32 bits = float_bits(master);
  const opd_u32 nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  *remainder = (opd_u16)(nan ? 0u : bits);
  return (opd_u16)(nan ? (bits >> 16) | 0x40u : (bits + 0x8000u) >> 16);
}

// Philox4x32-10 (Salmon et al. 2011), the first of its four words.
OPD_FN opd_u32 step_philox(opd_u32 c0, opd_u32 c1, opd_u32 c2, opd_u32 c3, opd_u32 k0, opd_u32 k1) {
  for (int round = 0; round < 10; round++) {
    const opd_u64 a = (opd_u64)0xD2511F53u * c0, b = (opd_u64)0xCD9E8D57u * c2;
    const opd_u32 n0 = (opd_u32)(b >> 32) ^ c1 ^ k0, n2 = (opd_u32)(a >> 32) ^ c3 ^ k1;
    c1 = (opd_u32)b, c3 = (opd_u32)a, c0 = n0, c2 = n2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c0;
}

// bf16 up or down with the odds of what lies between; what is not finite is only rounded.
OPD_FN opd_u16 step_stochastic(float x, opd_u32 random) {
  const opd_u32 bits = float_bits(x);
  return (bits & 0x7F800000u) == 0x7F800000u ? float_to_bf16(x) : (opd_u16)((bits + (random & 0xFFFFu)) >> 16);
}
