// CPU loops of `quantile`. Included once per instruction set.
#include "cpu.h"

namespace OPD_ISA {
#define OPD_QUANTILE_BLOCK 1024

OPD_FN opd_u32 top_key(float) { return OPD_TOP32 | 1u; }
OPD_FN opd_u64 top_key(double) { return OPD_TOP64 | 1u; }

// Loads the keys of the first values with their mask bits, as many as fill vectors. Returns their number.
template <class F, class Key>
static int load_marked(const F*, const unsigned char*, int, int, Key*) { return 0; }
#if defined(OPD_AVX512)
static int load_marked(const float* values, const unsigned char* mask, int n, int smallest, opd_u32* keys) {
  const __m512i top = _mm512_set1_epi32((int)OPD_TOP32), one = _mm512_set1_epi32(1);
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    __m512i key = _mm512_loadu_si512(values + i);
    key = _mm512_add_epi32(key, key);
    if (smallest) key = _mm512_sub_epi32(top, key);
    opd_u16 bits;
    __builtin_memcpy(&bits, mask + (i >> 3), 2);
    _mm512_storeu_si512(keys + i, _mm512_mask_or_epi32(key, bits, key, one));
  }
  return i;
}
#elif defined(OPD_AVX2)
static int load_marked(const float* values, const unsigned char* mask, int n, int smallest, opd_u32* keys) {
  const __m256i top = _mm256_set1_epi32((int)OPD_TOP32), one = _mm256_set1_epi32(1),
      lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256i key = _mm256_loadu_si256((const __m256i*)(values + i));
    key = _mm256_add_epi32(key, key);
    if (smallest) key = _mm256_sub_epi32(top, key);
    __m256i bits = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(mask[i >> 3]), lane), one);
    _mm256_storeu_si256((__m256i*)(keys + i), _mm256_or_si256(key, bits));
  }
  return i;
}
#endif

template <class F, class Key>
static void load_keys(const F* values, const unsigned char* mask, int n, int smallest, Key* keys) {
  int i = mask ? load_marked(values, mask, n, smallest, keys) : 0;
  if (smallest) {
    OPD_SIMD() for (int j = i; j < n; j++) keys[j] = magnitude_key(values[j], 1);
  } else {
    OPD_SIMD() for (int j = i; j < n; j++) keys[j] = magnitude_key(values[j], 0);
  }
  if (!mask) return;
  for (; i + 8 <= n; i += 8) {
    const Key byte = mask[i >> 3];
    Key* eight = keys + i;                      // constant offsets: an index would compile to gathers and scatters
    for (int j = 0; j < 8; j++) eight[j] |= byte >> j & 1;
  }
  for (; i < n; i++) keys[i] |= mask[i >> 3] >> (i & 7) & 1;
}

// Appends the keys in [low, low + span]; writes up to 64 bytes beyond the last.
#if defined(OPD_AVX512)
static int collect_between(const opd_u32* keys, int n, opd_u32 low, opd_u32 span, opd_u32* out) {
  const __m512i base = _mm512_set1_epi32((int)low), width = _mm512_set1_epi32((int)span);
  int k = 0, i = 0;
  for (; i + 16 <= n; i += 16) {
    __m512i key = _mm512_loadu_si512(keys + i);
    __mmask16 inside = _mm512_cmple_epu32_mask(_mm512_sub_epi32(key, base), width);
    // in registers: with a memory operand microcoded on Zen 4
    _mm512_storeu_si512(out + k, _mm512_maskz_compress_epi32(inside, key));
    k += __builtin_popcount(inside);
  }
  for (; i < n; i++) { out[k] = keys[i]; k += keys[i] - low <= span; }
  return k;
}
static int collect_between(const opd_u64* keys, int n, opd_u64 low, opd_u64 span, opd_u64* out) {
  const __m512i base = _mm512_set1_epi64((long long)low), width = _mm512_set1_epi64((long long)span);
  int k = 0, i = 0;
  for (; i + 8 <= n; i += 8) {
    __m512i key = _mm512_loadu_si512(keys + i);
    __mmask8 inside = _mm512_cmple_epu64_mask(_mm512_sub_epi64(key, base), width);
    _mm512_storeu_si512(out + k, _mm512_maskz_compress_epi64(inside, key));
    k += __builtin_popcount(inside);
  }
  for (; i < n; i++) { out[k] = keys[i]; k += keys[i] - low <= span; }
  return k;
}
#else
template <class Key>
static int collect_between(const Key* keys, int n, Key low, Key span, Key* out) {
  int k = 0, i = 0;
#if defined(OPD_AVX2)
  if (sizeof(Key) == 4) {                       // few are inside: eight at a time, and one by one only if some are
    const __m256i base = _mm256_set1_epi32((int)low), width = _mm256_set1_epi32((int)span);
    for (; i + 8 <= n; i += 8) {
      __m256i offset = _mm256_sub_epi32(_mm256_loadu_si256((const __m256i*)(keys + i)), base);
      __m256i inside = _mm256_cmpeq_epi32(_mm256_min_epu32(offset, width), offset);
      for (unsigned lanes = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(inside)); lanes; lanes &= lanes - 1)
        out[k++] = keys[i + __builtin_ctz(lanes)];
    }
  }
