// `delta` over threads: each counts its range in its own tables, which are then added to the caller's int64 tables.
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "../common/cpu/boundary.h"
#include "../common/cpu/fold.h"
#include "../common/cpu/parallel.h"
#include "cpu.h"

namespace {
constexpr int64_t FOLD_AFTER = int64_t(1) << 30;  // coordinates a thread counts before its 32-bit counters are folded
constexpr int64_t RANGE_BELOW = 1 << 16;  // coordinates of a tensor for which finding its bins costs less than all bins

struct CallCounts {  // the counts of one call, before they are added to the caller's
  std::vector<int64_t> tables = std::vector<int64_t>((HIST_BASE_OVER + OPD_MAX_VISIBLE_THRESHOLDS) * OPD_BINS);
  int64_t counts[NUM_COUNTS];
  // First and last bin in use besides bin 0, which is always in use: a tensor uses few of the 2^15 magnitudes.
  int first = OPD_BINS, last = 0;

  int64_t* table(int t) { return tables.data() + (size_t)t * OPD_BINS; }
  int64_t& bin(int t, int i) {
    first = i && i < first ? i : first;
    last = i > last ? i : last;
    return table(t)[i];
  }
  template <class Body> void each_bin(Body body) {
    body(0);
    for (int i = first; i <= last; i++) body(i);
  }
  void clear(int n_tables) {
    for (int t = 0; t < n_tables; t++) {
      table(t)[0] = 0;
      if (first <= last) std::memset(table(t) + first, 0, sizeof(int64_t) * (last - first + 1));
    }
    first = OPD_BINS, last = 0;
  }
};

// Bins that may be in use besides the first 64, multiples of 64: of weights and of their differences.
struct BinRange { int first = 64, stop = OPD_BINS; };

// From the magnitudes of values of at most four bytes. A difference of two values is a multiple of the spacing of the
// smaller one, which is at least 2^-23 of it, and less than twice the larger one.
BinRange bin_range(const void* base, int base_dtype, const void* trained, int trained_dtype, int64_t n) {
  opd_u32 smallest = ~0u, largest = 0;
  const auto scan = [&](const void* data, int dtype) {
    const auto take = [&](auto bits_at) {
      opd_u32 least = ~0u, most = 0;
      for (int64_t i = 0; i < n; i++) {
        const opd_u32 bits = bits_at(i), less_one = bits - 1;  // zero becomes the largest
        least = less_one < least ? less_one : least;
        most = bits > most ? bits : most;
      }
      smallest = least < smallest ? least : smallest;
      largest = most > largest ? most : largest;
    };
    if (dtype == FP32) take([=](int64_t i) { return float_bits(((const float*)data)[i]) & 0x7FFFFFFFu; });
    else if (dtype == BF16) take([=](int64_t i) { return (((const opd_u16*)data)[i] & 0x7FFFu) << 16; });
    else take([=](int64_t i) { return float_bits(fp16_to_float(((const opd_u16*)data)[i])) & 0x7FFFFFFFu; });
  };
  scan(base, base_dtype);
  scan(trained, trained_dtype);
  const int least = (int)(((smallest == ~0u ? 0 : smallest) + 1) >> 16) - 24 * OPD_MANTISSAS;
  const int most = (int)(largest >> 16) + OPD_MANTISSAS + 2;  // rounded up, of a difference
  BinRange range;
  range.first = least < 64 ? 64 : least / 64 * 64;
  range.stop = most > OPD_BINS ? OPD_BINS : (most + 63) / 64 * 64;
  return range;
}

// Adds or subtracts (`sign`) the sums of count * value^2 and of count * value over a histogram of magnitudes, exactly.
// A bfloat16 is an integer m times a power of two.
void add_table(CallCounts& call, int t, opd_i64* squares, opd_i64* values, int sign) {
  for (int exponent = call.first / OPD_MANTISSAS; exponent <= call.last / OPD_MANTISSAS; exponent++) {
    const int64_t* bins = call.table(t) + exponent * OPD_MANTISSAS;
    int64_t square = 0, value = 0;
    for (int mantissa = 0; mantissa < OPD_MANTISSAS; mantissa++) {
      int64_t m = exponent ? OPD_MANTISSAS + mantissa : mantissa;
      square += bins[mantissa] * (m * m);
      value += bins[mantissa] * m;
    }
    if (!value) continue;
    int power = (exponent ? exponent : 1) - 134;  // value = m * 2^power
    if (squares) sum_add(squares, sign * square, OPD_SUM_SHIFT + 2 * power);
    if (values) sum_add(values, sign * value, OPD_SUM_SHIFT + power);
  }
}

// Adds what `by_step` holds, as if each coordinate had been counted alone.
void fold_steps(DeltaWork& work, CallCounts& call, const DeltaOptions& options, bool bf16_pair) {
  opd_u16 threshold_bits[OPD_MAX_VISIBLE_THRESHOLDS];
  for (int k = 0; k < OPD_MAX_VISIBLE_THRESHOLDS; k++) threshold_bits[k] = (opd_u16)options.threshold_bits[k];
  for (int row = 0; row < OPD_STEP_ROWS; row++) {
    const int step = row - OPD_STEPS;
    const bool equal = row == OPD_EQUAL_BITS || (bf16_pair && !step), counted_alone = row == OPD_MORE_STEPS;
    const auto add = [&](int w, opd_u32 count) {
      const int magnitude = w & 0x7FFF;
      call.bin(HIST_BASE, magnitude) += count;
      if (equal) call.counts[COUNT_BIT_EQUAL] += count;
      else if (!(bf16_pair && counted_alone)) call.bin(HIST_BASE_CHANGED, magnitude) += count;
      if (equal || counted_alone || !step) return;
      const opd_u16 v = (opd_u16)(w + step), delta = (opd_u16)visible_delta((opd_u16)w, v);
      call.bin(HIST_DELTA, delta) += count;
      const int exceeded = change_class(delta, threshold_bits) - 1;
      for (int k = 0; k < exceeded; k++) call.bin(HIST_BASE_OVER + k, magnitude) += count;
      call.bin(HIST_TRAINED_CHANGED, v & 0x7FFF) += count;
      call.counts[COUNT_ULP + ulp_bin((opd_u16)w, v)] += count;
      const double abs_delta = bf16_to_float(delta);  // exact: a few steps of one number
      if (bf16_pair && abs_delta > work.max_delta) work.max_delta = abs_delta;
    };
    const auto drain_bins = [&](int first, int stop) {
      if (first < stop) drain(work.by_step[row] + first, stop - first, [&](int i, opd_u32 n) { add(first + i, n); });
    };
    for (int sign = 0; sign < 2 * OPD_BINS; sign += OPD_BINS) {
      const int first = work.smallest / 64 * 64, stop = (work.largest + 64) / 64 * 64;
      drain_bins(sign, sign + (first < 64 ? first : 64));  // bin 0
      drain_bins(sign + first, sign + stop);
    }
  }
  work.smallest = OPD_BINS, work.largest = -1;
  if (bf16_pair) return;
  call.bin(HIST_BASE_CHANGED, 0) -= work.signs_of_zero;
  work.signs_of_zero = 0;
  drain(work.hist_delta_blocks, OPD_BINS, [&](int i, opd_u32 count) {
    call.bin(HIST_DELTA_STORED, i) += count;
    for (int k = 0; k < OPD_STORED_THRESHOLDS; k++) {
      // The coordinates in the bin of a threshold itself were compared one by one.
      const opd_u32 below = i < (int)(float_bits((float)options.thresholds[k]) >> 16) ? count : 0;
      call.counts[COUNT_LT + k] += below;
      call.counts[COUNT_LE + k] += below;
    }
  });
}

void fold(DeltaWork& work, CallCounts& call, const DeltaOptions& options, bool bf16_pair, BinRange range) {
  if (work.largest >= 0) fold_steps(work, call, options, bf16_pair);
  const auto drain_bins = [&](opd_u32* table, auto add) {
    drain(table, 64, add);
    if (range.first < range.stop)
      drain(table + range.first, range.stop - range.first, [&](int i, opd_u32 count) { add(range.first + i, count); });
  };
  const auto add_to = [&](int t) { return [&call, t](int i, opd_u32 count) { call.bin(t, i) += count; }; };
  drain_bins(work.hist_base, add_to(HIST_BASE));
  drain_bins(work.hist_base + OPD_BINS, add_to(HIST_BASE));  // negative
  drain_bins(work.hist_delta, add_to(HIST_DELTA));
  drain_bins(work.hist_trained_changed, add_to(HIST_TRAINED_CHANGED));
  work.hist_trained_changed[OPD_BINS] = 0;
  if (!bf16_pair) drain_bins(work.hist_base_changed, add_to(HIST_BASE_CHANGED));
  drain_bins(work.hist_delta_stored, [&](int i, opd_u32 count) { call.bin(HIST_DELTA_STORED, i) += (int32_t)count; });
  drain_bins(work.hist_base_by_class, [](int, opd_u32) {});  // unchanged
  for (int c = 1; c <= options.n_thresholds + 1; c++)
    drain_bins(work.hist_base_by_class + c * OPD_BINS, [&](int i, opd_u32 count) {
      if (bf16_pair) call.bin(HIST_BASE_CHANGED, i) += count;  // bfloat16 pairs differ in both views or in neither
      for (int k = 0; k < c - 1; k++) call.bin(HIST_BASE_OVER + k, i) += count;
    });
  for (auto& copy : work.ulp)
    for (int i = 0; i < OPD_ULP_BINS; i++) { call.counts[COUNT_ULP + i] += copy[i]; copy[i] = 0; }
  for (int k = 0; k < OPD_STORED_THRESHOLDS; k++) {
    call.counts[COUNT_LT + k] += work.lt[k];
    call.counts[COUNT_LE + k] += work.le[k];
    work.lt[k] = work.le[k] = 0;
  }
  call.counts[COUNT_NONFINITE] += work.nonfinite;
  call.counts[COUNT_BIT_EQUAL] += work.bit_equal;
  call.counts[COUNT_UNCHANGED_RTOL] += work.unchanged_rtol;
  work.nonfinite = work.bit_equal = work.unchanged_rtol = 0;
}

// Adds what the hot loops do not count: coordinates that do not differ, and for bfloat16 pairs the stored view, which
// follows from the tables.
void complete(CallCounts& call, bool bf16_pair, const DeltaOptions& options, opd_i64 (*sums)[OPD_SUM_LIMBS]) {
  int64_t finite = call.counts[COUNT_NUMEL] - call.counts[COUNT_NONFINITE], differing = 0, binned = 0;
  call.each_bin([&](int i) { differing += call.table(HIST_DELTA)[i]; });
  call.table(HIST_DELTA)[0] += finite - differing;
  for (int i = 0; i < OPD_ULP_BINS; i++) binned += call.counts[COUNT_ULP + i];
  call.counts[COUNT_ULP + OPD_ULP_BINS / 2] += finite - binned;
  if (!bf16_pair) return;
  call.each_bin([&](int i) {
    int64_t count = call.table(HIST_DELTA)[i];
    call.table(HIST_DELTA_STORED)[i] += count;
    if (!count) return;
    double value = bf16_to_float((opd_u16)i);
    for (int k = 0; k < OPD_STORED_THRESHOLDS; k++) {
      call.counts[COUNT_LT + k] += value < options.thresholds[k] ? count : 0;
      call.counts[COUNT_LE + k] += value <= options.thresholds[k] ? count : 0;
    }
  });
  // bfloat16 neighbours are 2^-8 apart, four times the relative tolerance of 1e-3.
  call.counts[COUNT_UNCHANGED_RTOL] = call.table(HIST_DELTA)[0];
  add_table(call, HIST_BASE, sums[SUM_BASE_SQ], nullptr, 1);
  add_table(call, HIST_BASE, sums[SUM_TRAINED_SQ], nullptr, 1);
  add_table(call, HIST_BASE_CHANGED, sums[SUM_TRAINED_SQ], nullptr, -1);
  add_table(call, HIST_TRAINED_CHANGED, sums[SUM_TRAINED_SQ], nullptr, 1);
  add_table(call, HIST_DELTA, sums[SUM_DELTA_SQ], sums[SUM_DELTA_ABS], 1);
}

void propagate_carry(opd_i64* limbs) {
  for (int i = 0; i + 1 < OPD_SUM_LIMBS; i++) {
    limbs[i + 1] += limbs[i] >> 32;
    limbs[i] &= 0xFFFFFFFF;
  }
}

std::mutex lock;  // one call at a time uses the tables of the threads
std::vector<std::unique_ptr<DeltaWork>> workers;
CallCounts call;

// A tensor, with its first coordinates' addresses.
struct DeltaPair {
  const void* base;
  int base_dtype;
  const void* trained;
  int trained_dtype;
  int64_t n;
};

// Counts a pair in `call`, and adds to exact sums and to the largest stored |delta|.
void count_pair(const DeltaPair& pair, const DeltaOptions& options, int threads, opd_i64 (*sums)[OPD_SUM_LIMBS],
                double* maximum, unsigned char* mask) {
  threads = threads_for(pair.n, threads);
  while ((int)workers.size() < threads) workers.emplace_back(new DeltaWork());
  const bool bf16_pair = pair.base_dtype == BF16 && pair.trained_dtype == BF16;
  const bool fp64 = pair.base_dtype == FP64 || pair.trained_dtype == FP64;
  const DeltaKernels& kernels = OPD_KERNELS(delta_kernels);
  const int base_bytes = element_bytes(pair.base_dtype), trained_bytes = element_bytes(pair.trained_dtype);
  BinRange range;
  if (pair.n < RANGE_BELOW && !fp64)
    range = bin_range(pair.base, pair.base_dtype, pair.trained, pair.trained_dtype, pair.n);
  std::memset(call.counts, 0, sizeof call.counts);
  call.counts[COUNT_NUMEL] = pair.n;
  for (int64_t from = 0; from < pair.n; from += FOLD_AFTER * threads) {
    const int64_t size = pair.n - from < FOLD_AFTER * threads ? pair.n - from : FOLD_AFTER * threads;
    const char* w = (const char*)pair.base + from * base_bytes;
    const char* v = (const char*)pair.trained + from * trained_bytes;
    parallel_ranges(size, threads, 8, [&](int t, int64_t start, int64_t stop) {
      kernels.count(w + start * base_bytes, pair.base_dtype, v + start * trained_bytes, pair.trained_dtype,
                    stop - start, &options, workers[t].get(), mask ? mask + ((from + start) >> 3) : nullptr);
    });
    for (int t = 0; t < threads; t++) {
      DeltaWork& work = *workers[t];
      fold(work, call, options, bf16_pair, range);
      for (int s = 0; s < NUM_SUMS; s++) {
        for (int i = 0; i < OPD_SUM_LIMBS; i++) sums[s][i] += work.sums[s][i];
        propagate_carry(sums[s]);
      }
      std::memset(work.sums, 0, sizeof work.sums);
      *maximum = work.max_delta > *maximum ? work.max_delta : *maximum;
      work.max_delta = 0;
    }
  }
  complete(call, bf16_pair, options, sums);
  for (int s = 0; s < NUM_SUMS; s++) propagate_carry(sums[s]);
}

DeltaOptions options_of(const int64_t* threshold_bits, int64_t n_thresholds, const double* thresholds,
                        int64_t n_stored) {
  require(n_thresholds >= 0 && n_thresholds <= OPD_MAX_VISIBLE_THRESHOLDS && n_stored == OPD_STORED_THRESHOLDS,
          "at most 4 threshold_bits, exactly 5 thresholds");
  DeltaOptions options;
  options.n_thresholds = (int)n_thresholds;
  for (int i = 0; i < OPD_MAX_VISIBLE_THRESHOLDS; i++)
    options.threshold_bits[i] = i < n_thresholds ? (opd_u32)narrow(threshold_bits[i]) : 0x7FFF;
  for (int i = 0; i < OPD_STORED_THRESHOLDS; i++) options.thresholds[i] = thresholds[i];
  return options;
}

DeltaPair required_pair(const void* base, int64_t base_dtype, const void* trained, int64_t trained_dtype, int64_t n) {
  require_dtypes(base_dtype, trained_dtype);
  require_size(n, base && trained);
  require_aligned(base, element_bytes((int)base_dtype));
  require_aligned(trained, element_bytes((int)trained_dtype));
  return {base, (int)base_dtype, trained, (int)trained_dtype, n};
}
}  // namespace

