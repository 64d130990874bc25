// `delta` with one increment per coordinate in bfloat16 pairs and two in wider ones, for AVX2 and AVX-512.
//
// A step is from one bfloat16 to the next, a difference of 1 between bits. v is usually within OPD_STEPS of w. Such a
// coordinate is counted once, in by_step[v - w][w]; the tables of the visible view follow from that when the counts of
// a thread are folded (cpu.cpp). Coordinates with more steps wait in a queue for `count_changed`. A block with values
// that this cannot count is passed to `fallback`, the loops of cpu.inl.
#pragma once
#if defined(OPD_AVX2) || defined(OPD_AVX512)

namespace OPD_ISA {
#if defined(OPD_AVX512)
#define OPD_V(name) _mm512_##name
typedef __m512i Ints;
typedef __m512 Floats;
typedef __m512d Doubles;
typedef __m256i HalfInts;
typedef opd_u16 LaneBits;    // one bit per 32-bit lane
typedef opd_u32 ShortBits;   // one bit per 16-bit lane
OPD_FN ShortBits equal_shorts(Ints a, Ints b) { return _mm512_cmpeq_epi16_mask(a, b); }
OPD_FN LaneBits equal_ints(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask(a, b); }
OPD_FN LaneBits equal_low_bytes(Ints a, Ints b) { return _mm512_testn_epi32_mask(a ^ b, _mm512_set1_epi32(0xFF)); }
OPD_FN Ints where_equal(Ints a, Ints b, Ints then, Ints otherwise) {
  return _mm512_mask_mov_epi32(otherwise, _mm512_cmpeq_epi32_mask(a, b), then);
}
OPD_FN Ints add_where_greater(Ints counts, Ints a, Ints b) {
  return _mm512_mask_add_epi32(counts, _mm512_cmpgt_epi32_mask(a, b), counts, _mm512_set1_epi32(1));
}
OPD_FN HalfInts load_half(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
OPD_FN Doubles low_doubles(Floats x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
OPD_FN Doubles high_doubles(Floats x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
#else
#define OPD_V(name) _mm256_##name
typedef __m256i Ints;
typedef __m256 Floats;
typedef __m256d Doubles;
typedef __m128i HalfInts;
typedef unsigned char LaneBits;
typedef opd_u16 ShortBits;
OPD_FN ShortBits equal_shorts(Ints a, Ints b) {
  const Ints equal = _mm256_cmpeq_epi16(a, b);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(equal), _mm256_extracti128_si256(equal, 1));
  return (ShortBits)_mm_movemask_epi8(bytes);
}
OPD_FN LaneBits equal_ints(Ints a, Ints b) { return (LaneBits)_mm256_movemask_ps((Floats)_mm256_cmpeq_epi32(a, b)); }
OPD_FN LaneBits equal_low_bytes(Ints a, Ints b) {
  return (LaneBits)_mm256_movemask_ps((Floats)_mm256_slli_epi32(_mm256_cmpeq_epi8(a, b), 24));
}
OPD_FN Ints where_equal(Ints a, Ints b, Ints then, Ints otherwise) {
  return _mm256_blendv_epi8(otherwise, then, _mm256_cmpeq_epi32(a, b));
}
OPD_FN Ints add_where_greater(Ints counts, Ints a, Ints b) {
  return _mm256_sub_epi32(counts, _mm256_cmpgt_epi32(a, b));
}
OPD_FN HalfInts load_half(const void* p) { return _mm_loadu_si128((const __m128i*)p); }
OPD_FN Doubles low_doubles(Floats x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
OPD_FN Doubles high_doubles(Floats x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
#endif
constexpr int LANES = sizeof(Floats) / 4;  // of 32 bits

// Sixteen bytes in each quarter or half of a vector.
OPD_FN Ints repeat_bytes(const unsigned char* bytes) {
  unsigned char all[sizeof(Ints)];
  for (int i = 0; i < (int)sizeof all; i += 16) __builtin_memcpy(all + i, bytes, 16);
  return (Ints)OPD_V(loadu_ps)((const float*)all);
}

template <class T, class V>
OPD_FN T reduce(V vector, T start, T (*combine)(T, T)) {
  T lanes[sizeof(V) / sizeof(T)];
  __builtin_memcpy(lanes, &vector, sizeof lanes);
  for (T lane : lanes) start = combine(start, lane);
  return start;
}
template <class T> OPD_FN T smaller_of(T a, T b) { return a < b ? a : b; }
template <class T> OPD_FN T larger_of(T a, T b) { return a > b ? a : b; }
template <class T> OPD_FN T sum_of(T a, T b) { return (T)(a + b); }

// Appends base + i for each set bit i of 64; writes up to four entries beyond the last.
OPD_FN int append_positions(opd_u64 bits, int base, int* to, int n) {
  const int count = __builtin_popcountll(bits);
  int* at = to + n;
  for (int j = 0; j < 4 || j < count; j++) {
    at[j] = base + __builtin_ctzll(bits | 1ull << 63);
    bits &= bits - 1;
  }
  return n + count;
}
// The positions of the set bits among n of `words`, n a multiple of 64.
template <class Word>
OPD_FN int positions_of(const Word* words, int n, int* to) {
  int count = 0;
  for (int i = 0; i < n; i += 64) {
    opd_u64 bits;
    __builtin_memcpy(&bits, words + i / (8 * (int)sizeof(Word)), 8);
    count = append_positions(bits, i, to, count);
  }
  return count;
}

// The bins of |w| that a block counted; `smallest` is that of the values that are not zero, 0 without one.
OPD_FN void note_range(DeltaWork& work, int smallest, int largest) {
  if (smallest) work.smallest = smaller_of(work.smallest, smallest);
  work.largest = larger_of(work.largest, largest);
}

// ---- bfloat16 pairs ----

// Two vectors of coordinates: their indices in by_step, in any order, and a bit for each in row OPD_MORE_STEPS.
OPD_FN ShortBits step_indices(const opd_u16* w, const opd_u16* v, opd_u32* index, Ints& most, Ints& least) {
  const Ints a = (Ints)OPD_V(loadu_ps)((const float*)w), b = (Ints)OPD_V(loadu_ps)((const float*)v);
  const Ints magnitude = OPD_V(set1_epi16)(0x7FFF), more = OPD_V(set1_epi16)(OPD_MORE_STEPS);
  const Ints abs_a = a & magnitude;
  most = OPD_V(max_epi16)(most, OPD_V(max_epi16)(abs_a, b & magnitude));
  least = OPD_V(min_epu16)(least, OPD_V(sub_epi16)(abs_a, OPD_V(set1_epi16)(1)));  // zeros become the largest
  const Ints row = OPD_V(min_epu16)(OPD_V(add_epi16)(OPD_V(sub_epi16)(b, a), OPD_V(set1_epi16)(OPD_STEPS)), more);
  OPD_V(store_ps)((float*)index, (Floats)OPD_V(unpacklo_epi16)(a, row));
  OPD_V(store_ps)((float*)(index + LANES), (Floats)OPD_V(unpackhi_epi16)(a, row));
  return equal_shorts(row, more);
}

// `fallback(w, v, n)` counts a block that may have NaN, Inf or a difference that overflows.
template <class Fallback>
static void count_steps_bf16(const opd_u16* base, const opd_u16* trained, opd_i64 n, const DeltaOptions& options,
                             DeltaWork& work, Fallback fallback) {
  static thread_local ChangedQueue changed;
  alignas(64) static thread_local opd_u32 indices[2][OPD_DELTA_BLOCK];
  alignas(8) ShortBits more[OPD_DELTA_BLOCK / (2 * LANES)];
  int at[OPD_DELTA_BLOCK + 4];
  opd_u32* table = work.by_step[0];
  const opd_u32* waiting = nullptr;  // indices of the block before, counted while this one is loaded
  changed.n = 0;
  opd_i64 start = 0, dense_until = 0;
  for (int turn = 0; start + OPD_DELTA_BLOCK <= n; start += OPD_DELTA_BLOCK) {
    const opd_u16 *w = base + start, *v = trained + start;
    if (start < dense_until) {
      fallback(w, v, OPD_DELTA_BLOCK);
      continue;
    }
    opd_u32* index = indices[turn];
    Ints most = OPD_V(set1_epi16)(0), least = OPD_V(set1_epi16)(-1);
    for (int i = 0; i < OPD_DELTA_BLOCK; i += 2 * LANES) {
      __builtin_prefetch(w + i + 2 * OPD_DELTA_BLOCK);
      __builtin_prefetch(v + i + 2 * OPD_DELTA_BLOCK);
      more[i / (2 * LANES)] = step_indices(w + i, v + i, index + i, most, least);
      if (waiting)
        for (int j = i; j < i + 2 * LANES; j++) table[waiting[j]]++;
    }
    waiting = nullptr;
    const int largest = reduce<opd_u16>(most, 0, larger_of);
    if (largest >= 0x7F00) {
      fallback(w, v, OPD_DELTA_BLOCK);
      continue;
    }
    note_range(work, (opd_u16)(reduce<opd_u16>(least, 0xFFFF, smaller_of) + 1), largest);
    waiting = index;
    turn ^= 1;
    const int count = positions_of(more, OPD_DELTA_BLOCK, at);
    for (int j = 0; j < count; j++) {
      changed.w[changed.n + j] = w[at[j]];
      changed.v[changed.n + j] = v[at[j]];
    }
    changed.n += count;
    if (changed.n >= OPD_DELTA_BLOCK) { count_changed(changed, options, work, true); changed.n = 0; }
    // With many in the queue, counting each of them twice costs more than it saves: look again 32 blocks later.
    if (count > OPD_DELTA_BLOCK / 4) dense_until = start + 32 * OPD_DELTA_BLOCK;
  }
  if (waiting)
    for (int j = 0; j < OPD_DELTA_BLOCK; j++) table[waiting[j]]++;
  count_changed(changed, options, work, true);
  if (start < n) fallback(base + start, trained + start, n - start);
}

// ---- wider pairs, in float ----

template <int DTYPE>
OPD_FN Floats load_floats(const void* data, opd_i64 i) {
  if constexpr (DTYPE == FP32) return OPD_V(loadu_ps)((const float*)data + i);
  const HalfInts half = load_half((const opd_u16*)data + i);
  if constexpr (DTYPE == FP16) return OPD_V(cvtph_ps)(half);
  return (Floats)OPD_V(slli_epi32)(OPD_V(cvtepu16_epi32)(half), 16);
}

// The bfloat16 bits of finite floats, to nearest even, in 32-bit lanes.
template <int DTYPE>
OPD_FN Ints round_to_bf16(Ints bits) {
  const Ints top = OPD_V(srli_epi32)(bits, 16);
  if (DTYPE == BF16) return top;
  const Ints half = OPD_V(add_epi32)(top & OPD_V(set1_epi32)(1), OPD_V(set1_epi32)(0x7FFF));
  return OPD_V(srli_epi32)(OPD_V(add_epi32)(bits, half), 16);
}

OPD_FN float load_float(const void* data, int dtype, opd_i64 i) {
  return dtype == FP32   ? ((const float*)data)[i]
         : dtype == FP16 ? fp16_to_float(((const opd_u16*)data)[i])
                         : bf16_to_float(((const opd_u16*)data)[i]);
}

// Thresholds that a float cannot represent exactly, so that d < t and d <= t are both bits(d) < bits[k]. A bin of
// HIST_DELTA_STORED holds the |delta| with the same upper 16 bits. Those in the bin of a threshold are found by bytes:
// bits 24 to 27 select a threshold, whose bits 16 to 23 must be the same. `count_left` then compares all bits.
struct FloatThresholds {
  opd_u32 bits[OPD_STORED_THRESHOLDS];
  unsigned char second_byte[16];
  unsigned char index[16] = {};  // where no threshold has these bits 24 to 27: the first one, whose bin is another
  bool usable = true;  // each is positive, between two floats of one bin, and has its own bits 24 to 27

  explicit FloatThresholds(const DeltaOptions& options) {
    opd_u32 seen = 0;
    for (unsigned char& byte : second_byte) byte = 0xFF;
    for (int k = 0; k < OPD_STORED_THRESHOLDS; k++) {
      const double threshold = options.thresholds[k];
      const float nearest = (float)threshold;
      const opd_u32 rounded = float_bits(nearest);
      const int key = rounded >> 24 & 15;
      bits[k] = rounded + ((double)nearest < threshold);  // of the smallest float above the threshold
      usable &= (double)nearest != threshold && nearest > 0 && !(seen >> key & 1) && !((bits[k] ^ rounded) >> 16);
      seen |= 1u << key;
      second_byte[key] = (unsigned char)(rounded >> 16);
      index[key] = (unsigned char)k;
    }
  }
};

// An exact sum of squares in two words: `high` rounds each square to its unit, `low` adds the errors of that rounding.
struct SquareSum {
  Doubles high, low;
  explicit SquareSum(int unit) : high(OPD_V(set1_pd)(power_of_two(unit + 52))), low(OPD_V(set1_pd)(0)) {}
  __attribute__((always_inline)) void add(Doubles x) {
    const Doubles next = OPD_V(fmadd_pd)(x, x, high);
    low = OPD_V(add_pd)(low, OPD_V(fmsub_pd)(x, x, OPD_V(sub_pd)(next, high)));
    high = next;
  }
};

// Adds the lanes of a vector, multiples of 2^unit, to a sum.
static void add_lanes(Doubles vector, int unit, opd_i64* limbs) {
  double lanes[sizeof(Doubles) / 8];
  __builtin_memcpy(lanes, &vector, sizeof lanes);
  opd_i64 units = 0;
  for (double lane : lanes) units += (opd_i64)(lane * power_of_two(-unit));
  sum_add(limbs, units, unit + OPD_SUM_SHIFT);
}
static void add_squares(const SquareSum& sum, int unit, int low_unit, opd_i64* limbs) {
  add_lanes(OPD_V(sub_pd)(sum.high, OPD_V(set1_pd)(power_of_two(unit + 52))), unit, limbs);
  add_lanes(sum.low, low_unit, limbs);
}

#define OPD_FLOAT_BLOCK 1024
#define OPD_FLOAT_RANGE 21  // binades between the smallest and the largest magnitude of a block, for exact sums
static_assert(OPD_DELTA_BLOCK % 64 == 0 && OPD_FLOAT_BLOCK % 64 == 0, "positions_of reads 64 bits at a time");
static_assert(OPD_FLOAT_BLOCK <= OPD_DELTA_BLOCK, "ChangedQueue holds a block more than OPD_DELTA_BLOCK");
static_assert(2 * OPD_FLOAT_BLOCK / LANES <= 256, "squares that a lane of SquareSum adds exactly");

struct BlockRange {
  opd_u32 smallest, largest;  // bits of the magnitudes that are not zero; without one, smallest is 0
};

template <int BASE, int TRAINED>
OPD_FN BlockRange block_range(const void* base, const void* trained, opd_i64 start) {
  const Ints magnitude = OPD_V(set1_epi32)(0x7FFFFFFF), one = OPD_V(set1_epi32)(1);
  Ints most = OPD_V(set1_epi32)(0), least = OPD_V(set1_epi32)(-1);
  for (int i = 0; i < OPD_FLOAT_BLOCK; i += LANES) {
    const Ints a = (Ints)load_floats<BASE>(base, start + i) & magnitude;
    const Ints b = (Ints)load_floats<TRAINED>(trained, start + i) & magnitude;
    most = OPD_V(max_epu32)(most, OPD_V(max_epu32)(a, b));
    const Ints a_less = OPD_V(sub_epi32)(a, one), b_less = OPD_V(sub_epi32)(b, one);  // zeros become the largest
    least = OPD_V(min_epu32)(least, OPD_V(min_epu32)(a_less, b_less));
  }
  return {reduce<opd_u32>(least, ~0u, smaller_of) + 1, reduce<opd_u32>(most, 0, larger_of)};
}

// Counts the coordinates of a block that the vectors left: of more steps, and with |delta| in the bin of a threshold.
__attribute__((noinline))
static void count_left(const void* base, int base_dtype, const void* trained, int trained_dtype, opd_i64 start,
                       const LaneBits* more, const LaneBits* at_threshold, const FloatThresholds& thresholds,
                       const DeltaOptions& options, DeltaWork& work, ChangedQueue& changed) {
  int at[OPD_FLOAT_BLOCK + 4];
  float x[OPD_FLOAT_BLOCK], y[OPD_FLOAT_BLOCK];
  int count = positions_of(more, OPD_FLOAT_BLOCK, at);
  for (int j = 0; j < count; j++) {
    x[j] = load_float(base, base_dtype, start + at[j]);
    y[j] = load_float(trained, trained_dtype, start + at[j]);
  }
  opd_u16 *w = changed.w + changed.n, *v = changed.v + changed.n;
  OPD_SIMD()
  for (int j = 0; j < count; j++) { w[j] = float_to_bf16(x[j]); v[j] = float_to_bf16(y[j]); }
  int zeros = 0;
  OPD_SIMD(reduction(+ : zeros))
  for (int j = 0; j < count; j++) zeros += ((w[j] | v[j]) & 0x7FFF) == 0;
  work.signs_of_zero += zeros;
  changed.n += count;
  if (changed.n >= OPD_DELTA_BLOCK) { count_changed(changed, options, work, false); changed.n = 0; }
  count = positions_of(at_threshold, OPD_FLOAT_BLOCK, at);
  for (int j = 0; j < count; j++) {
    const float d = load_float(trained, trained_dtype, start + at[j]) - load_float(base, base_dtype, start + at[j]);
    const opd_u32 bits = float_bits(d) & 0x7FFFFFFFu;
    const int k = thresholds.index[bits >> 24 & 15];
    const int below = (bits >> 16 == thresholds.bits[k] >> 16) & (bits < thresholds.bits[k]);
    work.lt[k] += below;
    work.le[k] += below;
  }
}

// `fallback(start, n)` counts a block whose values are too far apart, or not finite; all of them where the thresholds
// are not usable.
template <int BASE, int TRAINED, class Fallback>
static void count_steps_float(const void* base, const void* trained, opd_i64 n, const DeltaOptions& options,
                              DeltaWork& work, Fallback fallback) {
  static thread_local ChangedQueue changed;
  alignas(64) opd_u32 index[2][LANES], bin[2][LANES];
  alignas(8) LaneBits more[OPD_FLOAT_BLOCK / LANES], at_threshold[OPD_FLOAT_BLOCK / LANES];
  opd_u32 *table = work.by_step[0], *stored = work.hist_delta_blocks;
  const FloatThresholds thresholds(options);
  const Ints magnitude = OPD_V(set1_epi32)(0x7FFFFFFF), second_byte = repeat_bytes(thresholds.second_byte);
  const Ints most_steps = OPD_V(set1_epi32)(OPD_MORE_STEPS);
  Ints largest = OPD_V(set1_epi32)(0);
  changed.n = 0;
  opd_i64 start = 0;
  for (; start + OPD_FLOAT_BLOCK <= n && thresholds.usable; start += OPD_FLOAT_BLOCK) {
    const BlockRange range = block_range<BASE, TRAINED>(base, trained, start);
    const int above = (int)(range.largest >> 23) - 126;  // |x| < 2^above
    const int least = (int)(range.smallest >> 23) - 127;
    const bool overflows = range.largest >= 0x7F000000u;  // a difference may
    // From 2^-100 on, no difference is subnormal.
    if (overflows || (range.smallest && (least < -100 || least < above - OPD_FLOAT_RANGE))) {
      fallback(start, OPD_FLOAT_BLOCK);
      continue;
    }
    note_range(work, (int)(range.smallest >> 16), (int)(range.largest >> 16) + 1);
    // A lane adds up to 256 squares below 2^(2 above), or 2^(2 above + 2) of differences: `high` stays in one binade.
    // Values are multiples of 2^(above - 21 - 23), their squares of 2^low_unit: `low` stays below 2^53 of these.
    const int unit = 2 * above - 44, low_unit = 2 * (above - OPD_FLOAT_RANGE) - 46;
    SquareSum base_sq(unit), trained_sq(unit), delta_sq(unit + 2);
    Doubles delta_abs = OPD_V(set1_pd)(0);
    Ints beyond_rtol = OPD_V(set1_epi32)(0);
    const auto vector = [&](int i, opd_u32* to_index, opd_u32* to_bin) __attribute__((always_inline)) {
      const Floats x = load_floats<BASE>(base, start + i), y = load_floats<TRAINED>(trained, start + i);
      const Ints x_bits = (Ints)x, y_bits = (Ints)y, d = (Ints)OPD_V(sub_ps)(y, x) & magnitude;
      const Floats larger = (Floats)OPD_V(max_epu32)(x_bits & magnitude, y_bits & magnitude);
      beyond_rtol = add_where_greater(beyond_rtol, d, (Ints)OPD_V(mul_ps)(larger, OPD_V(set1_ps)(1e-3f)));
      largest = OPD_V(max_epu32)(largest, d);
      const Ints w = round_to_bf16<BASE>(x_bits), v = round_to_bf16<TRAINED>(y_bits);
      const Ints step = OPD_V(add_epi32)(OPD_V(sub_epi32)(v, w), OPD_V(set1_epi32)(OPD_STEPS));
      const Ints row = OPD_V(min_epu32)(step, most_steps), delta_bin = OPD_V(srli_epi32)(d, 16);
      more[i / LANES] = equal_ints(row, most_steps);
      at_threshold[i / LANES] = equal_low_bytes(OPD_V(shuffle_epi8)(second_byte, OPD_V(srli_epi32)(d, 24)), delta_bin);
      const Ints counted = where_equal(x_bits, y_bits, OPD_V(set1_epi32)(OPD_EQUAL_BITS), row);
      OPD_V(store_ps)((float*)to_index, (Floats)(w | OPD_V(slli_epi32)(counted, 16)));
      OPD_V(store_ps)((float*)to_bin, (Floats)delta_bin);
      const Doubles d_low = low_doubles((Floats)d), d_high = high_doubles((Floats)d);
      delta_abs = OPD_V(add_pd)(OPD_V(add_pd)(delta_abs, d_low), d_high);
      delta_sq.add(d_low);
      delta_sq.add(d_high);
      base_sq.add(low_doubles(x));
      base_sq.add(high_doubles(x));
      trained_sq.add(low_doubles(y));
      trained_sq.add(high_doubles(y));
    };
    const auto count = [&](int turn) __attribute__((always_inline)) {
      for (int j = 0; j < LANES; j++) {
        table[index[turn][j]]++;
        stored[bin[turn][j]]++;
      }
    };
    vector(0, index[0], bin[0]);
    for (int i = LANES, turn = 1; i < OPD_FLOAT_BLOCK; i += LANES, turn ^= 1) {
      __builtin_prefetch((const char*)base + (start + i) * (BASE == FP32 ? 4 : 2) + 4096);
      __builtin_prefetch((const char*)trained + (start + i) * (TRAINED == FP32 ? 4 : 2) + 4096);
      vector(i, index[turn], bin[turn]);
      count(turn ^ 1);
    }
    count((OPD_FLOAT_BLOCK / LANES - 1) & 1);
    count_left(base, BASE, trained, TRAINED, start, more, at_threshold, thresholds, options, work, changed);
    work.unchanged_rtol += OPD_FLOAT_BLOCK - reduce<int>(beyond_rtol, 0, sum_of);
    add_squares(base_sq, unit, low_unit, work.sums[SUM_BASE_SQ]);
    add_squares(trained_sq, unit, low_unit, work.sums[SUM_TRAINED_SQ]);
    add_squares(delta_sq, unit + 2, low_unit, work.sums[SUM_DELTA_SQ]);
    add_lanes(delta_abs, above - OPD_FLOAT_RANGE - 23, work.sums[SUM_DELTA_ABS]);
  }
  count_changed(changed, options, work, false);
  // Never NaN: `fallback` leaves out what is not finite, too.
  work.max_delta = larger_of(work.max_delta, (double)bits_float(reduce<opd_u32>(largest, 0, larger_of)));
  if (start < n) fallback(start, n - start);
}

// A pair of bf16, fp16 and fp32 that is not a bfloat16 pair.
template <class Fallback>
static void count_steps_wide(const void* base, int base_dtype, const void* trained, int trained_dtype, opd_i64 n,
                             const DeltaOptions& options, DeltaWork& work, Fallback fallback) {
  typedef void (*Count)(const void*, const void*, opd_i64, const DeltaOptions&, DeltaWork&, Fallback);
  static_assert(BF16 == 0 && FP16 == 1 && FP32 == 2, "the order of counts");
  static const Count counts[3][3] = {
      {nullptr, count_steps_float<BF16, FP16, Fallback>, count_steps_float<BF16, FP32, Fallback>},
      {count_steps_float<FP16, BF16, Fallback>, count_steps_float<FP16, FP16, Fallback>,
       count_steps_float<FP16, FP32, Fallback>},
      {count_steps_float<FP32, BF16, Fallback>, count_steps_float<FP32, FP16, Fallback>,
       count_steps_float<FP32, FP32, Fallback>}};
  counts[base_dtype][trained_dtype](base, trained, n, options, work, fallback);
}
}  // namespace OPD_ISA
#endif
