// The arithmetic of one active coordinate of a masked optimizer step, as torch.optim rounds it (foreach=False, fp32):
// the same operations in the same order, fused where torch's are.
#pragma once
#include "../common/numeric.h"

#if defined(__CUDACC__)
#define OPD_FMA(a, b, c) fmaf(a, b, c)
#define OPD_SQRT(x) sqrtf(x)
#else
#define OPD_FMA(a, b, c) __builtin_fmaf(a, b, c)
#define OPD_SQRT(x) __builtin_sqrtf(x)
#endif

// Layout shared with Python and Triton: opdkernels/ops/step/layout.py, compared with it by
// tests/ops/step/test_layout.py.
#define OPD_STEP_BLOCK 2048       // coordinates between the prefix popcounts of a bitmap
#define OPD_STEP_SCALARS 8        // columns of scalars
#define OPD_STEP_ROW_BYTES 144

enum StepPrecision { STEP_NEAREST = 0, STEP_SPLIT_MASTER = 1, STEP_KAHAN = 2, STEP_STOCHASTIC = 3 };
enum StepKind { STEP_ADAMW = 0, STEP_SGD = 1, STEP_GATHER = 2, STEP_GATHER_ADD = 3, STEP_SCATTER = 4 };
enum StepFlags {
  STEP_PARAM_BF16 = 1, STEP_GRAD_BF16 = 2, STEP_GRAD_COMPACT = 4, STEP_MASK_INDICES = 8, STEP_MASK_INDICES_64 = 16,
  STEP_HAS_INIT_VALUE = 32, STEP_HAS_STEP_GROUP = 64, STEP_HAS_MAX_EXP_AVG_SQ = 128,
  STEP_HAS_CHANGED = 256
};

// One row per tensor. Pointers are null for what is absent.
struct StepRow {
  void* param;                    // fp32 or bf16 [numel]
  const void* grad;               // fp32 or bf16 [numel], or fp32 [num_active]
  const void* mask;               // bitmap [ceil(numel / 8)], or int32 or int64 indices [num_active]
  const opd_i64* block_counts;    // [ceil(numel / OPD_STEP_BLOCK) + 1] of a bitmap
  float* exp_avg;                 // [num_active]; SGD: the momentum buffer; gather and scatter: the compact values
  float* exp_avg_sq;              // [num_active]
  float* max_exp_avg_sq;          // [num_active]
  opd_u16* residual;              // [num_active]
  const void* init_value;         // dtype of param [num_active]
  const unsigned char* step_group;  // [num_active]
  unsigned char* changed;         // bits [ceil(size / 8)]: of coordinates as in the bitmap, or of indices in order
  opd_i64 scalar_row;             // first row of scalars that belongs to the tensor
  opd_i64 shard_offset;           // flat index in the unsharded tensor of the first coordinate
  opd_i64 size;                   // coordinates of a bitmap, or number of indices
  opd_i64 numel;                  // coordinates of the param; indices are below it
  opd_u32 param_id;
  opd_u32 flags;                  // StepFlags
  opd_i64 first_tile;             // tiles of this tensor among the tiles of all; GPUs only
  opd_i64 end_tile;
};
static_assert(sizeof(StepRow) == OPD_STEP_ROW_BYTES, "STEP_ROW in opdkernels/ops/step/layout.py has another size");

// What all tensors of a step share.
struct StepOptions {
  const float* scalars;           // [rows][OPD_STEP_SCALARS]
  const float* grad_scale;        // one element, or null
  const float* clip;              // one element, or null
  opd_i64 maximize, precision, seed, nesterov, kind;
};

// Scalars, each computed in double and rounded once: the columns of a row in the order of layout.py.
struct AdamWScalars {
  float decay_factor, one_minus_beta1, beta2, one_minus_beta2, bias_correction2_sqrt, eps, neg_step_size;
};
struct SgdScalars { float weight_decay, momentum, one_minus_dampening, is_first, neg_step_size; };
OPD_FN AdamWScalars step_adamw_scalars(const float* row) {
  return {row[0], row[1], row[2], row[3], row[4], row[5], row[6]};
}
OPD_FN SgdScalars step_sgd_scalars(const float* row) { return {row[0], row[1], row[2], row[3], row[6]}; }
// The step count, which stochastic rounding is keyed by.
OPD_FN opd_u32 step_count(const float* row) { return (opd_u32)row[OPD_STEP_SCALARS - 1]; }

OPD_FN float step_lerp(float a, float b, float weight) {
  return weight < 0.5f ? OPD_FMA(weight, b - a, a) : OPD_FMA(weight - 1.0f, b - a, b);
}

// The new weight. Updates m and v, and v_max, the largest v so far, which is null without amsgrad.
OPD_FN float step_adamw(float p, float g, float* m, float* v, float* v_max, AdamWScalars s) {
  p *= s.decay_factor;
  *m = step_lerp(*m, g, s.one_minus_beta1);
  *v = OPD_FMA(s.one_minus_beta2 * g, g, *v * s.beta2);
  float second = *v;
  if (v_max) {
    const bool nan = *v_max != *v_max || second != second;
    second = nan ? *v_max + second : second > *v_max ? second : *v_max;  // NaN propagates
    *v_max = second;
  }
  return p + s.neg_step_size * *m / (OPD_SQRT(second) / s.bias_correction2_sqrt + s.eps);
}

// The new weight. `pull` is what weight decay shrinks: the weight, or its difference from the initial value. Updates
// the momentum buffer, which is null without momentum.
OPD_FN float step_sgd(float p, float g, float pull, float* buffer, int nesterov, SgdScalars s) {
  if (s.weight_decay != 0.0f) g = OPD_FMA(s.weight_decay, pull, g);
  if (buffer) {
    *buffer = s.is_first != 0.0f ? g : OPD_FMA(s.one_minus_dampening, g, *buffer * s.momentum);
    g = nesterov ? OPD_FMA(s.momentum, *buffer, g) : *buffer;
  }
  return OPD_FMA(s.neg_step_size, g, p);
}

// split_master: a bf16 weight and the 16 bits that it lacks of an fp32 master. The weight is the master rounded to
// nearest, ties away from zero, so that the top bit of the remainder says which way it was rounded. A zero with a
// remainder that would have rounded it up cannot come from a step: the weight was set elsewhere, and the remainder is
// ignored.
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

// The random word of a coordinate by its index in the unsharded tensor: the same for every sharding.
OPD_FN opd_u32 step_random(opd_i64 index, opd_u32 param_id, opd_u32 step, opd_i64 seed) {
  return step_philox((opd_u32)index, (opd_u32)(index >> 32), param_id, step, (opd_u32)seed, (opd_u32)(seed >> 32));
}

// Stochastic rounding to bf16: up with the probability of the dropped fraction. Inf and NaN are rounded to nearest.
OPD_FN opd_u16 step_stochastic(float x, opd_u32 random) {
  const opd_u32 bits = float_bits(x);
  return (bits & 0x7F800000u) == 0x7F800000u ? float_to_bf16(x) : (opd_u16)((bits + (random & 0xFFFFu)) >> 16);
}
