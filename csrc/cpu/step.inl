// Masked steps over a block of coordinates or of places: active values are gathered into arrays that lie in the first cache,
// stepped with vectors, and scattered back. Moments are compact, so they are read and written in whole vectors.

struct StepChunk {
  unsigned short offset[OPD_STEP_BLOCK];              // of each active coordinate from the first of the block
  float p[OPD_STEP_BLOCK], g[OPD_STEP_BLOCK];
};

// Places of the set bits of one block, from its first coordinate.
static inline int step_places(const unsigned char* bits, int coordinates, unsigned short* offset) {
  int count = 0;
  for (int first = 0; first < coordinates; first += 64) {
    opd_u64 word = 0;
    const int bytes = coordinates - first >= 64 ? 8 : (coordinates - first + 7) / 8;
    __builtin_memcpy(&word, bits + first / 8, bytes);
    for (; word; word &= word - 1) offset[count++] = (unsigned short)(first + __builtin_ctzll(word));
  }
  return count;
}

template <class Place>
static inline void step_load(const void* data, int dtype, opd_i64 base, const Place* place, int count, float* into) {
  if (dtype == FP32) {
    const float* from = (const float*)data + base;
    for (int k = 0; k < count; k++) into[k] = from[place[k]];
  } else {
    const opd_u16* from = (const opd_u16*)data + base;
    for (int k = 0; k < count; k++) into[k] = bf16_to_float(from[place[k]]);
  }
}

// Weights with what they lack, `extra`, in fp32.
template <class Place>
static inline void step_load_weights(const StepTensor* t, opd_i64 base, opd_i64 active, const Place* place, int count, float* p) {
  const opd_u16* from = (const opd_u16*)t->param + base;
  const opd_u16* extra = (const opd_u16*)t->extra + active;
  if (t->param_dtype == FP32 || t->precision == STEP_NEAREST || t->precision == STEP_STOCHASTIC) step_load(t->param, t->param_dtype, base, place, count, p);
  else if (t->precision == STEP_EXACT)
    for (int k = 0; k < count; k++) p[k] = step_master(from[place[k]], extra[k]);
  else
    for (int k = 0; k < count; k++) p[k] = bf16_to_float(from[place[k]]) + bf16_to_float(extra[k]);
}

template <class Place>
static inline void step_store_weights(const StepTensor* t, opd_i64 base, opd_i64 active, const Place* place, int count, const float* p) {
  opd_u16* to = (opd_u16*)t->param + base;
  opd_u16* extra = (opd_u16*)t->extra + active;
  if (t->param_dtype == FP32) {
    float* wide = (float*)t->param + base;
    for (int k = 0; k < count; k++) wide[place[k]] = p[k];
  } else if (t->precision == STEP_NEAREST) {
    for (int k = 0; k < count; k++) to[place[k]] = float_to_bf16(p[k]);
  } else if (t->precision == STEP_EXACT) {
    for (int k = 0; k < count; k++) to[place[k]] = step_weight(p[k], extra + k);
  } else if (t->precision == STEP_KAHAN) {
    for (int k = 0; k < count; k++) {
      const opd_u16 weight = float_to_bf16(p[k]);
      to[place[k]] = weight;
      extra[k] = float_to_bf16(p[k] - bf16_to_float(weight));
    }
  } else {
    const opd_u32 step = (opd_u32)t->step, tensor = (opd_u32)t->ordinal;
    for (int k = 0; k < count; k++) {
      const opd_u64 at = (opd_u64)(t->start + base + place[k]);
      to[place[k]] = step_stochastic(p[k], step_philox((opd_u32)at, (opd_u32)(at >> 32), tensor, step, (opd_u32)t->seed, (opd_u32)(t->seed >> 32)));
    }
  }
}

static inline void step_scale(const StepTensor* t, int count, float* g) {
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

// `count` active coordinates at `place` from coordinate `base`; the first of them is number `active` of the tensor's.
template <class Place>
static inline void step_active(const StepTensor* t, opd_i64 base, opd_i64 active, const Place* place, int count, float* p, float* g) {
  step_load_weights(t, base, active, place, count, p);
  if (t->compact) __builtin_memcpy(g, (const float*)t->grad + active, sizeof(float) * count);
  else step_load(t->grad, t->grad_dtype, base, place, count, g);
  step_scale(t, count, g);
  float *m = t->exp_avg + active, *v = t->exp_avg_sq + active;
  const AdamWScalars s = t->scalars;
  if (t->most) {
    float* most = t->most + active;
    OPD_SIMD()
    for (int k = 0; k < count; k++) p[k] = step_adamw(p[k], g[k], m + k, v + k, most + k, s);
  } else {
    OPD_SIMD()
    for (int k = 0; k < count; k++) p[k] = step_adamw(p[k], g[k], m + k, v + k, 0, s);
  }
  step_store_weights(t, base, active, place, count, p);
}

static void step_block(const StepTensor* t, opd_i64 block) {
  StepChunk chunk;
  if (t->bits) {
    const opd_i64 base = block * OPD_STEP_BLOCK;
    const int coordinates = t->n - base < OPD_STEP_BLOCK ? (int)(t->n - base) : OPD_STEP_BLOCK;
    const int count = step_places(t->bits + base / 8, coordinates, chunk.offset);
    if (count) step_active(t, base, t->offsets[block], chunk.offset, count, chunk.p, chunk.g);
    return;
  }
  const opd_i64 first = block * OPD_STEP_BLOCK;
  const int count = t->active - first < OPD_STEP_BLOCK ? (int)(t->active - first) : OPD_STEP_BLOCK;
  if (t->wide_places) step_active(t, 0, first, (const opd_i64*)t->places + first, count, chunk.p, chunk.g);
  else step_active(t, 0, first, (const int*)t->places + first, count, chunk.p, chunk.g);
}
