// Masked steps over a block of coordinates or of indices. Active values are gathered into arrays that fit in the L1
// cache, updated with vectors, and scattered. Moments are compact, so they are read and written in full vectors.
#include "cpu.h"

namespace OPD_ISA {
#define OPD_STEP_CAPACITY (OPD_STEP_BLOCK + 32)       // a full vector is written even where only its first values count
#define OPD_STEP_AHEAD OPD_STEP_BLOCK                 // prefetch the next block during a gather: a third less time

struct StepChunk {
  unsigned short offset[OPD_STEP_CAPACITY];           // of each active coordinate from the first of the block
  opd_u16 half[OPD_STEP_CAPACITY];                    // bf16 as it is stored
  float p[OPD_STEP_CAPACITY], g[OPD_STEP_CAPACITY];
  opd_u16 before[OPD_STEP_CAPACITY];                  // bf16 of the weights before the step; only for `changed`
};

// The active coordinates of one block of a bitmap; offsets are filled only where a loop needs them.
struct StepBitmap {
  const unsigned char* bitmap;
  const unsigned short* offset;
  int size, count;                                    // coordinates, active ones
  inline opd_i64 index(int k) const { return offset[k]; }
};

// One block of indices.
template <class Index>
struct StepIndices {
  const Index* indices;
  int count;
  inline opd_i64 index(int k) const { return indices[k]; }
};

// Offsets of the set bits of one block. Returns their number.
static inline int step_offsets(const unsigned char* bitmap, int size, unsigned short* offset) {
  int count = 0;
  for (int first = 0; first < size; first += 64) {
    opd_u64 word = 0;
    const int bytes = size - first >= 64 ? 8 : (size - first + 7) / 8;
    __builtin_memcpy(&word, bitmap + first / 8, bytes);
    for (; word; word &= word - 1) offset[count++] = (unsigned short)(first + __builtin_ctzll(word));
  }
  return count;
}

template <int WRITE, class Index, class Value>
static inline void step_gather(const StepIndices<Index>& at, const Value* from, Value* out) {
  for (int k = 0; k < at.count; k++) out[k] = from[at.indices[k]];
}
template <class Index, class Value>
static inline void step_scatter(const StepIndices<Index>& at, const Value* values, Value* to) {
  for (int k = 0; k < at.count; k++) to[at.indices[k]] = values[k];
}

#if defined(OPD_AVX512)
template <class Mask>
static inline Mask step_mask(const StepBitmap& at, int first) {
  Mask mask = 0;
  const int left = (at.size - first + 7) / 8;
  if (left >= (int)sizeof(Mask)) __builtin_memcpy(&mask, at.bitmap + first / 8, sizeof(Mask));
  else __builtin_memcpy(&mask, at.bitmap + first / 8, left);
  return mask;
}
OPD_FN void step_gather_vector(opd_u16 mask, const float* from, float* out) {
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(mask, _mm512_maskz_loadu_ps(mask, from)));
}
OPD_FN void step_gather_vector(opd_u32 mask, const opd_u16* from, opd_u16* out) {
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(mask, _mm512_maskz_loadu_epi16(mask, from)));
}
OPD_FN void step_scatter_vector(opd_u16 mask, const float* values, float* to) {
  _mm512_mask_storeu_ps(to, mask, _mm512_maskz_expand_ps(mask, _mm512_loadu_ps(values)));
}
OPD_FN void step_scatter_vector(opd_u32 mask, const opd_u16* values, opd_u16* to) {
  _mm512_mask_storeu_epi16(to, mask, _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values)));
}
template <class Value> struct StepMask;
template <> struct StepMask<float> { typedef opd_u16 type; };
template <> struct StepMask<opd_u16> { typedef opd_u32 type; };

