// `delta` on a CUDA device: both tensors are read once, sixteen bytes at a time, and everything that the tally holds is
// counted.
//
// Tables. Adding a coordinate to a table is one integer atomic. Magnitudes from 2^-31 to below 2, which nearly all are,
// are counted in shared memory, in as many rows as the device has space for (all ten with 227 KB, four with 99 KB), the
// busiest first; the rest is counted in the work tables of 2^15 bins in global memory, which stay in the L2 cache.
// Zeros are counted in registers: one bin may hold half a tensor. A block flushes its tables once. Small histograms
// (ULP distances, limits, counts) have one column per lane: no two lanes of a warp access the same bank. The last block
// to finish adds the work tables to the tally (`fold`) and leaves them zero for the next launch on the same stream.
//
// In a bf16 pair most coordinates keep their bits, but hardly any warp has none that changed: if each lane counted its
// own changes, a warp would execute all of `count_difference` for every coordinate with most lanes idle. So a warp
// queues its changed coordinates in shared memory and counts them 32 at a time. Devices with enough shared memory count
// such pairs by cuda_pair.inl, in a quarter of the instructions.
//
// Sums are exact, so the order of blocks and atomics cannot change a bit. For a bf16 pair they follow from the tables
// (`fold`): w^2 and w'^2 from the counts of their values, |delta| and delta^2 from HIST_DELTA_STORED, whose bins
// hold the upper 16 bits of a difference, with the sums of the lower 16 bits and of their squares. Other dtypes are
// summed in windows (`Window`).
#include "delta.h"
#include "../common/cuda/grid.h"
#include "../common/cuda/queue.h"

#define OPD_WINDOW 4          // limbs of an exact sum that a thread holds
#define OPD_PAIR_THREADS 768  // at most per block of bf16 pairs: with their queues, all tables fit 227 KB
#define OPD_QUEUE (OPD_WARP - 1 + OPD_WARP * 8)  // per warp: what was left, and all coordinates of a step
#define OPD_FLUSH_STEPS 1024  // steps after which a warp flushes its windows: one outlier must not keep them high

// Rows of the work tables, the busiest first. A bf16 pair has no row WORK_BASE_CHANGED: what differs in the stored view
// differs in the visible one.
enum Work {
  WORK_BASE, WORK_STORED, WORK_TRAINED, WORK_FOURTH, WORK_FIFTH, WORK_VISIBLE,
  WORK_ROWS = WORK_VISIBLE + OPD_MAX_VISIBLE_THRESHOLDS + 1
};
// Rows of `delta_count_bf16`, by stored |delta|: visible ones that are rounded up, and, by limit, those in its bin that
// reach it.
enum PairWork { WORK_ROUNDED_UP = WORK_FOURTH, WORK_REACHED = WORK_FIFTH };
// What `fold` reads.
enum Folded { FOLD_WIDE, FOLD_PAIR, FOLD_PAIR_IN_SMEM };

// The workspace of a launch, 32-bit words: zero before and after it.
#define OPD_EXPONENTS (OPD_BINS / OPD_MANTISSAS)
#define OPD_USED_WORDS (OPD_EXPONENTS / 32)
enum Workspace {
  AT_WORK,                                         // [WORK_ROWS][OPD_BINS]
  AT_LOW_SUMS = AT_WORK + WORK_ROWS * OPD_BINS,    // int64 [2][OPD_BINS]: of lower halves of |delta|, of their squares
  AT_USED = AT_LOW_SUMS + 4 * OPD_BINS,            // bits of the exponents with bins that are not zero
  AT_TICKET = AT_USED + OPD_USED_WORDS,
  WORKSPACE_WORDS
};

// The arguments of a kernel but the tensors' dtypes. base, trained: [n]; mask: uint8 [(n + 7) / 8] or null; tables:
// int64 [HIST_BASE_OVER + thresholds][OPD_BINS], counts: int64 [NUM_COUNTS], sums: int64 [NUM_SUMS][OPD_SUM_LIMBS] and
// maximum: double [1], as its bits, are added to.
struct Arguments {
  const void *base, *trained;
  opd_u8* mask;
  opd_u32* workspace;
  opd_i64* tables;
  opd_i64* counts;
  opd_i64* sums;
  opd_u64* maximum;
  opd_i64 n;
  int smem_tables;                      // tables in shared memory
  int num_thresholds;                   // of visible |delta|
  opd_u64 thresholds;                   // four bf16 magnitudes of 16 bits
  opd_u64 limit_counts;                 // for each limit, in six bits: the element of `counts` that it belongs to
  opd_u64 limits[OPD_LIMITS];           // of stored |delta|, bits in ascending order

