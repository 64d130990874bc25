// Masked steps over a block of coordinates or of places: active values are taken into arrays that lie in the first cache,
// stepped with vectors, and put back. Moments are compact, so they are read and written in whole vectors.

#define OPD_STEP_ROOM (OPD_STEP_BLOCK + 32)           // a whole vector is written where its first values count
#define OPD_STEP_AHEAD OPD_STEP_BLOCK                 // the next block is asked for while this one is taken: a third less time

struct StepChunk {
  unsigned short offset[OPD_STEP_ROOM];               // of each active coordinate from the first of the block
  opd_u16 half[OPD_STEP_ROOM];                        // bf16 as it is stored
  float p[OPD_STEP_ROOM], g[OPD_STEP_ROOM];
};

// Active coordinates of one block as its bits; offsets only where a loop needs them.
struct StepBits {
  const unsigned char* bits;
  const unsigned short* offset;
  int coordinates, count;
  inline opd_i64 place(int k) const { return offset[k]; }
};

template <class Place>
struct StepPlaces {
  const Place* places;
  int count;
  inline opd_i64 place(int k) const { return places[k]; }
};

// Offsets of the set bits of one block. Returns how many.
static inline int step_offsets(const unsigned char* bits, int coordinates, unsigned short* offset) {
  int count = 0;
  for (int first = 0; first < coordinates; first += 64) {
    opd_u64 word = 0;
    const int bytes = coordinates - first >= 64 ? 8 : (coordinates - first + 7) / 8;
    __builtin_memcpy(&word, bits + first / 8, bytes);
    for (; word; word &= word - 1) offset[count++] = (unsigned short)(first + __builtin_ctzll(word));
  }
  return count;
}

template <int WRITE, class Place, class Value>
static inline void step_take(const StepPlaces<Place>& at, const Value* from, Value* out) {
  for (int k = 0; k < at.count; k++) out[k] = from[at.places[k]];
}
template <class Place, class Value>
static inline void step_put(const StepPlaces<Place>& at, const Value* values, Value* to) {
  for (int k = 0; k < at.count; k++) to[at.places[k]] = values[k];
}

#if defined(OPD_AVX512)
template <class Mask>
static inline Mask step_mask(const StepBits& at, int first) {
  Mask mask = 0;
  const int left = (at.coordinates - first + 7) / 8;
  if (left >= (int)sizeof(Mask)) __builtin_memcpy(&mask, at.bits + first / 8, sizeof(Mask));
  else __builtin_memcpy(&mask, at.bits + first / 8, left);
  return mask;
}
OPD_FN void step_take_vector(opd_u16 mask, const float* from, float* out) {
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(mask, _mm512_maskz_loadu_ps(mask, from)));
}
OPD_FN void step_take_vector(opd_u32 mask, const opd_u16* from, opd_u16* out) {
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(mask, _mm512_maskz_loadu_epi16(mask, from)));
}
OPD_FN void step_put_vector(opd_u16 mask, const float* values, float* to) {
  _mm512_mask_storeu_ps(to, mask, _mm512_maskz_expand_ps(mask, _mm512_loadu_ps(values)));
}
OPD_FN void step_put_vector(opd_u32 mask, const opd_u16* values, opd_u16* to) {
  _mm512_mask_storeu_epi16(to, mask, _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values)));
}
template <class Value> struct StepMask;
template <> struct StepMask<float> { typedef opd_u16 type; };
template <> struct StepMask<opd_u16> { typedef opd_u32 type; };

template <int WRITE, class Value>
static inline void step_take(const StepBits& at, const Value* from, Value* out) {
  typedef typename StepMask<Value>::type Mask;
  for (int first = 0; first < at.coordinates; first += 8 * (int)sizeof(Mask)) {
    const Mask mask = step_mask<Mask>(at, first);
    __builtin_prefetch(from + first + OPD_STEP_AHEAD, WRITE, 3);
    step_take_vector(mask, from + first, out);
    out += __builtin_popcount(mask);
  }
}
template <class Value>
static inline void step_put(const StepBits& at, const Value* values, Value* to) {
  typedef typename StepMask<Value>::type Mask;
  for (int first = 0; first < at.coordinates; first += 8 * (int)sizeof(Mask)) {
    const Mask mask = step_mask<Mask>(at, first);
    step_put_vector(mask, values, to + first);
    values += __builtin_popcount(mask);
  }
}
#else
template <int WRITE, class Value>
static inline void step_take(const StepBits& at, const Value* from, Value* out) {
  step_take<WRITE>(StepPlaces<unsigned short>{at.offset, at.count}, from, out);
}
template <class Value>
static inline void step_put(const StepBits& at, const Value* values, Value* to) {
  step_put(StepPlaces<unsigned short>{at.offset, at.count}, values, to);
}
#endif