template <int WRITE, class Value>
static inline void step_gather(const StepBitmap& at, const Value* from, Value* out) {
  typedef typename StepMask<Value>::type Mask;
  for (int first = 0; first < at.size; first += 8 * (int)sizeof(Mask)) {
    const Mask mask = step_mask<Mask>(at, first);
    __builtin_prefetch(from + first + OPD_STEP_AHEAD, WRITE, 3);
    step_gather_vector(mask, from + first, out);
    out += __builtin_popcount(mask);
  }
}
template <class Value>
static inline void step_scatter(const StepBitmap& at, const Value* values, Value* to) {
  typedef typename StepMask<Value>::type Mask;
  for (int first = 0; first < at.size; first += 8 * (int)sizeof(Mask)) {
    const Mask mask = step_mask<Mask>(at, first);
    step_scatter_vector(mask, values, to + first);
    values += __builtin_popcount(mask);
  }
}
#else
template <int WRITE, class Value>
static inline void step_gather(const StepBitmap& at, const Value* from, Value* out) {
  step_gather<WRITE>(StepIndices<unsigned short>{at.offset, at.count}, from, out);
}
template <class Value>
static inline void step_scatter(const StepBitmap& at, const Value* values, Value* to) {
  step_scatter(StepIndices<unsigned short>{at.offset, at.count}, values, to);
}
#endif

// Loads weights and their residuals as fp32. `base`: first coordinate of the block; `slot`: first element in compact
// arrays.
template <class At>
static inline void step_load_weights(const StepRow* t, const StepOptions* o, opd_i64 base, opd_i64 slot, const At& at,
                                     StepChunk* c) {
  if (!(t->flags & STEP_PARAM_BF16)) return step_gather<1>(at, (const float*)t->param + base, c->p);
  step_gather<1>(at, (const opd_u16*)t->param + base, c->half);
  const opd_u16* residual = t->residual + slot;
  float* p = c->p;
  const opd_u16* half = c->half;
  if (o->precision == STEP_SPLIT_MASTER) {
    OPD_SIMD()
    for (int k = 0; k < at.count; k++) p[k] = step_master(half[k], residual[k]);
  } else if (o->precision == STEP_KAHAN) {
    OPD_SIMD()
    for (int k = 0; k < at.count; k++) p[k] = bf16_to_float(half[k]) + bf16_to_float(residual[k]);
  } else {
    OPD_SIMD()
    for (int k = 0; k < at.count; k++) p[k] = bf16_to_float(half[k]);
  }
}

// Rounds weights to storage and stores them and their residuals.
template <class At>
static inline void step_store_weights(const StepRow* t, const StepOptions* o, opd_i64 base, opd_i64 slot, const At& at,
                                      StepChunk* c) {
  if (!(t->flags & STEP_PARAM_BF16)) return step_scatter(at, (const float*)c->p, (float*)t->param + base);
  opd_u16* residual = t->residual + slot;
  opd_u16* half = c->half;
  const float* p = c->p;
  if (o->precision == STEP_SPLIT_MASTER) {
    OPD_SIMD()
    for (int k = 0; k < at.count; k++) half[k] = step_weight(p[k], residual + k);
  } else if (o->precision == STEP_KAHAN) {
    OPD_SIMD()
    for (int k = 0; k < at.count; k++) {
      half[k] = float_to_bf16(p[k]);
      residual[k] = float_to_bf16(p[k] - bf16_to_float(half[k]));
    }
  } else if (o->precision == STEP_NEAREST) {
    OPD_SIMD()
    for (int k = 0; k < at.count; k++) half[k] = float_to_bf16(p[k]);
  } else {
    const opd_u32 step = step_count(o->scalars + OPD_STEP_SCALARS * t->scalar_row), param_id = t->param_id;
    const opd_i64 first = t->shard_offset + base, seed = o->seed;
    for (int k = 0; k < at.count; k++)
      half[k] = step_stochastic(p[k], step_random(first + at.index(k), param_id, step, seed));
  }
  step_scatter(at, (const opd_u16*)half, (opd_u16*)t->param + base);
}

// bf16 of the weights: as stored, or rounded from fp32.
static inline void step_narrow(const StepRow* t, int count, const StepChunk* c, opd_u16* to) {
  if (t->flags & STEP_PARAM_BF16) {
    __builtin_memcpy(to, c->half, sizeof(opd_u16) * count);
  } else {
    OPD_SIMD()
    for (int k = 0; k < count; k++) to[k] = float_to_bf16(c->p[k]);
  }
}