  __device__ __forceinline__ opd_u32 threshold(int k) const { return (opd_u32)(thresholds >> 16 * k) & 0xFFFFu; }
  __device__ __forceinline__ opd_i64* limit_count(int k) const { return counts + (limit_counts >> 6 * k & 63); }
};

// Marks the exponent of a bin in shared memory; what is not marked is neither folded nor cleared.
__device__ __forceinline__ void mark_used(opd_u32* used, opd_u32 bin) {
  const opd_u32 exponent = bin / OPD_MANTISSAS, bit = 1u << exponent % 32;
  if (!(used[exponent / 32] & bit)) atomicOr(used + exponent / 32, bit);
}

template <int PAIR> struct Rows {
  static const int delta = PAIR ? WORK_FOURTH : WORK_FIFTH, base_changed = PAIR ? WORK_FIFTH : WORK_FOURTH;
};

// Rows of the small histograms: ULP distances, ranks among the limits, and the ThreadCounts.
enum Small {
  SMALL_RANK = OPD_ULP_BINS, FINITE = SMALL_RANK + OPD_LIMITS + 1, BIT_EQUAL, UNCHANGED_RTOL, VISIBLE_CHANGED,
  STORED_CHANGED, BITS_DIFFER, ZERO, NUMEL, SMALL_ROWS
};

struct BlockState {  // in shared memory, before the tables
  opd_u64 limits[OPD_LIMITS];
  opd_u32 used[OPD_USED_WORDS], is_last;
  opd_u32 totals[SMALL_ROWS];
  opd_u32 lanes[SMALL_ROWS * OPD_WARP];
  opd_u32 queue[OPD_PAIR_THREADS / OPD_WARP][OPD_QUEUE];  // per warp: w in the lower, v in the upper half
};
static_assert(sizeof(BlockState) <= OPD_SMEM_HEADER_BYTES, "the tables begin after the header");

struct Tables {
  opd_u32* smem_tables;  // [smem_rows][OPD_SMEM_BINS], in shared memory
  opd_u32* work;         // [WORK_ROWS][OPD_BINS], in global memory
  opd_u32* used;         // bits of exponents, in shared memory
  int smem_rows;
  __device__ __forceinline__ void add(int row, opd_u32 bin, opd_u32 count = 1) const {
    if (!add_to_table(smem_tables, smem_rows, row, work + row * OPD_BINS, bin, count)) mark_used(used, bin);
  }
};

// Adds a table in shared memory to its row of the work tables. `padded`: one unused element after every 128 bins.
__device__ __forceinline__ void flush_row(const opd_u32* table, bool padded, opd_u32* row, opd_u32* used) {
  for (int i = threadIdx.x; i < OPD_SMEM_BINS; i += blockDim.x) {
    const opd_u32 count = table[padded ? i + i / OPD_MANTISSAS : i], bin = OPD_SMEM_FIRST_BIN + i;
    if (!count) continue;
    atomicAdd(row + bin, count);
    mark_used(used, bin);
  }
}

struct ThreadCounts {
  opd_u32 finite, bit_equal, unchanged_rtol, visible_changed, stored_changed, bits_differ, zero, numel;
};

template <class T> struct Float {};
template <> struct Float<float> { typedef opd_u32 Bits; };
template <> struct Float<double> { typedef opd_u64 Bits; };
OPD_FN opd_u32 bits_of(float x) { return float_bits(x); }
OPD_FN opd_u64 bits_of(double x) { return double_bits(x); }
OPD_FN float from_bits(opd_u32 x) { return bits_float(x); }
OPD_FN double from_bits(opd_u64 x) { return bits_double(x); }
OPD_FN opd_u32 magnitude_bits(float x) { return float_bits(x) & 0x7FFFFFFFu; }
OPD_FN opd_u64 magnitude_bits(double x) { return double_bits(x) & 0x7FFFFFFFFFFFFFFFull; }
template <class T> OPD_FN T magnitude(T x) { return from_bits(magnitude_bits(x)); }

template <class T>
OPD_FN T value_of(const Vector& x, int dtype, int j) {
  if (dtype == BF16) return (T)bf16_to_float(half_of(x, j));
  if (dtype == FP16) return (T)fp16_to_float(half_of(x, j));
  return dtype == FP32 ? (T)single_of(x, j) : (T)double_of(x, j);
}

// The part of an exact sum that one thread holds: adjacent limbs of 32 bits, the uppermost in units of 2^(32 level -
// 1074). All lanes of a warp share the level: their values stay below 2^40 units, so that adding and subtracting 1.5 *
// 2^52 units cuts a value at one unit, and the bits of that sum count the units (csrc/common/cpu/exact_sum.inl).
struct Window {
  opd_i64 part[OPD_WINDOW];
  int level;
};