// Weights with what they lack, `extra`, in fp32.
template <class At>
static inline void step_load_weights(const StepTensor* t, opd_i64 base, opd_i64 active, const At& at, StepChunk* c) {
  if (t->param_dtype == FP32) return step_take<1>(at, (const float*)t->param + base, c->p);
  step_take<1>(at, (const opd_u16*)t->param + base, c->half);
  const opd_u16* extra = (const opd_u16*)t->extra + active;
  float* p = c->p;
  const opd_u16* half = c->half;
  if (t->precision == STEP_EXACT) {
    OPD_SIMD()
    for (int k = 0; k < at.count; k++) p[k] = step_master(half[k], extra[k]);
  } else if (t->precision == STEP_KAHAN) {
    OPD_SIMD()
    for (int k = 0; k < at.count; k++) p[k] = bf16_to_float(half[k]) + bf16_to_float(extra[k]);
  } else {
    OPD_SIMD()
    for (int k = 0; k < at.count; k++) p[k] = bf16_to_float(half[k]);
  }
}

template <class At>
static inline void step_store_weights(const StepTensor* t, opd_i64 base, opd_i64 active, const At& at, StepChunk* c) {
  if (t->param_dtype == FP32) return step_put(at, (const float*)c->p, (float*)t->param + base);
  opd_u16* extra = (opd_u16*)t->extra + active;
  opd_u16* half = c->half;
  const float* p = c->p;
  if (t->precision == STEP_EXACT) {
    OPD_SIMD()
    for (int k = 0; k < at.count; k++) half[k] = step_weight(p[k], extra + k);
  } else if (t->precision == STEP_KAHAN) {
    OPD_SIMD()
    for (int k = 0; k < at.count; k++) {
      half[k] = float_to_bf16(p[k]);
      extra[k] = float_to_bf16(p[k] - bf16_to_float(half[k]));
    }
  } else if (t->precision == STEP_NEAREST) {
    OPD_SIMD()
    for (int k = 0; k < at.count; k++) half[k] = float_to_bf16(p[k]);
  } else {
    const opd_u32 step = (opd_u32)t->scalars[OPD_STEP_SCALARS - 1], tensor = (opd_u32)t->ordinal;
    for (int k = 0; k < at.count; k++) {
      const opd_u64 place = (opd_u64)(t->start + base + at.place(k));
      half[k] = step_stochastic(p[k], step_philox((opd_u32)place, (opd_u32)(place >> 32), tensor, step, (opd_u32)t->seed, (opd_u32)(t->seed >> 32)));
    }
  }
  step_put(at, (const opd_u16*)half, (opd_u16*)t->param + base);
}

template <class At>
static inline void step_load_grads(const StepTensor* t, opd_i64 base, opd_i64 active, const At& at, StepChunk* c) {
  float* g = c->g;
  const int count = at.count;
  if (t->compact) __builtin_memcpy(g, (const float*)t->grad + active, sizeof(float) * count);
  else if (t->grad_dtype == FP32) step_take<0>(at, (const float*)t->grad + base, g);
  else {
    step_take<0>(at, (const opd_u16*)t->grad + base, c->half);
    OPD_SIMD()
    for (int k = 0; k < count; k++) g[k] = bf16_to_float(c->half[k]);
  }
  if (t->grad_scale) {
    const float scale = *t->grad_scale;
    OPD_SIMD()
    for (int k = 0; k < count; k++) g[k] /= scale;
  }
  if (t->clip) {
    const float clip = *t->clip;
    OPD_SIMD()
    for (int k = 0; k < count; k++) g[k] *= clip;
  }
  if (t->maximize) {
    OPD_SIMD()
    for (int k = 0; k < count; k++) g[k] = -g[k];
  }
}

OPD_FN float step_init(const StepTensor* t, opd_i64 k) {
  return t->param_dtype == FP32 ? ((const float*)t->init)[k] : bf16_to_float(((const opd_u16*)t->init)[k]);
}