// Bit k of `packed`: whether active weight k differs from before the step. Bits from `count` on are 0.
static inline void step_compare(const StepRow* t, int count, StepChunk* c, opd_u64* packed) {
  unsigned char differs[OPD_STEP_BLOCK + 64];
  const opd_u16 *before = c->before, *after = c->half;
  if (!(t->flags & STEP_PARAM_BF16)) step_narrow(t, count, c, c->half);
  OPD_SIMD()
  for (int k = 0; k < count; k++) differs[k] = after[k] != before[k];
  __builtin_memset(differs + count, 0, 64);
  for (int first = 0; first < count; first += 64) {
    opd_u64 word = 0;
    for (int byte = 0; byte < 8; byte++) {
      opd_u64 flags;
      __builtin_memcpy(&flags, differs + first + 8 * byte, 8);
      word |= (flags * 0x0102040810204080ull >> 56) << 8 * byte;  // bit i: the lowest bit of byte i
    }
    packed[first / 64] = word;
  }
}

// Sets bits of up to 64 coordinates. Most steps set few that are not set yet.
static inline void step_set(unsigned char* changed, int bytes, opd_u64 bits) {
  opd_u64 old = 0;
  if (!bits) return;
  __builtin_memcpy(&old, changed, bytes);
  const opd_u64 both = old | bits;
  if (both != old) __builtin_memcpy(changed, &both, bytes);
}

// Moves the low bits of `bits` to the set bits of `mask`, in order.
static inline opd_u64 step_deposit(opd_u64 bits, opd_u64 mask) {
#if defined(__BMI2__)
  return _pdep_u64(bits, mask);
#else
  opd_u64 out = 0;
  for (; mask && bits; mask &= mask - 1, bits >>= 1) out |= bits & 1 ? mask & -mask : 0;
  return out;
#endif
}

// Sets the bits of changed weights: of coordinates for a bitmap, of active numbers for indices. A block has whole
// bytes, so that threads share none.
static inline void step_mark(const StepRow* t, opd_i64 base, opd_i64, const StepBitmap& at, StepChunk* c) {
  opd_u64 packed[OPD_STEP_BLOCK / 64 + 1];
  step_compare(t, at.count, c, packed);
  packed[(at.count + 63) / 64] = 0;
  for (int first = 0, k = 0; first < at.size; first += 64) {
    const int bytes = at.size - first >= 64 ? 8 : (at.size - first + 7) / 8;
    opd_u64 mask = 0;
    __builtin_memcpy(&mask, at.bitmap + first / 8, bytes);
    if (!mask) continue;
    const opd_u64 next = k % 64 ? packed[k / 64 + 1] << (64 - k % 64) : 0;
    step_set(t->changed + (base + first) / 8, bytes, step_deposit(packed[k / 64] >> k % 64 | next, mask));
    k += __builtin_popcountll(mask);
  }
}
template <class Index>
static inline void step_mark(const StepRow* t, opd_i64, opd_i64 slot, const StepIndices<Index>& at, StepChunk* c) {
  opd_u64 packed[OPD_STEP_BLOCK / 64];
  step_compare(t, at.count, c, packed);
  for (int k = 0; k < at.count; k += 64)
    step_set(t->changed + (slot + k) / 8, at.count - k >= 64 ? 8 : (at.count - k + 7) / 8, packed[k / 64]);
}

// Loads gradients as fp32, unscaled, clipped and with the sign of a descent.
template <class At>
static inline void step_load_grads(const StepRow* t, const StepOptions* o, opd_i64 base, opd_i64 slot, const At& at,
                                   StepChunk* c) {
  float* g = c->g;
  const int count = at.count;
  if (t->flags & STEP_GRAD_COMPACT) __builtin_memcpy(g, (const float*)t->grad + slot, sizeof(float) * count);
  else if (!(t->flags & STEP_GRAD_BF16)) step_gather<0>(at, (const float*)t->grad + base, g);
  else {
    step_gather<0>(at, (const opd_u16*)t->grad + base, c->half);
    OPD_SIMD()
    for (int k = 0; k < count; k++) g[k] = bf16_to_float(c->half[k]);
  }
  if (o->grad_scale) {
    const float scale = *o->grad_scale;
    OPD_SIMD()
    for (int k = 0; k < count; k++) g[k] /= scale;
  }
  if (o->clip) {
    const float clip = *o->clip;
    OPD_SIMD()
    for (int k = 0; k < count; k++) g[k] *= clip;
  }
  if (o->maximize) {
    OPD_SIMD()
    for (int k = 0; k < count; k++) g[k] = -g[k];
  }
}