OPD_FN double cutter_of(int level) { return bits_double((opd_u64)(32 * level + 1) << 52 | (opd_u64)1 << 51); }

// The lowest level whose 2^40 units exceed a magnitude and that has the window's other limbs below it.
OPD_FN int level_above(double largest) {
  int level = ((int)(double_bits(largest) >> 52) + 12 + 31) / 32;
  return level < OPD_WINDOW - 1 ? OPD_WINDOW - 1 : level;
}

// Adds a double of either sign: an integer times a power of two.
__device__ __forceinline__ void add_double(opd_i64* limbs, double value) {
  opd_u64 bits = double_bits(value);
  int exponent = (int)(bits >> 52 & 0x7FF);
  opd_i64 integer = (opd_i64)((bits & 0xFFFFFFFFFFFFFull) | (exponent ? 1ull << 52 : 0));
  sum_add_atomic(limbs, bits >> 63 ? -integer : integer, exponent ? exponent - 1 : 0);
}

__device__ __forceinline__ void window_add(Window& window, double value, opd_i64* limbs) {
#pragma unroll
  for (int k = 0; k < OPD_WINDOW; k++) {
    if (value == 0) return;
    double cutter = cutter_of(window.level - k), rounded = value + cutter;
    window.part[k] += (opd_i64)(double_bits(rounded) - double_bits(cutter));
    value -= rounded - cutter;
  }
  if (value != 0) add_double(limbs, value);  // far below the warp's largest: rare
}

__device__ __forceinline__ void window_flush(Window& window, opd_i64* limbs) {
#pragma unroll
  for (int k = 0; k < OPD_WINDOW; k++) {
    opd_i64 total = warp_sum(window.part[k]);
    if (total && threadIdx.x % OPD_WARP == 0) sum_add_atomic(limbs, total, 32 * (window.level - k));
    window.part[k] = 0;
  }
}

// The state of a thread in a kernel.
template <class T> struct Counter {
  BlockState& block;
  Tables tables;
  opd_i64* low_sums;
  opd_u16 threshold_bits[OPD_MAX_VISIBLE_THRESHOLDS];
  ThreadCounts totals;
  typename Float<T>::Bits largest;
};

// Counts the difference of a finite coordinate: w -> v as bfloat16 bits, and the bits of the stored and visible
// |delta|.
template <class T, int PAIR>
__device__ __forceinline__ void count_difference(Counter<T>& counter, opd_u16 w, opd_u16 v,
                                                 typename Float<T>::Bits abs_delta, opd_u16 visible) {
  const opd_u32 lane = threadIdx.x % OPD_WARP, abs_w = w & 0x7FFFu;
  if (w != v) {
    counter.totals.bits_differ++;
    atomicAdd(counter.block.lanes + ulp_bin(w, v) * OPD_WARP + lane, 1u);
  }
  if (abs_delta) {
    int rank = 0;
    for (int k = 0; k < OPD_LIMITS; k++) rank += abs_delta >= counter.block.limits[k];
    atomicAdd(counter.block.lanes + (SMALL_RANK + rank) * OPD_WARP + lane, 1u);
    counter.largest = abs_delta > counter.largest ? abs_delta : counter.largest;
    counter.totals.stored_changed++;
    if (!PAIR) counter.tables.add(Rows<PAIR>::base_changed, abs_w);
    const opd_u32 fp32_bits = float_bits((float)from_bits(abs_delta)), top = fp32_bits >> 16;
    counter.tables.add(WORK_STORED, top);
    if (PAIR && (fp32_bits & 0xFFFFu)) {
      const opd_i64 low = fp32_bits & 0xFFFFu;
      add_count(counter.low_sums + top, low);
      add_count(counter.low_sums + OPD_BINS + top, low * low);
    }
  }
  if (visible) {
    counter.totals.visible_changed++;
    counter.tables.add(Rows<PAIR>::delta, visible);
    counter.tables.add(WORK_TRAINED, v & 0x7FFFu);
    counter.tables.add(WORK_VISIBLE + change_class(visible, counter.threshold_bits) - 1, abs_w);
  }
}