static inline void step_adamw_loop(const StepTensor* t, opd_i64 active, int count, float* p, const float* g) {
  AdamWScalars s = step_adamw_scalars(t->scalars);
  float *m = t->exp_avg + active, *v = t->exp_avg_sq + active;
  if (t->init) {
    for (int k = 0; k < count; k++) {
      const float w0 = step_init(t, active + k);
      p[k] = OPD_FMA(s.decay, p[k] - w0, w0);
    }
    s.decay = 1.0f;
  }
  if (t->cohort) {
    for (int k = 0; k < count; k++) {
      const float* row = t->scalars + OPD_STEP_SCALARS * t->cohort[active + k];
      AdamWScalars own = step_adamw_scalars(row);
      own.decay = s.decay;
      p[k] = step_adamw(p[k], g[k], m + k, v + k, t->most ? t->most + active + k : 0, own);
    }
  } else if (t->most) {
    float* most = t->most + active;
    OPD_SIMD()
    for (int k = 0; k < count; k++) p[k] = step_adamw(p[k], g[k], m + k, v + k, most + k, s);
  } else {
    OPD_SIMD()
    for (int k = 0; k < count; k++) p[k] = step_adamw(p[k], g[k], m + k, v + k, 0, s);
  }
}

static inline void step_sgd_loop(const StepTensor* t, opd_i64 active, int count, float* p, const float* g) {
  const SgdScalars s = step_sgd_scalars(t->scalars);
  float* buffer = t->exp_avg ? t->exp_avg + active : 0;
  if (t->cohort || t->init) {
    for (int k = 0; k < count; k++) {
      const SgdScalars own = t->cohort ? step_sgd_scalars(t->scalars + OPD_STEP_SCALARS * t->cohort[active + k]) : s;
      const float pull = t->init ? p[k] - step_init(t, active + k) : p[k];
      p[k] = step_sgd(p[k], g[k], pull, buffer ? buffer + k : 0, t->nesterov, own);
    }
  } else if (buffer) {
    const int nesterov = t->nesterov;
    OPD_SIMD()
    for (int k = 0; k < count; k++) p[k] = step_sgd(p[k], g[k], p[k], buffer + k, nesterov, s);
  } else {
    OPD_SIMD()
    for (int k = 0; k < count; k++) p[k] = step_sgd(p[k], g[k], p[k], 0, 0, s);
  }
}

// The active coordinates `at`, from coordinate `base`; the first of them is number `active` of the tensor's.
template <class At>
static inline void step_active(const StepTensor* t, opd_i64 base, opd_i64 active, const At& at, StepChunk* c) {
  float* compact = t->exp_avg ? t->exp_avg + active : 0;
  switch (t->kind) {
    case STEP_TAKE:
    case STEP_ADD:
      step_load_grads(t, base, active, at, c);
      OPD_SIMD()
      for (int k = 0; k < at.count; k++) compact[k] = t->kind == STEP_ADD ? compact[k] + c->g[k] : c->g[k];
      return;
    case STEP_PUT:
      __builtin_memcpy(c->p, compact, sizeof(float) * at.count);
      break;
    default:
      step_load_grads(t, base, active, at, c);
      step_load_weights(t, base, active, at, c);
      if (t->kind == STEP_SGD) step_sgd_loop(t, active, at.count, c->p, c->g);
      else step_adamw_loop(t, active, at.count, c->p, c->g);
  }
  step_store_weights(t, base, active, at, c);
}

static void step_block(const StepTensor* t, opd_i64 block) {
  StepChunk chunk;
  if (t->bits) {
    const opd_i64 base = block * OPD_STEP_BLOCK;
    const int coordinates = t->n - base < OPD_STEP_BLOCK ? (int)(t->n - base) : OPD_STEP_BLOCK;
    const StepBits at = {t->bits + base / 8, chunk.offset, coordinates, (int)(t->offsets[block + 1] - t->offsets[block])};
    if (!at.count) return;
#if defined(OPD_AVX512)
    const bool needs_offsets = t->param_dtype == BF16 && t->precision == STEP_STOCHASTIC;
#else
    const bool needs_offsets = true;
#endif
    if (needs_offsets) step_offsets(at.bits, coordinates, chunk.offset);
    step_active(t, base, t->offsets[block], at, &chunk);
    return;
  }
  const opd_i64 first = block * OPD_STEP_BLOCK;
  const int count = t->active - first < OPD_STEP_BLOCK ? (int)(t->active - first) : OPD_STEP_BLOCK;
  if (t->wide_places) step_active(t, 0, first, StepPlaces<opd_i64>{(const opd_i64*)t->places + first, count}, &chunk);
  else step_active(t, 0, first, StepPlaces<int>{(const int*)t->places + first, count}, &chunk);
}