void delta(const void* base, int base_dtype, const void* trained, int trained_dtype, int64_t n,
           const DeltaOptions& options, int threads, int64_t* tables, int64_t* counts, int64_t* sums, double* maximum,
           unsigned char* mask) {
  std::lock_guard<std::mutex> hold(lock);
  const DeltaPair pair = {base, base_dtype, trained, trained_dtype, n};
  count_pair(pair, options, threads, (opd_i64(*)[OPD_SUM_LIMBS])sums, maximum, mask);
  const int n_tables = HIST_BASE_OVER + options.n_thresholds;
  for (int t = 0; t < n_tables; t++)
    call.each_bin([&](int i) { tables[(int64_t)t * OPD_BINS + i] += call.table(t)[i]; });
  for (int i = 0; i < NUM_COUNTS; i++) counts[i] += call.counts[i];
  call.clear(n_tables);
}

// base, trained: [n]; threshold_bits: [n_thresholds], at most OPD_MAX_VISIBLE_THRESHOLDS; thresholds:
// [OPD_STORED_THRESHOLDS]; mask: [(n + 7) / 8] or null; the others as for `delta`.
OPD_EXPORT int opd_delta(const void* base, int64_t base_dtype, const void* trained, int64_t trained_dtype, int64_t n,
                         const int64_t* threshold_bits, int64_t n_thresholds, const double* thresholds,
                         int64_t n_stored, int64_t threads, int64_t* tables, int64_t* counts, int64_t* sums,
                         double* maximum, unsigned char* mask) {
  return guarded([&] {
    const DeltaOptions options = options_of(threshold_bits, n_thresholds, thresholds, n_stored);
    const DeltaPair pair = required_pair(base, base_dtype, trained, trained_dtype, n);
    require(tables && counts && sums && maximum, "outputs must not be null");
    delta(pair.base, pair.base_dtype, pair.trained, pair.trained_dtype, n, options, narrow(threads), tables, counts,
          sums, maximum, mask);
  });
}