// Clears a block's shared memory and waits for all threads.
template <class T>
__device__ __forceinline__ Counter<T> init_block(opd_u8* shared, const Arguments& a) {
  BlockState& block = *(BlockState*)shared;
  const Tables tables = {(opd_u32*)(shared + OPD_SMEM_HEADER_BYTES), a.workspace + AT_WORK, block.used, a.smem_tables};
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < OPD_LIMITS; k++) block.limits[k] = a.limits[k];
  }
  for (int i = threadIdx.x; i < OPD_USED_WORDS; i += blockDim.x) block.used[i] = 0;
  for (int i = threadIdx.x; i < SMALL_ROWS * OPD_WARP; i += blockDim.x) block.lanes[i] = 0;
  for (int i = threadIdx.x; i < a.smem_tables * OPD_SMEM_BINS; i += blockDim.x) tables.smem_tables[i] = 0;
  __syncthreads();
  return {block, tables, (opd_i64*)(a.workspace + AT_LOW_SUMS),
          {(opd_u16)a.threshold(0), (opd_u16)a.threshold(1), (opd_u16)a.threshold(2), (opd_u16)a.threshold(3)}, {}, 0};
}

// Adds the sums over the bins of a warp's lanes to the tally. `low`, `low_square`: sums of lower halves, in bf16 pairs.
__device__ __forceinline__ void add_sums(opd_i64* sums, int exponent, opd_i64 t, opd_i64 base, opd_i64 trained,
                                         opd_i64 stored, opd_i64 low, opd_i64 low_square) {
  // A bf16 magnitude is t * 2^(e - 134), e at least 1; a stored delta is (t * 2^16 + low) * 2^(e - 150).
  const int e = exponent ? exponent : 1;
  const int square = OPD_SUM_SHIFT + 2 * (e - 134), square_low = OPD_SUM_SHIFT + 2 * (e - 150);
  t += exponent ? OPD_MANTISSAS : 0;
  const opd_i64 sum_base = warp_sum(base * t * t), sum_trained = warp_sum(trained * t * t);
  const opd_i64 sum_tops = warp_sum(stored * t * t), sum_cross = warp_sum(low * t), sum_lows = warp_sum(low_square);
  const opd_i64 tops = warp_sum(stored * t), lows = warp_sum(low);
  if (threadIdx.x % OPD_WARP) return;
  sum_add_atomic(sums + SUM_BASE_SQ * OPD_SUM_LIMBS, sum_base, square);
  sum_add_atomic(sums + SUM_TRAINED_SQ * OPD_SUM_LIMBS, sum_trained, square);
  sum_add_atomic(sums + SUM_DELTA_SQ * OPD_SUM_LIMBS, sum_tops, square_low + 32);
  sum_add_atomic(sums + SUM_DELTA_SQ * OPD_SUM_LIMBS, sum_cross, square_low + 17);
  sum_add_atomic(sums + SUM_DELTA_SQ * OPD_SUM_LIMBS, sum_lows, square_low);
  sum_add_atomic(sums + SUM_DELTA_ABS * OPD_SUM_LIMBS, tops, OPD_SUM_SHIFT + e - 134);
  sum_add_atomic(sums + SUM_DELTA_ABS * OPD_SUM_LIMBS, lows, OPD_SUM_SHIFT + e - 150);
}

// Adds the bins of a warp's lanes in the work tables to the tally, and what follows from them for a bf16 pair.
template <int FOLDED>
__device__ __forceinline__ void fold_bins(const Arguments& a, opd_u32 bin) {
  const opd_u32* at = a.workspace + AT_WORK + bin;
  const auto load_row = [&](int row) -> opd_i64 { return __ldcg(at + row * OPD_BINS); };
  const auto add_to_row = [&](int table, opd_i64 count) {
    opd_i64* to = a.tables + table * OPD_BINS + bin;
    if (count) *to = __ldcg(to) + count;
  };
  const bool first_lane = threadIdx.x % OPD_WARP == 0;
  const opd_i64 base = load_row(WORK_BASE), stored = load_row(WORK_STORED), trained = load_row(WORK_TRAINED);
  opd_i64 delta;
  if (FOLDED == FOLD_PAIR_IN_SMEM) {
    // A visible |delta| is the upper half of the stored one, or the number above it.
    const opd_i64 from_below = bin ? __ldcg(at + WORK_ROUNDED_UP * OPD_BINS - 1) : 0;
    delta = stored - load_row(WORK_ROUNDED_UP) + from_below;
    const opd_u32 largest = warp_max(stored ? bin << 16 : 0u);
    if (largest && first_lane) atomicMax(a.maximum, double_bits((double)bits_float(largest)));
#pragma unroll
    for (int k = 0; k < OPD_LIMITS; k++) {
      const opd_u32 limit = (opd_u32)a.limits[k], bin_of_limit = limit >> 16;
      const opd_u32* reached = a.workspace + AT_WORK + WORK_REACHED * OPD_BINS + k;
      const opd_i64 not_below = limit & 0xFFFFu ? (opd_i64)__ldcg(reached) : stored;
      const opd_i64 below = warp_sum(bin < bin_of_limit ? stored : bin == bin_of_limit ? stored - not_below : 0);
      if (first_lane) add_count(a.limit_count(k), below);
    }
  } else {
    delta = load_row(Rows<FOLDED == FOLD_PAIR>::delta);
  }
  opd_i64 visible = 0;
#pragma unroll
  for (int c = OPD_MAX_VISIBLE_THRESHOLDS; c >= 0; c--) {
    visible += load_row(WORK_VISIBLE + c);
    if (0 < c && c <= a.num_thresholds) add_to_row(HIST_BASE_OVER + c - 1, visible);
  }
  const opd_i64 base_changed = FOLDED == FOLD_WIDE ? load_row(Rows<0>::base_changed) : visible;
  add_to_row(HIST_BASE, base);
  add_to_row(HIST_DELTA, delta);
  add_to_row(HIST_TRAINED_CHANGED, trained);
  add_to_row(HIST_BASE_CHANGED, base_changed);
  add_to_row(HIST_DELTA_STORED, stored);
  if (FOLDED == FOLD_WIDE) return;
  const opd_i64* low_sums = (const opd_i64*)(a.workspace + AT_LOW_SUMS) + bin;
  add_sums(a.sums, (int)(bin / OPD_MANTISSAS), bin % OPD_MANTISSAS, base, base - base_changed + trained, stored,
           __ldcg(low_sums), __ldcg(low_sums + OPD_BINS));
}

