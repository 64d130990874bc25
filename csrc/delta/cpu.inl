// CPU loops of `delta`. Included once per instruction set.
//
// bfloat16 has 2^15 magnitudes, so integer histograms hold every per-coordinate metric. The increments are scalar
// (about one per cycle) and they are the limit, not memory: so |w| is counted for every coordinate, everything else
// only for the coordinates whose bits differ, which a vector comparison selects (`collect`).
#include "cpu.h"
#include "../common/cpu/exact_sum.inl"

namespace OPD_ISA {
#define OPD_DELTA_BLOCK 2048

struct ChangedQueue {  // coordinates whose bits differ, waiting to be counted
  opd_u16 w[2 * OPD_DELTA_BLOCK + 64], v[2 * OPD_DELTA_BLOCK + 64];
  int n;
};

struct InexactQueue {  // bfloat16 pairs: differences that bfloat16 rounds
  float d[2 * OPD_DELTA_BLOCK + 64];
};

static int largest_magnitude(const opd_u16* w, const opd_u16* v, int n) {
  short largest = 0;                // signed: magnitudes fit, and SSE2 has no unsigned 16-bit maximum
  OPD_SIMD(reduction(max : largest))
  for (int i = 0; i < n; i++) {
    short a = (short)(w[i] & 0x7FFF), b = (short)(v[i] & 0x7FFF);
    short m = a > b ? a : b;
    largest = m > largest ? m : largest;
  }
  return largest;
}

// Counts |w|, and prefetches the next block meanwhile: the increments leave the memory ports idle.
static void count_base(const opd_u16* w, int n, opd_u32* table, const opd_u16* next_w, const opd_u16* next_v) {
  int i = 0;
  for (; i + 32 <= n; i += 32) {
    __builtin_prefetch(next_w + i);
    __builtin_prefetch(next_v + i);
    for (int j = i; j < i + 32; j += 4) {
      opd_u64 four;
      __builtin_memcpy(&four, w + j, 8);
      table[four & 0xFFFF]++;
      table[(four >> 16) & 0xFFFF]++;
      table[(four >> 32) & 0xFFFF]++;
      table[four >> 48]++;
    }
  }
  for (; i < n; i++) table[w[i]]++;
}

#if defined(OPD_AVX512) || defined(OPD_AVX2)
static int larger(int largest, const short* lanes, int n) {
  for (int i = 0; i < n; i++) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}
#endif

// Appends the coordinates whose bits differ; writes up to 64 entries beyond the last. `largest` receives the largest
// magnitude on either side: with 0x7F00 there may be Inf, NaN, or a difference that overflows.
#if defined(OPD_AVX512)
static int collect(const opd_u16* w, const opd_u16* v, int n, opd_u16* out_w, opd_u16* out_v, int* largest) {
  int k = 0, i = 0;
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
  __m512i lane_max = _mm512_setzero_si512();
  for (; i + 32 <= n; i += 32) {
    __m512i a = _mm512_loadu_si512(w + i), b = _mm512_loadu_si512(v + i);
    __mmask32 differ = _mm512_cmpneq_epi16_mask(a, b);
    lane_max = _mm512_max_epi16(lane_max, _mm512_max_epi16(_mm512_and_si512(a, magnitude),
                                                           _mm512_and_si512(b, magnitude)));
    // Compress in registers: with a memory operand the instruction is microcoded on Zen 4.
    _mm512_storeu_si512(out_w + k, _mm512_maskz_compress_epi16(differ, a));
    _mm512_storeu_si512(out_v + k, _mm512_maskz_compress_epi16(differ, b));
    k += __builtin_popcount(differ);
  }
  short lanes[32];
  _mm512_storeu_si512(lanes, lane_max);
  *largest = larger(largest_magnitude(w + i, v + i, n - i), lanes, 32);
  for (; i < n; i++) { out_w[k] = w[i]; out_v[k] = v[i]; k += w[i] != v[i]; }
  return k;
}
#elif defined(OPD_AVX2)
// Byte shuffles that move the selected ones of eight 16-bit lanes to the front, one for each of the 256 selections.
struct CompressTable {
  unsigned char shuffle[256][16];
  CompressTable() {
    for (int mask = 0; mask < 256; mask++) {
      int k = 0;
      for (int lane = 0; lane < 8; lane++)
        if (mask >> lane & 1) {
          shuffle[mask][2 * k] = (unsigned char)(2 * lane);
          shuffle[mask][2 * k + 1] = (unsigned char)(2 * lane + 1);
          k++;
        }
      for (; k < 8; k++) shuffle[mask][2 * k] = shuffle[mask][2 * k + 1] = 0x80;
    }
  }
};
static const CompressTable compress_table;

static int collect(const opd_u16* w, const opd_u16* v, int n, opd_u16* out_w, opd_u16* out_v, int* largest) {
  int k = 0, i = 0;
  const __m256i magnitude = _mm256_set1_epi16(0x7FFF);
  __m256i lane_max = _mm256_setzero_si256();
  for (; i + 16 <= n; i += 16) {
    __m256i a = _mm256_loadu_si256((const __m256i*)(w + i)), b = _mm256_loadu_si256((const __m256i*)(v + i));
    __m256i equal = _mm256_cmpeq_epi16(a, b);
    lane_max = _mm256_max_epi16(lane_max, _mm256_max_epi16(_mm256_and_si256(a, magnitude),
                                                           _mm256_and_si256(b, magnitude)));
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(equal), _mm256_extracti128_si256(equal, 1));
    unsigned differ = ~(unsigned)_mm_movemask_epi8(bytes) & 0xFFFFu;
    if (!differ) continue;
    unsigned low = differ & 0xFF, high = differ >> 8;
    __m128i pick = _mm_loadu_si128((const __m128i*)compress_table.shuffle[low]);
    _mm_storeu_si128((__m128i*)(out_w + k), _mm_shuffle_epi8(_mm256_castsi256_si128(a), pick));
    _mm_storeu_si128((__m128i*)(out_v + k), _mm_shuffle_epi8(_mm256_castsi256_si128(b), pick));
    k += __builtin_popcount(low);
    pick = _mm_loadu_si128((const __m128i*)compress_table.shuffle[high]);
    _mm_storeu_si128((__m128i*)(out_w + k), _mm_shuffle_epi8(_mm256_extracti128_si256(a, 1), pick));
    _mm_storeu_si128((__m128i*)(out_v + k), _mm_shuffle_epi8(_mm256_extracti128_si256(b, 1), pick));
    k += __builtin_popcount(high);
  }
  short lanes[16];
  _mm256_storeu_si256((__m256i*)lanes, lane_max);
  *largest = larger(largest_magnitude(w + i, v + i, n - i), lanes, 16);
  for (; i < n; i++) { out_w[k] = w[i]; out_v[k] = v[i]; k += w[i] != v[i]; }
  return k;
}
#else
static int collect(const opd_u16* w, const opd_u16* v, int n, opd_u16* out_w, opd_u16* out_v, int* largest) {
  int k = 0, i = 0;
  *largest = largest_magnitude(w, v, n);
  for (; i + 4 <= n; i += 4) {
    opd_u64 a, b;
    __builtin_memcpy(&a, w + i, 8);
    __builtin_memcpy(&b, v + i, 8);
    for (opd_u64 differ = a ^ b; differ;) {          // the lowest lane that differs, until none does
      int lane = __builtin_ctzll(differ) >> 4;
      out_w[k] = w[i + lane];
      out_v[k] = v[i + lane];
      k++;
      differ &= ~(0xFFFFULL << (16 * lane));
    }
  }
  for (; i < n; i++) { out_w[k] = w[i]; out_v[k] = v[i]; k += w[i] != v[i]; }
  return k;
}
#endif