#endif
  for (; i < n; i++) { out[k] = keys[i]; k += keys[i] - low <= span; }
  return k;
}
#endif

// Returns the number of keys above the limit; adds the number of those with their mask bit set to *masked.
template <class Key>
static opd_i64 count_above(const Key* keys, int n, Key limit, opd_i64* masked) {
  Key above = 0, both = 0;
  for (int i = 0; i < n; i++) { Key hit = keys[i] > limit; above += hit; both += hit & keys[i]; }
  *masked += (opd_i64)both;
  return (opd_i64)above;
}

template <class F, class Key>
static void scan(const F* values, const unsigned char* mask, opd_i64 n, int smallest, QuantileBracket* brackets,
                 int n_brackets,
                 opd_i64* nan) {
  alignas(64) Key keys[OPD_QUANTILE_BLOCK];
  const Key top = top_key(F());
  for (opd_i64 start = 0; start < n; start += OPD_QUANTILE_BLOCK) {
    const int m = n - start < OPD_QUANTILE_BLOCK ? (int)(n - start) : OPD_QUANTILE_BLOCK;
    load_keys(values + start, mask ? mask + (start >> 3) : nullptr, m, smallest, keys);
    Key largest = 0;
    for (int i = 0; i < m; i++) largest = keys[i] > largest ? keys[i] : largest;
    if (largest > top) nan[0] += count_above(keys, m, top, &nan[1]);
    for (int b = 0; b < n_brackets; b++) {
      QuantileBracket& bracket = brackets[b];
      const Key low = (Key)bracket.low, high = (Key)bracket.high, span = high - low;
      bracket.above += count_above(keys, m, high, &bracket.above_masked);
      if (span == 1) {                          // one value: nothing to select
        Key inside = 0, masked = 0;
        for (int i = 0; i < m; i++) { Key hit = (keys[i] | 1) == high; inside += hit; masked += hit & keys[i]; }
        bracket.inside += (opd_i64)inside;
        bracket.inside_masked += (opd_i64)masked;
      } else if (!bracket.overflow) {
        if (bracket.inside + m > bracket.capacity) bracket.overflow = 1;
        else bracket.inside += collect_between(keys, m, low, span, (Key*)bracket.keys + bracket.inside);
      }
    }
  }
}

static void quantile_scan(const void* values, int dtype, const unsigned char* mask, opd_i64 n, int smallest,
                          QuantileBracket* brackets,
                          int n_brackets, opd_i64* nan) {
  if (dtype == FP64) scan<double, opd_u64>((const double*)values, mask, n, smallest, brackets, n_brackets, nan);
  else scan<float, opd_u32>((const float*)values, mask, n, smallest, brackets, n_brackets, nan);
}

template <class F, class Key>
static void narrow(const F* values, opd_i64 n, int smallest, Key low, Key high, int shift, opd_i64* bins) {
  alignas(64) Key keys[OPD_QUANTILE_BLOCK], bin[OPD_QUANTILE_BLOCK];
  const Key span = high - low;
  for (opd_i64 start = 0; start < n; start += OPD_QUANTILE_BLOCK) {
    const int m = n - start < OPD_QUANTILE_BLOCK ? (int)(n - start) : OPD_QUANTILE_BLOCK;
    load_keys(values + start, (const unsigned char*)nullptr, m, smallest, keys);
    OPD_SIMD()
    for (int i = 0; i < m; i++) {
      Key offset = keys[i] - low;
      bin[i] = offset <= span ? offset >> shift : (Key)OPD_QUANTILE_BINS;
    }
    for (int i = 0; i < m; i++) bins[bin[i]]++;
  }
}

static void quantile_narrow(const void* values, int dtype, opd_i64 n, int smallest, opd_u64 low, opd_u64 high,
                            int shift, opd_i64* bins) {
  if (dtype == FP64) narrow<double, opd_u64>((const double*)values, n, smallest, low, high, shift, bins);
  else narrow<float, opd_u32>((const float*)values, n, smallest, (opd_u32)low, (opd_u32)high, shift, bins);
}

static void quantile_table(const opd_u16* values, const unsigned char* mask, opd_i64 n, opd_i64* table) {
  if (!mask) {
    for (opd_i64 i = 0; i < n; i++) table[(opd_u16)(values[i] << 1)]++;
    return;
  }
  opd_i64 i = 0;
  for (; i + 8 <= n; i += 8) {
    unsigned byte = mask[i >> 3];
    for (int j = 0; j < 8; j++) table[(opd_u16)(values[i + j] << 1) | (byte >> j & 1)]++;
  }
  for (; i < n; i++) table[(opd_u16)(values[i] << 1) | (mask[i >> 3] >> (i & 7) & 1)]++;
}

const QuantileKernels quantile_kernels = {quantile_scan, quantile_narrow, quantile_table};
}  // namespace OPD_ISA