// Makes every limb but the last of each sum less than 2^32: the canonical form. One thread per sum.
__device__ __forceinline__ void propagate_carry(opd_i64* sums) {
  if (threadIdx.x >= NUM_SUMS) return;
  opd_i64* limbs = sums + threadIdx.x * OPD_SUM_LIMBS;
  opd_i64 above = 0;
#pragma unroll 1
  for (int i = 0; i + 1 < OPD_SUM_LIMBS; i++) {
    const opd_i64 value = __ldcg(limbs + i) + above;
    limbs[i] = value & 0xFFFFFFFF;
    above = value >> 32;
  }
  limbs[OPD_SUM_LIMBS - 1] = __ldcg(limbs + OPD_SUM_LIMBS - 1) + above;
}

// Adds the work tables to the tally in the last block of the grid, and clears them. `used` and `is_last` are in the
// shared memory of this block.
template <int FOLDED>
__device__ __forceinline__ void fold(const Arguments& a, const opd_u32* used, opd_u32* is_last) {
  opd_u32* all_used = a.workspace + AT_USED;
  for (int i = threadIdx.x; i < OPD_USED_WORDS; i += blockDim.x)
    if (used[i]) atomicOr(all_used + i, used[i]);
  if (!is_last_block(a.workspace + AT_TICKET, is_last)) return;
  const opd_u32 lane = threadIdx.x % OPD_WARP;
  const auto each_used_bin = [&](auto body) {  // one warp per 32 bins, of one exponent
    for (opd_u32 first = threadIdx.x - lane; first < OPD_BINS; first += blockDim.x) {
      const opd_u32 exponent = first / OPD_MANTISSAS;
      if (__ldcg(all_used + exponent / 32) >> exponent % 32 & 1) body(first + lane);
    }
  };
  each_used_bin([&](opd_u32 bin) { fold_bins<FOLDED>(a, bin); });
  __syncthreads();
  each_used_bin([&](opd_u32 bin) {
#pragma unroll
    for (int row = 0; row < WORK_ROWS; row++) a.workspace[AT_WORK + row * OPD_BINS + bin] = 0;
    opd_i64* low_sums = (opd_i64*)(a.workspace + AT_LOW_SUMS) + bin;
    if (FOLDED != FOLD_WIDE) low_sums[0] = low_sums[OPD_BINS] = 0;
  });
  if (FOLDED == FOLD_PAIR_IN_SMEM && threadIdx.x < OPD_LIMITS)
    a.workspace[AT_WORK + WORK_REACHED * OPD_BINS + threadIdx.x] = 0;
  propagate_carry(a.sums);
  __syncthreads();
  for (int i = threadIdx.x; i < OPD_USED_WORDS; i += blockDim.x) all_used[i] = 0;
  if (threadIdx.x == 0) a.workspace[AT_TICKET] = 0;
}