OPD_FN float step_init_value(const StepRow* t, opd_i64 k) {
  return t->flags & STEP_PARAM_BF16 ? bf16_to_float(((const opd_u16*)t->init_value)[k])
                                    : ((const float*)t->init_value)[k];
}

static inline void step_adamw_loop(const StepRow* t, const StepOptions* o, opd_i64 slot, int count, float* p,
                                   const float* g) {
  const float* scalars = o->scalars + OPD_STEP_SCALARS * t->scalar_row;
  AdamWScalars s = step_adamw_scalars(scalars);
  float *m = t->exp_avg + slot, *v = t->exp_avg_sq + slot;
  if (t->init_value) {
    for (int k = 0; k < count; k++) {
      const float w0 = step_init_value(t, slot + k);
      p[k] = OPD_FMA(s.decay_factor, p[k] - w0, w0);
    }
    s.decay_factor = 1.0f;
  }
  if (t->step_group) {
    for (int k = 0; k < count; k++) {
      AdamWScalars group = step_adamw_scalars(scalars + OPD_STEP_SCALARS * t->step_group[slot + k]);
      group.decay_factor = s.decay_factor;
      p[k] = step_adamw(p[k], g[k], m + k, v + k, t->max_exp_avg_sq ? t->max_exp_avg_sq + slot + k : 0, group);
    }
  } else if (t->max_exp_avg_sq) {
    float* v_max = t->max_exp_avg_sq + slot;
    OPD_SIMD()
    for (int k = 0; k < count; k++) p[k] = step_adamw(p[k], g[k], m + k, v + k, v_max + k, s);
  } else {
    OPD_SIMD()
    for (int k = 0; k < count; k++) p[k] = step_adamw(p[k], g[k], m + k, v + k, 0, s);
  }
}

static inline void step_sgd_loop(const StepRow* t, const StepOptions* o, opd_i64 slot, int count, float* p,
                                 const float* g) {
  const float* scalars = o->scalars + OPD_STEP_SCALARS * t->scalar_row;
  const SgdScalars s = step_sgd_scalars(scalars);
  const int nesterov = (int)o->nesterov;
  float* buffer = t->exp_avg ? t->exp_avg + slot : 0;
  if (t->step_group || t->init_value) {
    for (int k = 0; k < count; k++) {
      const SgdScalars group =
          t->step_group ? step_sgd_scalars(scalars + OPD_STEP_SCALARS * t->step_group[slot + k]) : s;
      const float pull = t->init_value ? p[k] - step_init_value(t, slot + k) : p[k];
      p[k] = step_sgd(p[k], g[k], pull, buffer ? buffer + k : 0, nesterov, group);
    }
  } else if (buffer) {
    OPD_SIMD()
    for (int k = 0; k < count; k++) p[k] = step_sgd(p[k], g[k], p[k], buffer + k, nesterov, s);
  } else {
    OPD_SIMD()
    for (int k = 0; k < count; k++) p[k] = step_sgd(p[k], g[k], p[k], 0, 0, s);
  }
}

