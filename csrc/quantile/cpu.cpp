// `quantile` over threads. A sample brackets the cut; one pass counts what lies beyond the bracket and keeps what lies in it,
// where the cut is then found exactly. A bracket that misses, or holds too much, is answered by narrowing histograms over
// the whole array: slower, never wrong. Every figure is exact, so neither sample nor threads can change one.
#include <algorithm>
#include <cmath>
#include <memory>

#include "../common/cpu/dispatch.h"
#include "../common/cpu/parallel.h"

namespace {
constexpr int64_t COLLECT_ALL_BELOW = 1 << 17;    // no sample: every key is kept
constexpr int64_t LEAST_SAMPLE = 1 << 13, MOST_SAMPLE = 1 << 16, SAMPLE_ONE_IN = 256;
constexpr int64_t KEEP_ONE_IN = 8;                // room for this share of the keys in a bracket, which expects 1 to 5 %
constexpr double DEVIATIONS = 4;                  // half width of a bracket, in standard deviations of the sampled rank
constexpr double MARGIN = 8;                      // and some ranks for small k, where the rank is not normal
constexpr int64_t SLACK = 64;                     // keys that a vector store may write beyond the last

uint64_t scatter(uint64_t i) {                    // splitmix64: where in its stratum a sample is taken
  i = (i + 1) * 0x9E3779B97F4A7C15ull;
  i = (i ^ (i >> 30)) * 0xBF58476D1CE4E5B9ull;
  i = (i ^ (i >> 27)) * 0x94D049BB133111EBull;
  return i ^ (i >> 31);
}

// The key (low bit clear) of the given rank from the top within [low, high]; histogram(low, high, shift, bins) counts.
template <class Histogram>
uint64_t descend(uint64_t low, uint64_t high, int64_t rank, Histogram histogram) {
  while (high - low > 1) {
    int bits = 64 - __builtin_clzll(high - low), shift = bits > OPD_QUANTILE_BITS ? bits - OPD_QUANTILE_BITS : 1;
    opd_i64 bins[OPD_QUANTILE_BINS + 1] = {};     // the last one takes what lies outside
    histogram(low, high, shift, bins);
    int bin = OPD_QUANTILE_BINS - 1;
    while (bin > 0 && bins[bin] < rank) rank -= bins[bin--];
    low += (uint64_t)bin << shift;
    high = std::min(high, low + ((uint64_t(1) << shift) - 1));
  }
  return low;
}

template <class Key>
void count_keys(const Key* keys, int64_t n, uint64_t low, uint64_t high, int shift, opd_i64* bins) {
  const Key base = (Key)low, span = (Key)(high - low);
  for (int64_t i = 0; i < n; i++) {
    Key offset = keys[i] - base;
    bins[offset <= span ? offset >> shift : (Key)OPD_QUANTILE_BINS]++;
  }
}

struct Sought { uint64_t low, high; };            // a bracket; high is odd: it includes the mask bit

template <class F, class Key>
std::vector<Sought> brackets(const F* values, int64_t n, bool smallest, const std::vector<int64_t>& k, uint64_t top) {
  std::vector<Sought> found(k.size(), Sought{0, top | 1});
  if (n <= COLLECT_ALL_BELOW) return found;
  const int64_t size = std::clamp(n / SAMPLE_ONE_IN, LEAST_SAMPLE, MOST_SAMPLE);
  const double stratum = (double)n / (double)size;
  std::vector<Key> sample;
  for (int64_t i = 0; i < size; i++) {
    int64_t first = (int64_t)(stratum * (double)i), last = std::min((int64_t)(stratum * (double)(i + 1)), n);
    Key key = magnitude_key(values[first + (int64_t)((scatter((uint64_t)i) >> 32) * (uint64_t)(last - first) >> 32)], smallest);
    if (key <= (Key)(top | 1)) sample.push_back(key);
  }
  const double valid = (double)sample.size();
  auto histogram = [&](uint64_t low, uint64_t high, int shift, opd_i64* bins) {
    count_keys(sample.data(), (int64_t)sample.size(), low, high, shift, bins);
  };
  for (size_t j = 0; j < k.size() && !sample.empty(); j++) {
    double share = std::min(1.0, (double)k[j] / ((double)n * valid / (double)size));
    double rank = share * valid, width = DEVIATIONS * std::sqrt(rank * (1 - share)) + MARGIN;
    if (rank - width >= 1) found[j].high = descend(0, top | 1, (int64_t)(rank - width), histogram) | 1;
    if (rank + width < valid) found[j].low = descend(0, top | 1, (int64_t)(rank + width) + 1, histogram);
  }
  return found;
}

template <class F, class Key>
void quantile_wide(const F* values, int dtype, int64_t n, const std::vector<int64_t>& wanted, bool smallest, const unsigned char* mask,
                   int threads, uint64_t top, QuantileResult* results) {
  const int n_k = (int)wanted.size();
  const std::vector<Sought> sought = brackets<F, Key>(values, n, smallest, wanted, top);
  const int64_t share = n / threads + SERIAL_BELOW;
  const int64_t capacity = OPD_QUANTILE_GRAIN + (n <= COLLECT_ALL_BELOW ? n : share / KEEP_ONE_IN);
  std::vector<std::unique_ptr<Key[]>> room((size_t)threads * n_k);
  std::vector<QuantileBracket> parts((size_t)threads * n_k);
  std::vector<opd_i64> nan((size_t)threads * 2);
  for (size_t i = 0; i < parts.size(); i++) {
    const Sought& s = sought[i % n_k];
    const bool select = s.high - s.low > 1;
    if (select) room[i].reset(new Key[capacity + SLACK]);  // pages come when they are touched
    parts[i] = {s.low, s.high, room[i].get(), select ? capacity : 0, 0, 0, 0, 0, 0};
  }
  parallel_ranges(n, threads, OPD_QUANTILE_GRAIN, [&](int t, int64_t start, int64_t stop) {
    kernels().quantile_scan(values + start, dtype, mask ? mask + (start >> 3) : nullptr, stop - start, smallest, &parts[(size_t)t * n_k], n_k,
                            &nan[(size_t)t * 2]);
  });
  int64_t missing = 0, missing_masked = 0;
  for (int t = 0; t < threads; t++) { missing += nan[2 * t]; missing_masked += nan[2 * t + 1]; }
  for (int j = 0; j < n_k; j++) {
    QuantileResult& result = results[j];
    const int64_t k = std::min(wanted[j], n - missing);
    result = {NAN, 0, 0, 0, 0, missing};
    if (k == 0) continue;
    QuantileBracket all{};
    for (int t = 0; t < threads; t++) {
      const QuantileBracket& part = parts[(size_t)t * n_k + j];
      all.above += part.above; all.above_masked += part.above_masked;
      all.inside += part.inside; all.inside_masked += part.inside_masked;
      all.overflow |= part.overflow;
    }
    all.above -= missing;                         // a NaN's key is above every other
    all.above_masked -= missing_masked;
    uint64_t cut = sought[j].low;
    if (all.overflow || k <= all.above || k > all.above + all.inside) {
      cut = descend(0, top | 1, k, [&](uint64_t low, uint64_t high, int shift, opd_i64* bins) {
        std::vector<opd_i64> local((size_t)threads * (OPD_QUANTILE_BINS + 1));
        parallel_ranges(n, threads, OPD_QUANTILE_GRAIN, [&](int t, int64_t start, int64_t stop) {
          kernels().quantile_narrow(values + start, dtype, stop - start, smallest, low, high, shift, &local[(size_t)t * (OPD_QUANTILE_BINS + 1)]);
        });
        for (size_t i = 0; i < local.size(); i++) bins[i % (OPD_QUANTILE_BINS + 1)] += local[i];
      });
      std::vector<QuantileBracket> exact((size_t)threads, QuantileBracket{cut, cut | 1, nullptr, 0, 0, 0, 0, 0, 0});
      std::vector<opd_i64> again((size_t)threads * 2);
      parallel_ranges(n, threads, OPD_QUANTILE_GRAIN, [&](int t, int64_t start, int64_t stop) {
        kernels().quantile_scan(values + start, dtype, mask ? mask + (start >> 3) : nullptr, stop - start, smallest, &exact[t], 1, &again[2 * t]);
      });
      for (const QuantileBracket& part : exact) {
        result.above += part.above; result.above_masked += part.above_masked;
        result.tied += part.inside; result.tied_masked += part.inside_masked;
      }
      result.above -= missing;
      result.above_masked -= missing_masked;
    } else if (sought[j].high - sought[j].low == 1) {
      result.above = all.above; result.above_masked = all.above_masked;
      result.tied = all.inside; result.tied_masked = all.inside_masked;
    } else {
      cut = descend(sought[j].low, sought[j].high, k - all.above, [&](uint64_t low, uint64_t high, int shift, opd_i64* bins) {
        for (int t = 0; t < threads; t++) count_keys(room[(size_t)t * n_k + j].get(), parts[(size_t)t * n_k + j].inside, low, high, shift, bins);
      });
      result.above = all.above; result.above_masked = all.above_masked;
      for (int t = 0; t < threads; t++) {
        const Key* keys = room[(size_t)t * n_k + j].get();
        for (int64_t i = 0; i < parts[(size_t)t * n_k + j].inside; i++) {
          int64_t above = keys[i] > (Key)(cut | 1), tied = (keys[i] | 1) == (Key)(cut | 1), bit = keys[i] & 1;
          result.above += above; result.above_masked += above & bit;
          result.tied += tied; result.tied_masked += tied & bit;
        }
      }
    }
    result.cut = key_magnitude((Key)cut, smallest);
  }
}

// Two bytes a value: a table of every magnitude, with and without the mask bit, answers for any k.
void quantile_two_bytes(const opd_u16* values, int dtype, int64_t n, const std::vector<int64_t>& wanted, bool smallest,
                           const unsigned char* mask, int threads, QuantileResult* results) {
  std::vector<opd_i64> tables((size_t)threads * 65536);
  parallel_ranges(n, threads, 8, [&](int t, int64_t start, int64_t stop) {
    kernels().quantile_table(values + start, mask ? mask + (start >> 3) : nullptr, stop - start, &tables[(size_t)t * 65536]);
  });
  for (size_t i = 65536; i < tables.size(); i++) tables[i & 65535] += tables[i];
  const int infinity = dtype == BF16 ? 0x7F80 : 0x7C00;
  int64_t missing = 0;
  for (int i = 2 * (infinity + 1); i < 65536; i++) missing += tables[i];
  for (size_t j = 0; j < wanted.size(); j++) {
    QuantileResult& result = results[j];
    const int64_t k = std::min(wanted[j], n - missing);
    result = {NAN, 0, 0, 0, 0, missing};
    if (k == 0) continue;
    int magnitude = smallest ? 0 : infinity;
    for (;; magnitude += smallest ? 1 : -1) {
      int64_t masked = tables[2 * magnitude + 1], count = tables[2 * magnitude] + masked;
      if (result.above + count >= k) { result.tied = count; result.tied_masked = masked; break; }
      result.above += count;
      result.above_masked += masked;
    }
    result.cut = dtype == BF16 ? bf16_to_float((opd_u16)magnitude) : fp16_to_float((opd_u16)magnitude);
  }
}
}  // namespace

void quantile(const void* values, int dtype, int64_t n, const std::vector<int64_t>& k, bool largest, const unsigned char* mask, int threads,
              QuantileResult* results) {
  threads = threads < 1 || n < SERIAL_BELOW ? 1 : threads;
  if (dtype == FP32) quantile_wide<float, opd_u32>((const float*)values, dtype, n, k, !largest, mask, threads, OPD_TOP32, results);
  else if (dtype == FP64) quantile_wide<double, opd_u64>((const double*)values, dtype, n, k, !largest, mask, threads, OPD_TOP64, results);
  else quantile_two_bytes((const opd_u16*)values, dtype, n, k, !largest, mask, threads, results);
}