// Adds the counts of a block's threads to the work tables and the tally.
template <class T, int PAIR>
__device__ __forceinline__ void flush_block(Counter<T>& counter, const Arguments& a) {
  BlockState& block = counter.block;
  const opd_u32 lane = threadIdx.x % OPD_WARP;
  const ThreadCounts& c = counter.totals;
  const opd_u32 in_order[] = {c.finite,         c.bit_equal,   c.unchanged_rtol, c.visible_changed,
                              c.stored_changed, c.bits_differ, c.zero,           c.numel};  // of `enum Small`
#pragma unroll
  for (int k = 0; k < NUMEL - FINITE + 1; k++) atomicAdd(block.lanes + (FINITE + k) * OPD_WARP + lane, in_order[k]);
  const typename Float<T>::Bits largest = warp_max(counter.largest);
  if (lane == 0 && largest) atomicMax(a.maximum, double_bits((double)from_bits(largest)));
  __syncthreads();

  for (int row = threadIdx.x / OPD_WARP; row < SMALL_ROWS; row += blockDim.x / OPD_WARP) {
    opd_u32 total = warp_sum(block.lanes[row * OPD_WARP + lane]);
    if (lane == 0) block.totals[row] = total;
  }
  const Tables& tables = counter.tables;
  for (int row = 0; row < tables.smem_rows; row++)
    flush_row(tables.smem_tables + row * OPD_SMEM_BINS, false, tables.work + row * OPD_BINS, block.used);
  __syncthreads();

  const opd_u32* total = block.totals;
  const opd_u32 unchanged = total[FINITE] - total[STORED_CHANGED];
  for (int k = threadIdx.x; k < OPD_ULP_BINS; k += blockDim.x)
    add_count(a.counts + COUNT_ULP + k, total[k] + (k == OPD_ULP_BINS / 2 ? total[FINITE] - total[BITS_DIFFER] : 0));
  for (int k = threadIdx.x; k < OPD_LIMITS; k += blockDim.x) {  // values below limit k reach at most k limits
    opd_i64 below = block.limits[k] ? unchanged : 0;
    for (int rank = 0; rank <= k; rank++) below += total[SMALL_RANK + rank];
    add_count(a.limit_count(k), below);
  }
  if (threadIdx.x == 0) {
    add_count(a.counts + COUNT_NUMEL, total[NUMEL]);
    add_count(a.counts + COUNT_NONFINITE, total[NUMEL] - total[FINITE]);
    add_count(a.counts + COUNT_BIT_EQUAL, total[BIT_EQUAL]);
    // bf16 neighbours are 2^-8 apart, four times the relative tolerance of 1e-3.
    add_count(a.counts + COUNT_UNCHANGED_RTOL, PAIR ? unchanged : total[UNCHANGED_RTOL]);
    add_count(a.tables + HIST_DELTA * OPD_BINS, total[FINITE] - total[VISIBLE_CHANGED]);
    add_count(a.tables + HIST_DELTA_STORED * OPD_BINS, unchanged);
    if (total[ZERO]) {
      atomicAdd(tables.work + WORK_BASE * OPD_BINS, total[ZERO]);
      mark_used(block.used, 0);  // the same thread reads this word in `fold`
    }
  }
  fold<PAIR ? FOLD_PAIR : FOLD_WIDE>(a, block.used, &block.is_last);
}

// Counts a coordinate whose bits changed. Its |w| has been counted if it is finite: subtracted if the coordinate is
// not.
__device__ __forceinline__ void count_changed(Counter<float>& counter, opd_u16 w, opd_u16 v) {
  const opd_u32 abs_w = w & 0x7FFFu;
  if (coordinate_finite(w, v)) {
    const opd_u32 abs_delta = magnitude_bits(bf16_to_float(v) - bf16_to_float(w));
    count_difference<float, 1>(counter, w, v, abs_delta, (opd_u16)visible_delta(w, v));
  } else if (abs_w < OPD_INFINITY_BITS) {
    counter.totals.finite--;
    if (abs_w) counter.tables.add(WORK_BASE, abs_w, ~0u);
    else counter.totals.zero--;
  }
}