// Picks out the differences that are not their bfloat16 rounding; 3 % of a typical update.
static int collect_inexact(const float* difference, const opd_u16* delta, int n, float* out) {
  int k = 0, i = 0;
#if defined(OPD_AVX512)
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  for (; i + 16 <= n; i += 16) {
    __m512i d = _mm512_loadu_si512(difference + i);
    __m512i rounded = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(delta + i))), 16);
    __mmask16 inexact = _mm512_cmpneq_epi32_mask(_mm512_and_si512(d, magnitude), rounded);
    _mm512_storeu_si512(out + k, _mm512_maskz_compress_epi32(inexact, d));
    k += __builtin_popcount(inexact);
  }
#endif
  for (; i < n; i++)
    if ((float_bits(difference[i]) & 0x7FFFFFFFu) != (opd_u32)delta[i] << 16) out[k++] = difference[i];
  return k;
}

// bfloat16 pairs: the corrections of the stored view to the visible one, from the differences that rounding changed.
static void count_inexact(const InexactQueue& inexact, int n, const DeltaOptions& options, DeltaWork& work) {
  double exact[OPD_EXACT_BLOCK], rounded[OPD_EXACT_BLOCK];
  for (int start = 0; start < n; start += OPD_EXACT_BLOCK) {
    int m = n - start < OPD_EXACT_BLOCK ? n - start : OPD_EXACT_BLOCK;
    const float* d = inexact.d + start;
    for (int i = 0; i < m; i++) {
      opd_u32 magnitude = float_to_bf16(d[i]) & 0x7FFFu, top = float_bits(d[i]) >> 16 & 0x7FFFu;
      work.hist_delta_stored[magnitude]--;
      work.hist_delta_stored[top]++;
      exact[i] = __builtin_fabsf(d[i]);
      rounded[i] = bf16_to_float((opd_u16)magnitude);
    }
    for (int k = 0; k < OPD_STORED_THRESHOLDS; k++) {
      double threshold = options.thresholds[k];
      int lt = 0, le = 0;
      for (int i = 0; i < m; i++) {
        lt += (exact[i] < threshold) - (rounded[i] < threshold);
        le += (exact[i] <= threshold) - (rounded[i] <= threshold);
      }
      work.lt[k] += lt;
      work.le[k] += le;
    }
    double squares[OPD_EXACT_BLOCK];
    for (int i = 0; i < m; i++) squares[i] = exact[i] * exact[i];
    exact_sum(squares, m, work.sums[SUM_DELTA_SQ], 1);
    for (int i = 0; i < m; i++) squares[i] = rounded[i] * rounded[i];
    exact_sum(squares, m, work.sums[SUM_DELTA_SQ], -1);
    exact_sum(exact, m, work.sums[SUM_DELTA_ABS], 1);
    exact_sum(rounded, m, work.sums[SUM_DELTA_ABS], -1);
  }
}

