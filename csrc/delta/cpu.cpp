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
};

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

void fold(DeltaWork& work, CallCounts& call, const DeltaOptions& options, bool bf16_pair) {
  if (work.largest >= 0) fold_steps(work, call, options, bf16_pair);
  drain(work.hist_base, 65536, [&](int i, opd_u32 count) { call.bin(HIST_BASE, i & 0x7FFF) += count; });
  drain(work.hist_delta, OPD_BINS, [&](int i, opd_u32 count) { call.bin(HIST_DELTA, i) += count; });
  drain(work.hist_trained_changed, OPD_BINS, [&](int i, opd_u32 count) { call.bin(HIST_TRAINED_CHANGED, i) += count; });
  work.hist_trained_changed[OPD_BINS] = 0;
  if (!bf16_pair)
    drain(work.hist_base_changed, OPD_BINS, [&](int i, opd_u32 count) { call.bin(HIST_BASE_CHANGED, i) += count; });
  drain(work.hist_delta_stored, OPD_BINS,
        [&](int i, opd_u32 count) { call.bin(HIST_DELTA_STORED, i) += (int32_t)count; });
  std::memset(work.hist_base_by_class, 0, sizeof(opd_u32) * OPD_BINS);
  for (int c = 1; c <= options.n_thresholds + 1; c++)
    drain(work.hist_base_by_class + c * OPD_BINS, OPD_BINS, [&](int i, opd_u32 count) {
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
}  // namespace

void delta(const void* base, int base_dtype, const void* trained, int trained_dtype, int64_t n,
           const DeltaOptions& options, int threads, int64_t* tables, int64_t* counts, int64_t* sums, double* maximum,
           unsigned char* mask) {
  std::lock_guard<std::mutex> hold(lock);
  threads = threads_for(n, threads);
  while ((int)workers.size() < threads) workers.emplace_back(new DeltaWork());
  const bool bf16_pair = base_dtype == BF16 && trained_dtype == BF16;
  const DeltaKernels& kernels = OPD_KERNELS(delta_kernels);
  const int n_tables = HIST_BASE_OVER + options.n_thresholds;
  auto total = (opd_i64(*)[OPD_SUM_LIMBS])sums;
  for (int64_t from = 0; from < n; from += FOLD_AFTER * threads) {
    int64_t size = n - from < FOLD_AFTER * threads ? n - from : FOLD_AFTER * threads;
    std::memset(call.counts, 0, sizeof call.counts);
    call.counts[COUNT_NUMEL] = size;
    const char* w = (const char*)base + from * element_bytes(base_dtype);
    const char* v = (const char*)trained + from * element_bytes(trained_dtype);
    parallel_ranges(size, threads, 8, [&](int t, int64_t start, int64_t stop) {
      kernels.count(w + start * element_bytes(base_dtype), base_dtype, v + start * element_bytes(trained_dtype),
                    trained_dtype, stop - start, &options, workers[t].get(),
                    mask ? mask + ((from + start) >> 3) : nullptr);
    });
    double largest = 0;
    for (int t = 0; t < threads; t++) {
      DeltaWork& work = *workers[t];
      fold(work, call, options, bf16_pair);
      for (int s = 0; s < NUM_SUMS; s++) {
        for (int i = 0; i < OPD_SUM_LIMBS; i++) total[s][i] += work.sums[s][i];
        propagate_carry(total[s]);
      }
      std::memset(work.sums, 0, sizeof work.sums);
      largest = work.max_delta > largest ? work.max_delta : largest;
      work.max_delta = 0;
    }
    complete(call, bf16_pair, options, total);
    for (int s = 0; s < NUM_SUMS; s++) propagate_carry(total[s]);
    for (int t = 0; t < n_tables; t++) {
      int64_t *to = tables + (int64_t)t * OPD_BINS, *from = call.table(t);
      to[0] += from[0];
      for (int i = call.first; i <= call.last; i++) to[i] += from[i];
      from[0] = 0;
      if (call.first <= call.last) std::memset(from + call.first, 0, sizeof(int64_t) * (call.last - call.first + 1));
    }
    call.first = OPD_BINS, call.last = 0;
    for (int i = 0; i < NUM_COUNTS; i++) counts[i] += call.counts[i];
    *maximum = largest > *maximum ? largest : *maximum;
  }
}

// base, trained: [n]; threshold_bits: [n_thresholds], at most OPD_MAX_VISIBLE_THRESHOLDS; thresholds:
// [OPD_STORED_THRESHOLDS]; mask: [(n + 7) / 8] or null; the others as for `delta`.
OPD_EXPORT int opd_delta(const void* base, int64_t base_dtype, const void* trained, int64_t trained_dtype, int64_t n,
                         const int64_t* threshold_bits, int64_t n_thresholds, const double* thresholds,
                         int64_t n_stored, int64_t threads, int64_t* tables, int64_t* counts, int64_t* sums,
                         double* maximum, unsigned char* mask) {
  return guarded([&] {
    require(n_thresholds >= 0 && n_thresholds <= OPD_MAX_VISIBLE_THRESHOLDS && n_stored == OPD_STORED_THRESHOLDS,
            "at most 4 threshold_bits, exactly 5 thresholds");
    DeltaOptions options;
    options.n_thresholds = (int)n_thresholds;
    for (int i = 0; i < OPD_MAX_VISIBLE_THRESHOLDS; i++)
      options.threshold_bits[i] = i < n_thresholds ? (opd_u32)narrow(threshold_bits[i]) : 0x7FFF;
    for (int i = 0; i < OPD_STORED_THRESHOLDS; i++) options.thresholds[i] = thresholds[i];
    require_dtypes(base_dtype, trained_dtype);
    require_size(n, base && trained);
    require_aligned(base, element_bytes((int)base_dtype));
    require_aligned(trained, element_bytes((int)trained_dtype));
    require(tables && counts && sums && maximum, "outputs must not be null");
    delta(base, (int)base_dtype, trained, (int)trained_dtype, n, options, narrow(threads), tables, counts, sums,
          maximum, mask);
  });
}