__device__ __forceinline__ void count_pair(const Arguments& arguments) {
  const int V = 8;
  const void *base = arguments.base, *trained = arguments.trained;
  const opd_i64 n = arguments.n;
  opd_u8* mask = arguments.mask;
  OPD_DYNAMIC_SHARED(shared);
  Counter<float> counter = init_block<float>(shared, arguments);
  const int lane = threadIdx.x % OPD_WARP;
  opd_u32* queue = counter.block.queue[threadIdx.x / OPD_WARP];
  int queued = 0;  // by the warp
  const opd_i64 tile = (opd_i64)blockDim.x * V, step = gridDim.x * tile, first = blockIdx.x * tile;
  opd_i64 i = first + (opd_i64)threadIdx.x * V;
  Vector a = load<V>(base, 2, i, n), b = load<V>(trained, 2, i, n);
  // Every thread takes the same number of steps: lanes cooperate below.
  for (opd_i64 tile_start = first; tile_start < n; tile_start += step, i += step) {
    const Vector next_a = load<V>(base, 2, i + step, n), next_b = load<V>(trained, 2, i + step, n);
    const int valid = n - i >= V ? V : n > i ? (int)(n - i) : 0;
    opd_u32 differ = 0;
#pragma unroll
    for (int j = 0; j < V; j++) {
      const opd_u16 w = half_of(a, j), v = half_of(b, j);
      const opd_u32 abs_w = w & 0x7FFFu;
      differ |= (opd_u32)(w != v) << j;  // beyond n both are zero
      if (j >= valid || abs_w >= OPD_INFINITY_BITS) continue;
      counter.totals.finite++;
      if (abs_w) counter.tables.add(WORK_BASE, abs_w);
      else counter.totals.zero++;
    }
    const int changed = __popc(differ);
    counter.totals.numel += valid;
    counter.totals.bit_equal += valid - changed;
    if (mask && valid) {
      opd_u32 bits = 0;
#pragma unroll
      for (int j = 0; j < V; j++) {
        const opd_u16 w = half_of(a, j), v = half_of(b, j);
        const bool finite_change = (differ >> j & 1) && coordinate_finite(w, v);
        bits |= (opd_u32)(finite_change && visible_delta(w, v) > counter.threshold_bits[0]) << j;
      }
      mask[i >> 3] = (opd_u8)bits;
    }
    int position = warp_scan(changed);  // the number of changes in this lane and those before it
    const int warp_total = __shfl_sync(OPD_ALL_LANES, position, OPD_WARP - 1);
    position += queued - changed;
#pragma unroll
    for (int j = 0; j < V; j++)
      if (differ >> j & 1) queue[position++] = half_of(a, j) | (opd_u32)half_of(b, j) << 16;
    queued += warp_total;
    __syncwarp();
    while (queued >= OPD_WARP) {
      queued -= OPD_WARP;
      const opd_u32 both = queue[queued + lane];
      count_changed(counter, (opd_u16)both, (opd_u16)(both >> 16));
    }
    __syncwarp();  // the next step writes where some lanes may still read
    a = next_a;
    b = next_b;
  }
  if (lane < queued) count_changed(counter, (opd_u16)queue[lane], (opd_u16)(queue[lane] >> 16));
  flush_block<float, 1>(counter, arguments);
}

template <class T, int V>
__device__ __forceinline__ void count(const Arguments& arguments, int base_dtype, int trained_dtype) {
  const void *base = arguments.base, *trained = arguments.trained;
  const opd_i64 n = arguments.n;
  opd_u8* mask = arguments.mask;
  opd_i64* sums = arguments.sums;
  OPD_DYNAMIC_SHARED(shared);
  Counter<T> counter = init_block<T>(shared, arguments);
  Window windows[4] = {};
  int steps = 0;
  const opd_i64 tile = (opd_i64)blockDim.x * V, step = gridDim.x * tile, first = blockIdx.x * tile;
  opd_i64 i = first + (opd_i64)threadIdx.x * V;
  Vector a = load<V>(base, element_bytes(base_dtype), i, n), b = load<V>(trained, element_bytes(trained_dtype), i, n);
  // Every thread takes the same number of steps: lanes vote below.
  for (opd_i64 tile_start = first; tile_start < n; tile_start += step, i += step) {
    const Vector next_a = load<V>(base, element_bytes(base_dtype), i + step, n);
    const Vector next_b = load<V>(trained, element_bytes(trained_dtype), i + step, n);
    const int valid = n - i >= V ? V : n > i ? (int)(n - i) : 0;
    counter.totals.numel += valid;
    opd_u32 bits = 0;
    T x[V], y[V];
#pragma unroll
    for (int j = 0; j < V; j++) {
      const opd_u16 w = bf16_bits_of(a, base_dtype, j), v = bf16_bits_of(b, trained_dtype, j);
      x[j] = value_of<T>(a, base_dtype, j);
      y[j] = value_of<T>(b, trained_dtype, j);
      // With two dtypes a NaN equals nothing.
      if (j < valid)
        counter.totals.bit_equal += bits_of(x[j]) == bits_of(y[j]) && (base_dtype == trained_dtype || x[j] == x[j]);
      if (j >= valid || !coordinate_finite(w, v)) {
        x[j] = y[j] = 0;
        continue;
      }
      counter.totals.finite++;
      if (w & 0x7FFFu) counter.tables.add(WORK_BASE, w & 0x7FFFu);
      else counter.totals.zero++;
      const T stored = magnitude(y[j] - x[j]), p = magnitude(x[j]), q = magnitude(y[j]);
      counter.totals.unchanged_rtol += stored <= (T)1e-3 * (p > q ? p : q);
      const opd_u16 visible = (opd_u16)visible_delta(w, v);
      count_difference<T, 0>(counter, w, v, bits_of(stored), visible);
      bits |= (opd_u32)(visible > counter.threshold_bits[0]) << j;
    }
    if (mask) {
      bits = byte_of_lanes<V>(bits);
      if (valid && i % 8 == 0) mask[i >> 3] = (opd_u8)bits;
    }
    T largest[3] = {0, 0, 0};
#pragma unroll
    for (int j = 0; j < V; j++) {
      const T magnitudes[3] = {magnitude(x[j]), magnitude(y[j]), magnitude(y[j] - x[j])};
      for (int s = 0; s < 3; s++) largest[s] = magnitudes[s] > largest[s] ? magnitudes[s] : largest[s];
    }
    int level[4];
    bool higher = steps == 0;
    for (int s = 0; s < 4; s++) {
      level[s] = level_above(s < 3 ? (double)largest[s] * (double)largest[s] : (double)largest[2]);
      higher |= level[s] > windows[s].level;
    }
    if (__any_sync(OPD_ALL_LANES, higher)) {
      for (int s = 0; s < 4; s++) {
        window_flush(windows[s], sums + s * OPD_SUM_LIMBS);
        level[s] = warp_max(level[s]);
        windows[s].level = steps && windows[s].level > level[s] ? windows[s].level : level[s];
      }
    }
    steps = steps == OPD_FLUSH_STEPS ? 0 : steps + 1;
#pragma unroll
    for (int j = 0; j < V; j++) {
      const double p = x[j], q = y[j], d = magnitude(y[j] - x[j]);
      window_add(windows[0], p * p, sums);
      window_add(windows[1], q * q, sums + OPD_SUM_LIMBS);
      window_add(windows[2], d * d, sums + 2 * OPD_SUM_LIMBS);
      window_add(windows[3], d, sums + 3 * OPD_SUM_LIMBS);
    }
    a = next_a;
    b = next_b;
  }
  for (int s = 0; s < 4; s++) window_flush(windows[s], sums + s * OPD_SUM_LIMBS);
  flush_block<T, 0>(counter, arguments);
}