// Counts coordinates whose bits differ. With `stored` the pair is bfloat16 and the stored view is counted too.
__attribute__((noinline))  // called once per some thousand coordinates, from many loops
static void count_changed(const ChangedQueue& changed, const DeltaOptions& options, DeltaWork& work, bool stored) {
  const int n = changed.n;
  opd_u16 delta[2 * OPD_DELTA_BLOCK], trained[2 * OPD_DELTA_BLOCK], group[2 * OPD_DELTA_BLOCK];
  opd_u32 joint[2 * OPD_DELTA_BLOCK];
  float difference[2 * OPD_DELTA_BLOCK];
  unsigned char ulp[2 * OPD_DELTA_BLOCK];
  float largest = 0;
  OPD_SIMD(reduction(max : largest))
  for (int i = 0; i < n; i++) {
    opd_u16 w = changed.w[i], v = changed.v[i];
    delta[i] = (opd_u16)visible_delta(w, v);
    difference[i] = bf16_to_float(v) - bf16_to_float(w);
    float abs_delta = bits_float(float_bits(difference[i]) & 0x7FFFFFFFu);
    largest = abs_delta > largest ? abs_delta : largest;
  }
  // Sixteen-bit lanes from here: twice as many at once.
  const opd_u32* bits = options.threshold_bits;
  const opd_u16 threshold_bits[4] = {(opd_u16)bits[0], (opd_u16)bits[1], (opd_u16)bits[2], (opd_u16)bits[3]};
  OPD_SIMD()
  for (int i = 0; i < n; i++) group[i] = change_class(delta[i], threshold_bits);
  OPD_SIMD()
  for (int i = 0; i < n; i++) trained[i] = (opd_u16)(delta[i] ? changed.v[i] & 0x7FFF : OPD_BINS);
  OPD_SIMD()
  for (int i = 0; i < n; i++) ulp[i] = (unsigned char)ulp_bin(changed.w[i], changed.v[i]);
  OPD_SIMD()
  for (int i = 0; i < n; i++) joint[i] = (opd_u32)group[i] * OPD_BINS + (changed.w[i] & 0x7FFFu);
  for (int i = 0; i < n; i++) {
    work.hist_delta[delta[i]]++;
    work.hist_base_by_class[joint[i]]++;
    work.hist_trained_changed[trained[i]]++;
    work.ulp[i & 3][ulp[i]]++;
  }
  if (!stored) return;
  if (largest > work.max_delta) work.max_delta = largest;
  static thread_local InexactQueue inexact;
  int k = collect_inexact(difference, delta, n, inexact.d);
  if (k) count_inexact(inexact, k, options, work);
}

