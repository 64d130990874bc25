// `delta` over threads: each counts its range into its own tables, then these are folded into the caller's int64 tables.
#include <cstring>
#include <memory>
#include <mutex>

#include "../common/cpu/dispatch.h"
#include "../common/cpu/fold.h"
#include "../common/cpu/parallel.h"

namespace {
constexpr int64_t FOLD_AFTER = int64_t(1) << 30;  // coordinates a thread counts before its 32-bit counters are folded
enum Count { NUMEL, NONFINITE, BIT_EQUAL, ETA, LT, LE = LT + OPD_THRESHOLDS, ULP = LE + OPD_THRESHOLDS };
enum Table { SOURCE, DELTA, TRAINED, MOVED, STORED, CHANGED };

struct Call {  // the counts of one call, before they join the caller's
  std::vector<int64_t> tables = std::vector<int64_t>((CHANGED + OPD_MAX_CUTS) * OPD_BINS);
  int64_t counts[ULP + OPD_ULP_BINS];
  int first = OPD_BINS, last = 0;  // bins in use, but for bin 0, which always is: a tensor's magnitudes fill few of the 2^15

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

// sum of count * value^2 and count * value over a magnitude table, as exact sums. A bfloat16 is an integer m times a power of two.
void add_table(Call& call, int t, opd_i64* squares, opd_i64* values, int sign) {
  for (int exponent = call.first / 128; exponent <= call.last / 128; exponent++) {
    const int64_t* bins = call.table(t) + exponent * 128;
    int64_t square = 0, value = 0;
    for (int mantissa = 0; mantissa < 128; mantissa++) {
      int64_t m = exponent ? 128 + mantissa : mantissa;
      square += bins[mantissa] * (m * m);
      value += bins[mantissa] * m;
    }
    if (!value) continue;
    int power = (exponent ? exponent : 1) - 134;  // value = m * 2^power
    if (squares) sum_add(squares, sign * square, 1074 + 2 * power);
    if (values) sum_add(values, sign * value, 1074 + power);
  }
}

void fold(DeltaWork& work, Call& call, int n_cuts, bool bf16_pair) {
  drain(work.source, 65536, [&](int i, opd_u32 count) { call.bin(SOURCE, i & 0x7FFF) += count; });
  drain(work.delta, OPD_BINS, [&](int i, opd_u32 count) { call.bin(DELTA, i) += count; });
  drain(work.trained, OPD_BINS, [&](int i, opd_u32 count) { call.bin(TRAINED, i) += count; });
  work.trained[OPD_BINS] = 0;
  if (!bf16_pair) drain(work.moved, OPD_BINS, [&](int i, opd_u32 count) { call.bin(MOVED, i) += count; });
  drain(work.stored, OPD_BINS, [&](int i, opd_u32 count) { call.bin(STORED, i) += (int32_t)count; });
  std::memset(work.changed, 0, sizeof(opd_u32) * OPD_BINS);
  for (int c = 1; c <= n_cuts + 1; c++)
    drain(work.changed + c * OPD_BINS, OPD_BINS, [&](int i, opd_u32 count) {
      if (bf16_pair) call.bin(MOVED, i) += count;  // of two bfloat16 numbers, what differs in one view differs in the other
      for (int k = 0; k < c - 1; k++) call.bin(CHANGED + k, i) += count;
    });
  for (auto& copy : work.ulp)
    for (int i = 0; i < OPD_ULP_BINS; i++) { call.counts[ULP + i] += copy[i]; copy[i] = 0; }
  for (int k = 0; k < OPD_THRESHOLDS; k++) {
    call.counts[LT + k] += work.lt[k];
    call.counts[LE + k] += work.le[k];
    work.lt[k] = work.le[k] = 0;
  }
  call.counts[NONFINITE] += work.nonfinite;
  call.counts[BIT_EQUAL] += work.bit_equal;
  call.counts[ETA] += work.eta_unchanged;
  work.nonfinite = work.bit_equal = work.eta_unchanged = 0;
}

// The tables counted only what differs; here the rest is added, and for bfloat16 pairs the stored view, which the tables hold.
void complete(Call& call, bool bf16_pair, const DeltaOptions& options, opd_i64 (*sums)[OPD_SUM_LIMBS]) {
  int64_t finite = call.counts[NUMEL] - call.counts[NONFINITE], differing = 0, listed = 0;
  call.each_bin([&](int i) { differing += call.table(DELTA)[i]; });
  call.table(DELTA)[0] += finite - differing;
  for (int i = 0; i < OPD_ULP_BINS; i++) listed += call.counts[ULP + i];
  call.counts[ULP + OPD_ULP_BINS / 2] += finite - listed;
  if (!bf16_pair) return;
  call.each_bin([&](int i) {
    int64_t count = call.table(DELTA)[i];
    call.table(STORED)[i] += count;
    if (!count) return;
    double value = bf16_to_float((opd_u16)i);
    for (int k = 0; k < OPD_THRESHOLDS; k++) {
      call.counts[LT + k] += value < options.thresholds[k] ? count : 0;
      call.counts[LE + k] += value <= options.thresholds[k] ? count : 0;
    }
  });
  call.counts[ETA] = call.table(DELTA)[0];  // bfloat16 neighbours lie 2^-8 apart, four times the 1e-3 of eta
  add_table(call, SOURCE, sums[0], nullptr, 1);
  add_table(call, SOURCE, sums[1], nullptr, 1);
  add_table(call, MOVED, sums[1], nullptr, -1);
  add_table(call, TRAINED, sums[1], nullptr, 1);
  add_table(call, DELTA, sums[2], sums[3], 1);
}

void carry(opd_i64* limbs) {
  for (int i = 0; i + 1 < OPD_SUM_LIMBS; i++) {
    limbs[i + 1] += limbs[i] >> 32;
    limbs[i] &= 0xFFFFFFFF;
  }
}

std::mutex lock;                                    // one call at a time owns the tables of the threads
std::vector<std::unique_ptr<DeltaWork>> workers;
Call call;
}  // namespace

void delta(const void* source, int source_dtype, const void* trained, int trained_dtype, int64_t n, const DeltaOptions& options,
           int threads, int64_t* tables, int64_t* counts, int64_t* sums, double* maximum, unsigned char* mask) {
  std::lock_guard<std::mutex> hold(lock);
  threads = threads_for(n, threads);
  while ((int)workers.size() < threads) workers.emplace_back(new DeltaWork());
  const bool bf16_pair = source_dtype == BF16 && trained_dtype == BF16;
  const int n_tables = CHANGED + options.n_cuts;
  auto total = (opd_i64(*)[OPD_SUM_LIMBS])sums;
  for (int64_t from = 0; from < n; from += FOLD_AFTER * threads) {
    int64_t part = n - from < FOLD_AFTER * threads ? n - from : FOLD_AFTER * threads;
    std::memset(call.counts, 0, sizeof call.counts);
    call.counts[NUMEL] = part;
    const char* w = (const char*)source + from * element_bytes(source_dtype);
    const char* v = (const char*)trained + from * element_bytes(trained_dtype);
    parallel_ranges(part, threads, 8, [&](int t, int64_t start, int64_t stop) {
      kernels().delta(w + start * element_bytes(source_dtype), source_dtype, v + start * element_bytes(trained_dtype), trained_dtype,
                      stop - start, &options, workers[t].get(), mask ? mask + ((from + start) >> 3) : nullptr);
    });
    double largest = 0;
    for (int t = 0; t < threads; t++) {
      DeltaWork& work = *workers[t];
      fold(work, call, options.n_cuts, bf16_pair);
      for (int s = 0; s < 4; s++) {
        for (int i = 0; i < OPD_SUM_LIMBS; i++) total[s][i] += work.sums[s][i];
        carry(total[s]);
      }
      std::memset(work.sums, 0, sizeof work.sums);
      largest = work.max_delta > largest ? work.max_delta : largest;
      work.max_delta = 0;
    }
    complete(call, bf16_pair, options, total);
    for (int s = 0; s < 4; s++) carry(total[s]);
    for (int t = 0; t < n_tables; t++) {
      int64_t *to = tables + (int64_t)t * OPD_BINS, *from = call.table(t);
      to[0] += from[0];
      for (int i = call.first; i <= call.last; i++) to[i] += from[i];
      from[0] = 0;
      if (call.first <= call.last) std::memset(from + call.first, 0, sizeof(int64_t) * (call.last - call.first + 1));
    }
    call.first = OPD_BINS, call.last = 0;
    for (int i = 0; i < ULP + OPD_ULP_BINS; i++) counts[i] += call.counts[i];
    *maximum = largest > *maximum ? largest : *maximum;
  }
}