// Counts pairs of tensors, and writes the bins in use one after another. base, base_dtypes, trained, trained_dtypes,
// sizes: [pairs]; num_bins: [pairs], -1 from the first pair on whose bins do not fit the rest of `capacity`; bin_bits:
// [capacity], ascending for each pair; tables: [HIST_BASE_OVER + n_thresholds][capacity]; counts: [pairs][NUM_COUNTS];
// sums: [pairs][NUM_SUMS][OPD_SUM_LIMBS]; maximum: [pairs]. All outputs are overwritten.
OPD_EXPORT int opd_delta_many(const void* const* base, const int64_t* base_dtypes, const void* const* trained,
                              const int64_t* trained_dtypes, const int64_t* sizes, int64_t pairs,
                              const int64_t* threshold_bits, int64_t n_thresholds, const double* thresholds,
                              int64_t n_stored, int64_t threads, int64_t capacity, int64_t* num_bins,
                              int64_t* bin_bits, int64_t* tables, int64_t* counts, int64_t* sums, double* maximum) {
  return guarded([&] {
    const DeltaOptions options = options_of(threshold_bits, n_thresholds, thresholds, n_stored);
    require(pairs >= 0 && capacity >= 0, "numbers of pairs and bins must not be negative");
    require(!pairs || (base && base_dtypes && trained && trained_dtypes && sizes), "inputs must not be null");
    require(!pairs || (num_bins && counts && sums && maximum), "outputs must not be null");
    require(!capacity || (bin_bits && tables), "outputs must not be null");
    std::lock_guard<std::mutex> hold(lock);
    const int n_tables = HIST_BASE_OVER + options.n_thresholds;
    int64_t used = 0;
    for (int64_t p = 0; p < pairs; p++) {
      const DeltaPair pair = required_pair(base[p], base_dtypes[p], trained[p], trained_dtypes[p], sizes[p]);
      int64_t* pair_sums = sums + p * NUM_SUMS * OPD_SUM_LIMBS;
      std::memset(pair_sums, 0, sizeof(int64_t) * NUM_SUMS * OPD_SUM_LIMBS);
      maximum[p] = 0;
      count_pair(pair, options, narrow(threads), (opd_i64(*)[OPD_SUM_LIMBS])pair_sums, maximum + p, nullptr);
      const int64_t first = used;
      bool fits = true;
      call.each_bin([&](int i) {
        // HIST_BASE_CHANGED and HIST_BASE_OVER are subsets of HIST_BASE.
        if (!(call.table(HIST_BASE)[i] | call.table(HIST_DELTA)[i] | call.table(HIST_TRAINED_CHANGED)[i] |
              call.table(HIST_DELTA_STORED)[i]))
          return;
        fits = fits && used < capacity;
        if (!fits) return;
        bin_bits[used] = i;
        for (int t = 0; t < n_tables; t++) tables[t * capacity + used] = call.table(t)[i];
        used++;
      });
      std::memcpy(counts + p * NUM_COUNTS, call.counts, sizeof call.counts);
      call.clear(n_tables);
      num_bins[p] = used - first;
      if (fits) continue;
      for (int64_t rest = p; rest < pairs; rest++) num_bins[rest] = -1;
      return;
    }
  });
}