struct FiniteBlock {  // one block of finite coordinates, as bfloat16 bits
  opd_u16 w[OPD_DELTA_BLOCK], v[OPD_DELTA_BLOCK];
};

// Keeps the finite coordinates of a block and counts the others. Returns the number kept.
template <class T>
static int drop_nonfinite(FiniteBlock& block, T* x, T* y, const bool* equal, int n, DeltaWork& work) {
  int k = 0;
  for (int i = 0; i < n; i++) {
    if (coordinate_finite(block.w[i], block.v[i])) {
      block.w[k] = block.w[i]; block.v[k] = block.v[i]; x[k] = x[i]; y[k] = y[i];
      k++;
    } else {
      work.nonfinite++;
    }
    work.bit_equal += equal[i];
  }
  return k;
}

static void delta_bf16(const opd_u16* base, const opd_u16* trained, opd_i64 n, const DeltaOptions& options,
                       DeltaWork& work) {
  static thread_local ChangedQueue changed;
  static thread_local FiniteBlock finite_block;
  changed.n = 0;
  for (opd_i64 start = 0; start < n; start += OPD_DELTA_BLOCK) {
    int m = n - start < OPD_DELTA_BLOCK ? (int)(n - start) : OPD_DELTA_BLOCK;
    const opd_u16 *w = base + start, *v = trained + start, *next_w = w + OPD_DELTA_BLOCK, *next_v = v + OPD_DELTA_BLOCK;
    int largest, k = collect(w, v, m, changed.w + changed.n, changed.v + changed.n, &largest);
    if (largest >= 0x7F00) {
      int left = 0;
      for (int i = 0; i < m; i++) {
        if (coordinate_finite(w[i], v[i])) { finite_block.w[left] = w[i]; finite_block.v[left] = v[i]; left++; }
        else { work.nonfinite++; work.bit_equal += w[i] == v[i]; }
      }
      w = finite_block.w; v = finite_block.v; m = left;
      k = collect(w, v, m, changed.w + changed.n, changed.v + changed.n, &largest);
    }
    count_base(w, m, work.hist_base, next_w, next_v);
    work.bit_equal += m - k;
    changed.n += k;
    if (changed.n >= OPD_DELTA_BLOCK) { count_changed(changed, options, work, true); changed.n = 0; }
  }
  count_changed(changed, options, work, true);
}

OPD_FN float absolute(float x) { return __builtin_fabsf(x); }
OPD_FN double absolute(double x) { return __builtin_fabs(x); }

// The stored view of a block of finite coordinates. The pair is not bfloat16; T is double if either side is, else
// float.
template <class T>
static void count_stored(const FiniteBlock& block, const T* x, const T* y, int n, const DeltaOptions& options,
                         DeltaWork& work) {
  static thread_local double abs_delta[OPD_DELTA_BLOCK], values[OPD_DELTA_BLOCK];
  static thread_local opd_u16 top[OPD_DELTA_BLOCK];
  double largest = work.max_delta;
  int unchanged_rtol = 0;
  OPD_SIMD(reduction(max : largest) reduction(+ : unchanged_rtol))
  for (int i = 0; i < n; i++) {
    T d = absolute(y[i] - x[i]);                    // clears the sign bit: -0 becomes +0
    T a = absolute(x[i]), b = absolute(y[i]);
    unchanged_rtol += d <= (T)1e-3 * (a > b ? a : b);
    abs_delta[i] = d;
    top[i] = (opd_u16)(float_bits((float)d) >> 16);
    largest = abs_delta[i] > largest ? abs_delta[i] : largest;
  }
  work.max_delta = largest;
  work.unchanged_rtol += unchanged_rtol;
  for (int k = 0; k < OPD_STORED_THRESHOLDS; k++) {
    double threshold = options.thresholds[k];
    int lt = 0, le = 0;
    OPD_SIMD(reduction(+ : lt, le))
    for (int i = 0; i < n; i++) { lt += abs_delta[i] < threshold; le += abs_delta[i] <= threshold; }
    work.lt[k] += lt;
    work.le[k] += le;
  }
  for (int i = 0; i < n; i++) {
    work.hist_delta_stored[top[i]]++;
    work.hist_base_changed[block.w[i] & 0x7FFF] += abs_delta[i] != 0;
  }
  for (int start = 0; start < n; start += OPD_EXACT_BLOCK) {
    int m = n - start < OPD_EXACT_BLOCK ? n - start : OPD_EXACT_BLOCK;
    const T *p = x + start, *q = y + start;
    OPD_SIMD()
    for (int i = 0; i < m; i++) values[i] = (double)p[i] * (double)p[i];
    exact_sum(values, m, work.sums[SUM_BASE_SQ], 1);
    OPD_SIMD()
    for (int i = 0; i < m; i++) values[i] = (double)q[i] * (double)q[i];
    exact_sum(values, m, work.sums[SUM_TRAINED_SQ], 1);
    OPD_SIMD()
    for (int i = 0; i < m; i++) values[i] = abs_delta[start + i] * abs_delta[start + i];
    exact_sum(values, m, work.sums[SUM_DELTA_SQ], 1);
    exact_sum(abs_delta + start, m, work.sums[SUM_DELTA_ABS], 1);
  }
}

