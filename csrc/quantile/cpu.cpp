// `quantile` over threads. A sample brackets the threshold; one pass counts the values beyond the bracket and collects
// those inside, where the threshold is then found exactly. A bracket that misses, or collects too much, is replaced by
// narrowing histograms over the whole array: slower, never wrong. The result is exact, so neither the sample nor the
// threads change it.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../common/cpu/boundary.h"
#include "../common/cpu/parallel.h"
#include "cpu.h"

namespace {
constexpr int64_t COLLECT_ALL_BELOW = 1 << 17;    // no sample: every key is collected
constexpr int64_t LEAST_SAMPLE = 1 << 13, MOST_SAMPLE = 1 << 16, SAMPLE_ONE_IN = 256;
// Space for this fraction of the keys of a bracket, of which 1 to 5 % are expected inside.
constexpr int64_t KEEP_ONE_IN = 8;
constexpr double DEVIATIONS = 4;                  // half width of a bracket, in standard deviations of the sampled rank
constexpr double MARGIN = 8;                      // plus some ranks for small k, where the rank is not normal
constexpr int64_t SLACK = 64;                     // keys that a vector store may write beyond the last

uint64_t scatter(uint64_t i) {                    // splitmix64: the position of a sample in its stratum
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
    opd_i64 bins[OPD_QUANTILE_BINS + 1] = {};     // the last one counts the values outside
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

struct Bracket { uint64_t low, high; };  // of keys; high is odd: it includes the mask bit

template <class F, class Key>
std::vector<Bracket> find_brackets(const F* values, int64_t n, bool smallest, const std::vector<int64_t>& k,
                                   uint64_t top) {
  std::vector<Bracket> brackets(k.size(), Bracket{0, top | 1});
  if (n <= COLLECT_ALL_BELOW) return brackets;
  const int64_t size = std::clamp(n / SAMPLE_ONE_IN, LEAST_SAMPLE, MOST_SAMPLE);
  const double stratum = (double)n / (double)size;
  std::vector<Key> sample;
  for (int64_t i = 0; i < size; i++) {
    int64_t first = (int64_t)(stratum * (double)i), last = std::min((int64_t)(stratum * (double)(i + 1)), n);
    Key key = magnitude_key(values[first + (int64_t)((scatter((uint64_t)i) >> 32) * (uint64_t)(last - first) >> 32)],
                            smallest);
    if (key <= (Key)(top | 1)) sample.push_back(key);
  }
  const double valid = (double)sample.size();
  auto histogram = [&](uint64_t low, uint64_t high, int shift, opd_i64* bins) {
    count_keys(sample.data(), (int64_t)sample.size(), low, high, shift, bins);
  };
  for (size_t j = 0; j < k.size() && !sample.empty(); j++) {
    double fraction = std::min(1.0, (double)k[j] / ((double)n * valid / (double)size));
    double rank = fraction * valid, width = DEVIATIONS * std::sqrt(rank * (1 - fraction)) + MARGIN;
    if (rank - width >= 1) brackets[j].high = descend(0, top | 1, (int64_t)(rank - width), histogram) | 1;
    if (rank + width < valid) brackets[j].low = descend(0, top | 1, (int64_t)(rank + width) + 1, histogram);
  }
  return brackets;
}

template <class F, class Key>
void quantile_wide(const F* values, int dtype, int64_t n, const std::vector<int64_t>& ranks, bool smallest,
                   const unsigned char* mask, int threads, uint64_t top, QuantileResult* results) {
  const int n_k = (int)ranks.size();
  const QuantileKernels& kernels = OPD_KERNELS(quantile_kernels);
  const std::vector<Bracket> brackets = find_brackets<F, Key>(values, n, smallest, ranks, top);
  const int64_t range = n / threads + SERIAL_BELOW;
  const int64_t capacity = OPD_QUANTILE_GRAIN + (n <= COLLECT_ALL_BELOW ? n : range / KEEP_ONE_IN);
  std::vector<std::unique_ptr<Key[]>> collected((size_t)threads * n_k);
  std::vector<QuantileBracket> parts((size_t)threads * n_k);
  std::vector<opd_i64> nan((size_t)threads * 2);
  for (size_t i = 0; i < parts.size(); i++) {
    const Bracket& s = brackets[i % n_k];
    const bool select = s.high - s.low > 1;
    if (select) collected[i].reset(new Key[capacity + SLACK]);  // pages are allocated on first use
    parts[i] = {s.low, s.high, collected[i].get(), select ? capacity : 0, 0, 0, 0, 0, 0};
  }
  parallel_ranges(n, threads, OPD_QUANTILE_GRAIN, [&](int t, int64_t start, int64_t stop) {
    kernels.scan(values + start, dtype, mask ? mask + (start >> 3) : nullptr, stop - start, smallest,
                 parts.data() + (size_t)t * n_k, n_k, &nan[(size_t)t * 2]);
  });
  int64_t n_nan = 0, n_nan_masked = 0;
  for (int t = 0; t < threads; t++) { n_nan += nan[2 * t]; n_nan_masked += nan[2 * t + 1]; }
  for (int j = 0; j < n_k; j++) {
    QuantileResult& result = results[j];
    const int64_t k = std::min(ranks[j], n - n_nan);
    result = {NAN, 0, 0, 0, 0, n_nan};
    if (k == 0) continue;
    QuantileBracket all{};
    for (int t = 0; t < threads; t++) {
      const QuantileBracket& part = parts[(size_t)t * n_k + j];
      all.above += part.above; all.above_masked += part.above_masked;
      all.inside += part.inside; all.inside_masked += part.inside_masked;
      all.overflow |= part.overflow;
    }
    all.above -= n_nan;  // the key of a NaN is above every other
    all.above_masked -= n_nan_masked;
    uint64_t threshold = brackets[j].low;
    if (all.overflow || k <= all.above || k > all.above + all.inside) {
      threshold = descend(0, top | 1, k, [&](uint64_t low, uint64_t high, int shift, opd_i64* bins) {
        std::vector<opd_i64> local((size_t)threads * (OPD_QUANTILE_BINS + 1));
        parallel_ranges(n, threads, OPD_QUANTILE_GRAIN, [&](int t, int64_t start, int64_t stop) {
          kernels.narrow(values + start, dtype, stop - start, smallest, low, high, shift,
                         &local[(size_t)t * (OPD_QUANTILE_BINS + 1)]);
        });
        for (size_t i = 0; i < local.size(); i++) bins[i % (OPD_QUANTILE_BINS + 1)] += local[i];
      });
      const QuantileBracket one_key{threshold, threshold | 1, nullptr, 0, 0, 0, 0, 0, 0};
      std::vector<QuantileBracket> exact((size_t)threads, one_key);
      std::vector<opd_i64> again((size_t)threads * 2);
      parallel_ranges(n, threads, OPD_QUANTILE_GRAIN, [&](int t, int64_t start, int64_t stop) {
        kernels.scan(values + start, dtype, mask ? mask + (start >> 3) : nullptr, stop - start, smallest,
                     &exact[t], 1, &again[2 * t]);
      });
      for (const QuantileBracket& part : exact) {
        result.above += part.above; result.above_masked += part.above_masked;
        result.tied += part.inside; result.tied_masked += part.inside_masked;
      }
      result.above -= n_nan;
      result.above_masked -= n_nan_masked;
    } else if (brackets[j].high - brackets[j].low == 1) {
      result.above = all.above; result.above_masked = all.above_masked;
      result.tied = all.inside; result.tied_masked = all.inside_masked;
    } else {
      auto histogram = [&](uint64_t low, uint64_t high, int shift, opd_i64* bins) {
        for (int t = 0; t < threads; t++) {
          const size_t i = (size_t)t * n_k + j;
          count_keys(collected[i].get(), parts[i].inside, low, high, shift, bins);
        }
      };
      threshold = descend(brackets[j].low, brackets[j].high, k - all.above, histogram);
      result.above = all.above; result.above_masked = all.above_masked;
      for (int t = 0; t < threads; t++) {
        const Key* keys = collected[(size_t)t * n_k + j].get();
        for (int64_t i = 0; i < parts[(size_t)t * n_k + j].inside; i++) {
          int64_t above = keys[i] > (Key)(threshold | 1), tied = (keys[i] | 1) == (Key)(threshold | 1);
          int64_t bit = keys[i] & 1;
          result.above += above; result.above_masked += above & bit;
          result.tied += tied; result.tied_masked += tied & bit;
        }
      }
    }
    result.threshold = key_magnitude((Key)threshold, smallest);
  }
}

// Two-byte dtypes: a table of every magnitude, with and without the mask bit, gives the result for any k.
void quantile_two_bytes(const opd_u16* values, int dtype, int64_t n, const std::vector<int64_t>& ranks, bool smallest,
                        const unsigned char* mask, int threads, QuantileResult* results) {
  std::vector<opd_i64> tables((size_t)threads * 65536);
  const QuantileKernels& kernels = OPD_KERNELS(quantile_kernels);
  parallel_ranges(n, threads, 8, [&](int t, int64_t start, int64_t stop) {
    kernels.table(values + start, mask ? mask + (start >> 3) : nullptr, stop - start,
                  &tables[(size_t)t * 65536]);
  });
  for (size_t i = 65536; i < tables.size(); i++) tables[i & 65535] += tables[i];
  const int infinity = dtype == BF16 ? (int)OPD_INFINITY_BITS : 0x7C00;
  int64_t n_nan = 0;
  for (int i = 2 * (infinity + 1); i < 65536; i++) n_nan += tables[i];
  for (size_t j = 0; j < ranks.size(); j++) {
    QuantileResult& result = results[j];
    const int64_t k = std::min(ranks[j], n - n_nan);
    result = {NAN, 0, 0, 0, 0, n_nan};
    if (k == 0) continue;
    int magnitude = smallest ? 0 : infinity;
    for (;; magnitude += smallest ? 1 : -1) {
      int64_t masked = tables[2 * magnitude + 1], count = tables[2 * magnitude] + masked;
      if (result.above + count >= k) { result.tied = count; result.tied_masked = masked; break; }
      result.above += count;
      result.above_masked += masked;
    }
    result.threshold = dtype == BF16 ? bf16_to_float((opd_u16)magnitude) : fp16_to_float((opd_u16)magnitude);
  }
}
}  // namespace

void quantile(const void* values, int dtype, int64_t n, const int64_t* k, int num_k, bool largest,
              const unsigned char* mask, int threads, QuantileResult* results) {
  const std::vector<int64_t> ranks(k, k + num_k);
  threads = threads < 1 || n < SERIAL_BELOW ? 1 : threads;
  if (dtype == FP32)
    quantile_wide<float, opd_u32>((const float*)values, dtype, n, ranks, !largest, mask, threads, OPD_TOP32, results);
  else if (dtype == FP64)
    quantile_wide<double, opd_u64>((const double*)values, dtype, n, ranks, !largest, mask, threads, OPD_TOP64, results);
  else
    quantile_two_bytes((const opd_u16*)values, dtype, n, ranks, !largest, mask, threads, results);
}

// values: [n]; k, thresholds: [num_k]; mask: [(n + 7) / 8] or null; counts: [num_k][QUANTILE_NUM_COUNTS].
OPD_EXPORT int opd_quantile(const void* values, int64_t dtype, int64_t n, const int64_t* k, int64_t num_k,
                            int64_t largest, const unsigned char* mask, int64_t threads, double* thresholds,
                            int64_t* counts) {
  return guarded([&] {
    require_dtypes(dtype, dtype);
    require_size(n, values != nullptr);
    require_aligned(values, element_bytes((int)dtype));
    require_size(num_k, k && thresholds && counts);
    for (int64_t j = 0; j < num_k; j++) require(k[j] >= 1, "ranks begin at 1");
    std::vector<QuantileResult> results((size_t)num_k);
    quantile(values, (int)dtype, n, k, narrow(num_k), largest != 0, mask, narrow(threads), results.data());
    for (int64_t j = 0; j < num_k; j++) {
      const QuantileResult& r = results[(size_t)j];
      thresholds[j] = r.threshold;
      const int64_t row[QUANTILE_NUM_COUNTS] = {r.above, r.tied, r.above_masked, r.tied_masked, r.nan};
      std::copy(row, row + QUANTILE_NUM_COUNTS, counts + QUANTILE_NUM_COUNTS * j);
    }
  });
}