#include "cuda_pair.inl"

// A kernel with the members of `Arguments` as its arguments, each of eight bytes: no copy to the device is needed.
#define OPD_DELTA_KERNEL(name, threads, body)                                                                         \
  extern "C" __global__ void __launch_bounds__(threads, 1)                                                            \
  name(const void* base, opd_i64 base_dtype, const void* trained, opd_i64 trained_dtype, opd_u8* mask,                \
       opd_u32* workspace, opd_i64* tables, opd_i64* counts, opd_i64* sums, opd_u64* maximum, opd_i64 n,              \
       opd_i64 smem_tables, opd_i64 num_thresholds, opd_u64 thresholds, opd_u64 limit_counts, opd_u64 limit_0,        \
       opd_u64 limit_1, opd_u64 limit_2, opd_u64 limit_3, opd_u64 limit_4, opd_u64 limit_5, opd_u64 limit_6,          \
       opd_u64 limit_7, opd_u64 limit_8, opd_u64 limit_9) {                                                           \
    const Arguments arguments = {base, trained, mask, workspace, tables, counts, sums, maximum, n, (int)smem_tables,  \
                                 (int)num_thresholds, thresholds, limit_counts,                                       \
                                 {limit_0, limit_1, limit_2, limit_3, limit_4, limit_5, limit_6, limit_7, limit_8,    \
                                  limit_9}};                                                                          \
    (void)base_dtype, (void)trained_dtype;                                                                            \
    body;                                                                                                             \
  }                                                                                                                   \
  OPD_LAUNCHER(name)

// A bf16 pair, with tables in shared memory of `smem_tables` classes, one more than thresholds. Of the dynamic shared
// memory, PAIR_CLASSES bytes, these tables, and OPD_PAIR_QUEUE_BYTES for each warp are used.
OPD_DELTA_KERNEL(delta_count_bf16, OPD_PAIR_THREADS, count_pair_in_smem(arguments))
// The others have the first `smem_tables` of all tables in shared memory, after OPD_SMEM_HEADER_BYTES.
OPD_DELTA_KERNEL(delta_count_bf16_limited, OPD_PAIR_THREADS, count_pair(arguments))
OPD_DELTA_KERNEL(delta_count_float, 512, (count<float, 4>(arguments, (int)base_dtype, (int)trained_dtype)))
OPD_DELTA_KERNEL(delta_count_double, 512, (count<double, 2>(arguments, (int)base_dtype, (int)trained_dtype)))