// Loads as T, with the bfloat16 bits (a double is rounded to float first, as in torch).
template <class T> OPD_FN T load_bf16(opd_u16 x) { return (T)bf16_to_float(x); }
template <class T> OPD_FN T load_fp16(opd_u16 x) { return (T)fp16_to_float(x); }
template <class T> OPD_FN T load_fp32(float x) { return (T)x; }
template <class T> OPD_FN T load_fp64(double x) { return (T)x; }

template <class T>
static void load_block(const void* data, int dtype, opd_i64 start, int n, T* x, opd_u16* bits) {
  if (dtype == BF16) {
    const opd_u16* p = (const opd_u16*)data + start;
    OPD_SIMD() for (int i = 0; i < n; i++) { x[i] = load_bf16<T>(p[i]); bits[i] = p[i]; }
    return;
  }
  if (dtype == FP16) {
    const opd_u16* p = (const opd_u16*)data + start;
    OPD_SIMD() for (int i = 0; i < n; i++) x[i] = load_fp16<T>(p[i]);
  } else if (dtype == FP32) {
    const float* p = (const float*)data + start;
    OPD_SIMD() for (int i = 0; i < n; i++) x[i] = load_fp32<T>(p[i]);
  } else {
    const double* p = (const double*)data + start;
    OPD_SIMD() for (int i = 0; i < n; i++) x[i] = load_fp64<T>(p[i]);
  }
  OPD_SIMD() for (int i = 0; i < n; i++) bits[i] = float_to_bf16((float)x[i]);
}

OPD_FN opd_u64 bits_of(float x) { return float_bits(x); }
OPD_FN opd_u64 bits_of(double x) { return double_bits(x); }

template <class T>
static void delta_wide(const void* base, int base_dtype, const void* trained, int trained_dtype, opd_i64 n,
                       const DeltaOptions& options, DeltaWork& work) {
  static thread_local ChangedQueue changed;
  static thread_local FiniteBlock block;
  static thread_local T x[OPD_DELTA_BLOCK], y[OPD_DELTA_BLOCK];
  static thread_local bool equal[OPD_DELTA_BLOCK];
  changed.n = 0;
  for (opd_i64 start = 0; start < n; start += OPD_DELTA_BLOCK) {
    int m = n - start < OPD_DELTA_BLOCK ? (int)(n - start) : OPD_DELTA_BLOCK;
    load_block(base, base_dtype, start, m, x, block.w);
    load_block(trained, trained_dtype, start, m, y, block.v);
    int same = 0;
    const bool one_dtype = base_dtype == trained_dtype;  // else a NaN equals nothing: widening drops its payload
    OPD_SIMD(reduction(+ : same))
    for (int i = 0; i < m; i++) {
      equal[i] = (bits_of(x[i]) == bits_of(y[i])) & (one_dtype | (x[i] == x[i]));
      same += equal[i];
    }
    if (largest_magnitude(block.w, block.v, m) >= 0x7F00) m = drop_nonfinite(block, x, y, equal, m, work);
    else work.bit_equal += same;
    count_base(block.w, m, work.hist_base, block.w, block.v);
    int largest;
    changed.n += collect(block.w, block.v, m, changed.w + changed.n, changed.v + changed.n, &largest);
    if (changed.n >= OPD_DELTA_BLOCK) { count_changed(changed, options, work, false); changed.n = 0; }
    count_stored(block, x, y, m, options, work);
  }
  count_changed(changed, options, work, false);
}