// Processes the active coordinates `at` of the block that begins at coordinate `base`; the first of them is element
// `slot` of the compact arrays.
template <class At>
static inline void step_active(const StepRow* t, const StepOptions* o, opd_i64 base, opd_i64 slot, const At& at,
                               StepChunk* c) {
  float* compact = t->exp_avg ? t->exp_avg + slot : 0;
  switch (o->kind) {
    case STEP_GATHER:
    case STEP_GATHER_ADD: {
      const bool add = o->kind == STEP_GATHER_ADD;
      step_load_grads(t, o, base, slot, at, c);
      OPD_SIMD()
      for (int k = 0; k < at.count; k++) compact[k] = add ? compact[k] + c->g[k] : c->g[k];
      return;
    }
    case STEP_SCATTER:
      __builtin_memcpy(c->p, compact, sizeof(float) * at.count);
      return step_store_weights(t, o, base, slot, at, c);
    default:
      step_load_grads(t, o, base, slot, at, c);
      step_load_weights(t, o, base, slot, at, c);
      if (t->changed) step_narrow(t, at.count, c, c->before);
      if (o->kind == STEP_SGD) step_sgd_loop(t, o, slot, at.count, c->p, c->g);
      else step_adamw_loop(t, o, slot, at.count, c->p, c->g);
      step_store_weights(t, o, base, slot, at, c);
      if (t->changed) step_mark(t, base, slot, at, c);
  }
}

static void step_block(const StepRow* t, const StepOptions* o, opd_i64 block) {
  StepChunk chunk;
  const opd_i64 first = block * OPD_STEP_BLOCK;
  const int size = t->size - first < OPD_STEP_BLOCK ? (int)(t->size - first) : OPD_STEP_BLOCK;
  if (t->flags & STEP_MASK_INDICES_64)
    return step_active(t, o, 0, first, StepIndices<opd_i64>{(const opd_i64*)t->mask + first, size}, &chunk);
  if (t->flags & STEP_MASK_INDICES)
    return step_active(t, o, 0, first, StepIndices<int>{(const int*)t->mask + first, size}, &chunk);
  const opd_i64* counts = t->block_counts + block;
  const StepBitmap at = {(const unsigned char*)t->mask + first / 8, chunk.offset, size, (int)(counts[1] - counts[0])};
  if (!at.count) return;
#if defined(OPD_AVX512)
  const bool needs_offsets = t->flags & STEP_PARAM_BF16 && o->precision == STEP_STOCHASTIC;
#else
  const bool needs_offsets = true;
#endif
  if (needs_offsets) step_offsets(at.bitmap, size, chunk.offset);
  step_active(t, o, first, counts[0], at, &chunk);
}

// Whether the mask of a block is consistent: its bits are as many as block_counts says, its indices ascend within the
// tensor, its step groups have scalars. Kernels follow all of them.
static int step_check(const StepRow* t, opd_i64 block, opd_i64 num_scalar_rows) {
  const opd_i64 first = block * OPD_STEP_BLOCK;
  const int size = t->size - first < OPD_STEP_BLOCK ? (int)(t->size - first) : OPD_STEP_BLOCK;
  opd_i64 slot = first;
  int count = size;
  if (t->flags & STEP_MASK_INDICES) {
    const bool wide = t->flags & STEP_MASK_INDICES_64;
    opd_i64 before = -1;
    if (first) before = wide ? ((const opd_i64*)t->mask)[first - 1] : ((const int*)t->mask)[first - 1];
    for (int k = 0; k < size; k++) {
      const opd_i64 index = wide ? ((const opd_i64*)t->mask)[first + k] : ((const int*)t->mask)[first + k];
      if (index <= before || index >= t->numel) return 0;
      before = index;
    }
  } else {
    const unsigned char* bitmap = (const unsigned char*)t->mask + first / 8;
    const int bytes = (size + 7) / 8;
    count = 0;
    for (int at = 0; at < bytes; at += 8) {
      opd_u64 word = 0;
      __builtin_memcpy(&word, bitmap + at, bytes - at < 8 ? bytes - at : 8);
      count += __builtin_popcountll(word);
    }
    if (size % 8 && bitmap[bytes - 1] >> size % 8) return 0;
    slot = t->block_counts[block];
    if (t->block_counts[block + 1] - slot != count || (block == 0 && slot)) return 0;
  }
  if (t->flags & STEP_HAS_STEP_GROUP) {
    int largest = 0;
    for (int k = 0; k < count; k++) largest = t->step_group[slot + k] > largest ? t->step_group[slot + k] : largest;
    if (t->scalar_row + largest >= num_scalar_rows) return 0;
  }
  return 1;
}

const StepKernels step_kernels = {step_block, step_check};
}  // namespace OPD_ISA