// One bit per coordinate: whether the visible delta exceeds the first threshold.
static void change_bits(const void* base, int base_dtype, const void* trained, int trained_dtype, opd_i64 n,
                        const DeltaOptions& options, unsigned char* mask) {
  static thread_local opd_u16 w[OPD_DELTA_BLOCK], v[OPD_DELTA_BLOCK];
  static thread_local float x[OPD_DELTA_BLOCK];
  static thread_local unsigned char bit[OPD_DELTA_BLOCK];
  const opd_u32 threshold_bits = options.threshold_bits[0];
  for (opd_i64 start = 0; start < n; start += OPD_DELTA_BLOCK) {
    int m = n - start < OPD_DELTA_BLOCK ? (int)(n - start) : OPD_DELTA_BLOCK;
    load_block(base, base_dtype, start, m, x, w);
    load_block(trained, trained_dtype, start, m, x, v);
    OPD_SIMD()
    for (int i = 0; i < m; i++) {
      opd_u32 magnitude = visible_delta(w[i], v[i]);
      opd_u32 finite = (opd_u32)((w[i] & 0x7FFFu) < OPD_INFINITY_BITS) & (opd_u32)(magnitude < OPD_INFINITY_BITS) &
                       (opd_u32)((v[i] & 0x7FFFu) < OPD_INFINITY_BITS);
      bit[i] = (unsigned char)((opd_u32)(magnitude > threshold_bits) & finite);
    }
    for (int i = m; i & 7; i++) bit[i] = 0;
    for (int i = 0; i < m; i += 8) {
      opd_u64 eight;
      __builtin_memcpy(&eight, bit + i, 8);
      mask[(start + i) >> 3] = (unsigned char)((eight * 0x0102040810204080ULL) >> 56);  // gathers the eight low bits
    }
  }
}

}  // namespace OPD_ISA

#include "steps.inl"

namespace OPD_ISA {
#define OPD_STEPS_FROM_BF16 (1 << 18)  // coordinates of a call from which folding `by_step` pays
#define OPD_STEPS_FROM_WIDE (1 << 15)

static void delta(const void* base, int base_dtype, const void* trained, int trained_dtype, opd_i64 n,
                  const DeltaOptions* options, DeltaWork* work, unsigned char* mask) {
  if (mask) change_bits(base, base_dtype, trained, trained_dtype, n, *options, mask);
  const bool bf16_pair = base_dtype == BF16 && trained_dtype == BF16;
  const bool fp64 = base_dtype == FP64 || trained_dtype == FP64;
#if defined(OPD_AVX2) || defined(OPD_AVX512)
  if (bf16_pair && n >= OPD_STEPS_FROM_BF16) {
    count_steps_bf16((const opd_u16*)base, (const opd_u16*)trained, n, *options, *work,
                     [=](const opd_u16* w, const opd_u16* v, opd_i64 m) { delta_bf16(w, v, m, *options, *work); });
    return;
  }
  if (!bf16_pair && !fp64 && n >= OPD_STEPS_FROM_WIDE) {
    count_steps_wide(base, base_dtype, trained, trained_dtype, n, *options, *work, [=](opd_i64 start, opd_i64 m) {
      delta_wide<float>((const char*)base + start * element_bytes(base_dtype), base_dtype,
                        (const char*)trained + start * element_bytes(trained_dtype), trained_dtype, m, *options, *work);
    });
    return;
  }
#endif
  if (bf16_pair)
    delta_bf16((const opd_u16*)base, (const opd_u16*)trained, n, *options, *work);
  else if (fp64)
    delta_wide<double>(base, base_dtype, trained, trained_dtype, n, *options, *work);
  else
    delta_wide<float>(base, base_dtype, trained, trained_dtype, n, *options, *work);
}

const DeltaKernels delta_kernels = {delta};
}  // namespace OPD_ISA
