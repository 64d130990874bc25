// `delta` on a CUDA device: both tensors are read once, sixteen bytes at a time, and leave everything that the tally holds.
//
// Tables. What a coordinate adds to a table is one integer atomic. Magnitudes from 2^-31 and below 2, which nearly all are, count in
// shared memory, in as many rows as the device has room for (all ten with 227 KB, four with 99), the busiest first; the rest goes to
// the work tables of 2^15 bins in memory, which stay in the L2 cache. Zeros are counted in registers: one bin may hold half a
// tensor. A block flushes its tables once.
// Small histograms (ULP distances, thresholds, totals) have a column a lane: no two lanes of a warp meet in a bank.
//
// Of a bf16 pair most coordinates keep their bits, but hardly any warp has none that changed: if each lane counted its own, a
// warp would walk through all of `count_difference` for every coordinate, most lanes idle. So a warp queues what changed in
// shared memory and counts it 32 at a time.
//
// Sums are exact, so neither blocks nor atomics in any order can change a bit. Of a bf16 pair they follow from the tables
// (`delta_fold`): w^2 and w'^2 from the counts of their values, |delta| and delta^2 from STORED, whose bins hold the upper 16 bits
// of a difference, with the sums of the lower 16 bits and of their squares. Other dtypes are summed in windows (`Window`).
#include "delta.h"
#include "../common/cuda/grid.h"

#define OPD_LIMITS (2 * OPD_THRESHOLDS)
#define OPD_MANTISSAS 128     // bins of one exponent, of one scale: a block of `delta_fold`
#define OPD_WINDOW 4          // limbs that a thread holds of an exact sum
#define OPD_PAIR_THREADS 768  // a block of `delta_count_bf16`: with their queues, all tables fit 227 KB
#define OPD_QUEUE (OPD_WARP - 1 + OPD_WARP * 8)  // what was left, and all of a step
#define OPD_FLUSH_STEPS 1024  // after which a warp lets go of its windows: one outlier must not hold them high

// The tally's rows and counts.
enum Table { SOURCE, DELTA, TRAINED, MOVED, STORED, CHANGED };
enum Count { NUMEL, NONFINITE, BIT_EQUAL, ETA, LT, LE = LT + OPD_THRESHOLDS, ULP = LE + OPD_THRESHOLDS };

// Rows of the work tables, the busiest first. Where a bf16 pair moved is where it visibly changed: it has no row MOVED.
enum Work { WORK_SOURCE, WORK_STORED, WORK_TRAINED, WORK_FOURTH, WORK_FIFTH, WORK_VISIBLE, WORK_ROWS = WORK_VISIBLE + OPD_MAX_CUTS + 1 };
template <int PAIR> struct Rows { static const int delta = PAIR ? WORK_FOURTH : WORK_FIFTH, moved = PAIR ? WORK_FIFTH : WORK_FOURTH; };

enum Rules { RULE_CUT, RULE_LIMIT = OPD_MAX_CUTS, RULE_SLOT = RULE_LIMIT + OPD_LIMITS };

// Rows of the small histograms: ULP distances, ranks among the limits, totals.
enum Small { SMALL_RANK = OPD_ULP_BINS, FINITE = SMALL_RANK + OPD_LIMITS + 1, EQUAL, WITHIN_ETA, SHOWN, SHIFTED, DISTANT, ZERO, INSIDE, SMALL };

struct Block {  // in shared memory, before the tables
  opd_u64 limits[OPD_LIMITS];
  opd_u32 totals[SMALL];
  opd_u32 lanes[SMALL * OPD_WARP];
  opd_u32 queue[OPD_PAIR_THREADS / OPD_WARP][OPD_QUEUE];  // w and above it v, of a warp
};
static_assert(sizeof(Block) <= OPD_SMALL_BYTES, "the tables begin here");

struct Tables {
  opd_u32 *near_by, *work;  // rows in shared memory, all rows in memory
  int near_rows;
  __device__ __forceinline__ void add(int row, opd_u32 bin, opd_u32 count = 1) const {
    add_to_table(near_by, near_rows, row, work + row * OPD_BINS, bin, count);
  }
};

struct Totals { opd_u32 finite, equal, eta, shown, moved, distant, zero, inside; };  // of one thread

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

// What one thread holds of an exact sum: neighbouring limbs of 32 bits, the uppermost in units of 2^(32 level - 1074). The level
// is the warp's: its values stay below 2^40 units, so that adding and subtracting 1.5 * 2^52 units cuts a value at one unit,
// and the bits of that sum count the units (csrc/common/cpu/exact_sum.inl).
struct Window {
  opd_i64 part[OPD_WINDOW];
  int level;
};

OPD_FN double cutter_of(int level) { return bits_double((opd_u64)(32 * level + 1) << 52 | (opd_u64)1 << 51); }

// The lowest level whose 2^40 units exceed a magnitude, with limbs below it.
OPD_FN int level_above(double largest) {
  int level = ((int)(double_bits(largest) >> 52) + 12 + 31) / 32;
  return level < OPD_WINDOW - 1 ? OPD_WINDOW - 1 : level;
}

// A double of either sign, an integer times a power of two.
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
    double cutter = cutter_of(window.level - k), moved = value + cutter;
    window.part[k] += (opd_i64)(double_bits(moved) - double_bits(cutter));
    value -= moved - cutter;
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

// What a thread carries through a kernel.
template <class T> struct Counter {
  Block& block;
  Tables tables;
  opd_i64* low_sums;
  opd_u16 cuts[OPD_MAX_CUTS];
  Totals totals;
  typename Float<T>::Bits largest;
};

// The difference of a finite coordinate: bfloat16 patterns w -> v, the stored |delta| as bits, the visible one.
template <class T, int PAIR>
__device__ __forceinline__ void count_difference(Counter<T>& counter, opd_u16 w, opd_u16 v, typename Float<T>::Bits size, opd_u16 visible) {
  const opd_u32 lane = threadIdx.x % OPD_WARP, from = w & 0x7FFFu;
  if (w != v) {
    counter.totals.distant++;
    atomicAdd(counter.block.lanes + ulp_bin(w, v) * OPD_WARP + lane, 1u);
  }
  if (size) {
    int rank = 0;
    for (int k = 0; k < OPD_LIMITS; k++) rank += size >= counter.block.limits[k];
    atomicAdd(counter.block.lanes + (SMALL_RANK + rank) * OPD_WARP + lane, 1u);
    counter.largest = size > counter.largest ? size : counter.largest;
    counter.totals.moved++;
    if (!PAIR) counter.tables.add(Rows<PAIR>::moved, from);
    const opd_u32 narrow = float_bits((float)from_bits(size)), top = narrow >> 16;
    counter.tables.add(WORK_STORED, top);
    if (PAIR && (narrow & 0xFFFFu)) {
      const opd_i64 low = narrow & 0xFFFFu;
      add_count(counter.low_sums + top, low);
      add_count(counter.low_sums + OPD_BINS + top, low * low);
    }
  }
  if (visible) {
    counter.totals.shown++;
    counter.tables.add(Rows<PAIR>::delta, visible);
    counter.tables.add(WORK_TRAINED, v & 0x7FFFu);
    counter.tables.add(WORK_VISIBLE + change_class(visible, counter.cuts) - 1, from);
  }
}

// Clears a block's shared memory; all threads go on together.
template <class T>
__device__ __forceinline__ Counter<T> begin(opd_u8* shared, opd_u32* work, opd_i64* low_sums, const opd_i64* rules, int near_rows) {
  Block& block = *(Block*)shared;
  const Tables tables = {(opd_u32*)(shared + OPD_SMALL_BYTES), work, near_rows};
  for (int i = threadIdx.x; i < OPD_LIMITS; i += blockDim.x) block.limits[i] = (opd_u64)rules[RULE_LIMIT + i];
  for (int i = threadIdx.x; i < SMALL * OPD_WARP; i += blockDim.x) block.lanes[i] = 0;
  for (int i = threadIdx.x; i < near_rows * OPD_NEAR_BINS; i += blockDim.x) tables.near_by[i] = 0;
  __syncthreads();
  return {block, tables, low_sums, {(opd_u16)rules[0], (opd_u16)rules[1], (opd_u16)rules[2], (opd_u16)rules[3]}, {}, 0};
}

// Adds what the threads of a block counted to the work tables and the tally.
template <class T, int PAIR>
__device__ __forceinline__ void finish(Counter<T>& counter, const opd_i64* rules, opd_i64* tables, opd_i64* counts, opd_u64* maximum) {
  Block& block = counter.block;
  const opd_u32 lane = threadIdx.x % OPD_WARP;
  const Totals& of = counter.totals;
  const opd_u32 of_thread[] = {of.finite, of.equal, of.eta, of.shown, of.moved, of.distant, of.zero, of.inside};
#pragma unroll
  for (int k = 0; k < INSIDE - FINITE + 1; k++) atomicAdd(block.lanes + (FINITE + k) * OPD_WARP + lane, of_thread[k]);
  const typename Float<T>::Bits largest = warp_max(counter.largest);
  if (lane == 0 && largest) atomicMax(maximum, double_bits((double)from_bits(largest)));
  __syncthreads();

  for (int row = threadIdx.x / OPD_WARP; row < SMALL; row += blockDim.x / OPD_WARP) {
    opd_u32 total = warp_sum(block.lanes[row * OPD_WARP + lane]);
    if (lane == 0) block.totals[row] = total;
  }
  flush_tables(counter.tables.near_by, counter.tables.near_rows, counter.tables.work, OPD_BINS);
  __syncthreads();

  const opd_u32* total = block.totals;
  const opd_u32 still = total[FINITE] - total[SHIFTED];
  for (int k = threadIdx.x; k < OPD_ULP_BINS; k += blockDim.x)
    add_count(counts + ULP + k, total[k] + (k == OPD_ULP_BINS / 2 ? total[FINITE] - total[DISTANT] : 0));
  for (int k = threadIdx.x; k < OPD_LIMITS; k += blockDim.x) {  // below limit k: whatever reaches at most k limits
    opd_i64 below = block.limits[k] ? still : 0;
    for (int rank = 0; rank <= k; rank++) below += total[SMALL_RANK + rank];
    add_count(counts + rules[RULE_SLOT + k], below);
  }
  if (threadIdx.x == 0) {
    add_count(counts + NUMEL, total[INSIDE]);
    add_count(counts + NONFINITE, total[INSIDE] - total[FINITE]);
    add_count(counts + BIT_EQUAL, total[EQUAL]);
    add_count(counts + ETA, PAIR ? still : total[WITHIN_ETA]);  // bf16 neighbours lie 2^-8 apart, four times the 1e-3 of eta
    add_count(tables + DELTA * OPD_BINS, total[FINITE] - total[SHOWN]);
    add_count(tables + STORED * OPD_BINS, still);
    if (total[ZERO]) atomicAdd(counter.tables.work + WORK_SOURCE * OPD_BINS, total[ZERO]);
  }
}

// |w| of a coordinate whose bits changed has been counted if it is finite: taken back where the coordinate is not.
__device__ __forceinline__ void count_changed(Counter<float>& counter, opd_u16 w, opd_u16 v) {
  const opd_u32 from = w & 0x7FFFu;
  if (coordinate_finite(w, v)) {
    count_difference<float, 1>(counter, w, v, magnitude_bits(bf16_to_float(v) - bf16_to_float(w)), (opd_u16)visible_delta(w, v));
  } else if (from < 0x7F80u) {
    counter.totals.finite--;
    if (from) counter.tables.add(WORK_SOURCE, from, ~0u);
    else counter.totals.zero--;
  }
}

__device__ __forceinline__ void count_pair(const void* source, const void* trained, opd_u8* mask, opd_u32* work, opd_i64* low_sums,
                                           const opd_i64* rules, opd_i64* tables, opd_i64* counts, opd_u64* maximum, opd_i64 n, int near_rows) {
  const int V = 8;
  OPD_DYNAMIC_SHARED(shared);
  Counter<float> counter = begin<float>(shared, work, low_sums, rules, near_rows);
  const int lane = threadIdx.x % OPD_WARP;
  opd_u32* queue = counter.block.queue[threadIdx.x / OPD_WARP];
  int queued = 0;  // the warp's
  const opd_i64 tile = (opd_i64)blockDim.x * V, step = gridDim.x * tile, first = blockIdx.x * tile;
  opd_i64 i = first + (opd_i64)threadIdx.x * V;
  Vector a = load<V>(source, 2, i, n), b = load<V>(trained, 2, i, n);
  for (opd_i64 base = first; base < n; base += step, i += step) {  // the same turns in every thread: lanes work together below
    const Vector next_a = load<V>(source, 2, i + step, n), next_b = load<V>(trained, 2, i + step, n);
    const int here = n - i >= V ? V : n > i ? (int)(n - i) : 0;
    opd_u32 differ = 0;
#pragma unroll
    for (int j = 0; j < V; j++) {
      const opd_u16 w = half_of(a, j), v = half_of(b, j);
      const opd_u32 from = w & 0x7FFFu;
      differ |= (opd_u32)(w != v) << j;  // beyond n both are zero
      if (j >= here || from >= 0x7F80u) continue;
      counter.totals.finite++;
      if (from) counter.tables.add(WORK_SOURCE, from);
      else counter.totals.zero++;
    }
    const int changed = __popc(differ);
    counter.totals.inside += here;
    counter.totals.equal += here - changed;
    if (mask && here) {
      opd_u32 bits = 0;
#pragma unroll
      for (int j = 0; j < V; j++) {
        const opd_u16 w = half_of(a, j), v = half_of(b, j);
        bits |= (opd_u32)((differ >> j & 1) && coordinate_finite(w, v) && visible_delta(w, v) > counter.cuts[0]) << j;
      }
      mask[i >> 3] = (opd_u8)bits;
    }
    int place = changed;  // in the end, how many changed in this lane and those before it
#pragma unroll
    for (int d = 1; d < OPD_WARP; d *= 2) {
      const int before = __shfl_up_sync(OPD_ALL_LANES, place, d);
      place += lane >= d ? before : 0;
    }
    const int of_warp = __shfl_sync(OPD_ALL_LANES, place, OPD_WARP - 1);
    place += queued - changed;
#pragma unroll
    for (int j = 0; j < V; j++)
      if (differ >> j & 1) queue[place++] = half_of(a, j) | (opd_u32)half_of(b, j) << 16;
    queued += of_warp;
    __syncwarp();
    while (queued >= OPD_WARP) {
      queued -= OPD_WARP;
      const opd_u32 both = queue[queued + lane];
      count_changed(counter, (opd_u16)both, (opd_u16)(both >> 16));
    }
    __syncwarp();  // what follows writes where some lanes may still read
    a = next_a;
    b = next_b;
  }
  if (lane < queued) count_changed(counter, (opd_u16)queue[lane], (opd_u16)(queue[lane] >> 16));
  finish<float, 1>(counter, rules, tables, counts, maximum);
}

template <class T, int V>
__device__ __forceinline__ void count(const void* source, int source_dtype, const void* trained, int trained_dtype, opd_u8* mask, opd_u32* work,
                                      opd_i64* low_sums, const opd_i64* rules, opd_i64* tables, opd_i64* counts, opd_i64* sums,
                                      opd_u64* maximum, opd_i64 n, int near_rows) {
  OPD_DYNAMIC_SHARED(shared);
  Counter<T> counter = begin<T>(shared, work, low_sums, rules, near_rows);
  Window windows[4] = {};
  int steps = 0;
  const opd_i64 tile = (opd_i64)blockDim.x * V, step = gridDim.x * tile, first = blockIdx.x * tile;
  opd_i64 i = first + (opd_i64)threadIdx.x * V;
  Vector a = load<V>(source, element_bytes(source_dtype), i, n), b = load<V>(trained, element_bytes(trained_dtype), i, n);
  for (opd_i64 base = first; base < n; base += step, i += step) {  // the same turns in every thread: lanes vote below
    const Vector next_a = load<V>(source, element_bytes(source_dtype), i + step, n);
    const Vector next_b = load<V>(trained, element_bytes(trained_dtype), i + step, n);
    const int here = n - i >= V ? V : n > i ? (int)(n - i) : 0;
    counter.totals.inside += here;
    opd_u32 bits = 0;
    T x[V], y[V];
#pragma unroll
    for (int j = 0; j < V; j++) {
      const opd_u16 w = pattern_of(a, source_dtype, j), v = pattern_of(b, trained_dtype, j);
      x[j] = value_of<T>(a, source_dtype, j);
      y[j] = value_of<T>(b, trained_dtype, j);
      // Of two dtypes a NaN equals nothing.
      if (j < here) counter.totals.equal += bits_of(x[j]) == bits_of(y[j]) && (source_dtype == trained_dtype || x[j] == x[j]);
      if (j >= here || !coordinate_finite(w, v)) {
        x[j] = y[j] = 0;
        continue;
      }
      counter.totals.finite++;
      if (w & 0x7FFFu) counter.tables.add(WORK_SOURCE, w & 0x7FFFu);
      else counter.totals.zero++;
      const T stored = magnitude(y[j] - x[j]), p = magnitude(x[j]), q = magnitude(y[j]);
      counter.totals.eta += stored <= (T)1e-3 * (p > q ? p : q);
      const opd_u16 visible = (opd_u16)visible_delta(w, v);
      count_difference<T, 0>(counter, w, v, bits_of(stored), visible);
      bits |= (opd_u32)(visible > counter.cuts[0]) << j;
    }
    if (mask) {
      bits = byte_of_lanes<V>(bits);
      if (here && i % 8 == 0) mask[i >> 3] = (opd_u8)bits;
    }
    T most[3] = {0, 0, 0};
#pragma unroll
    for (int j = 0; j < V; j++) {
      const T size[3] = {magnitude(x[j]), magnitude(y[j]), magnitude(y[j] - x[j])};
      for (int s = 0; s < 3; s++) most[s] = size[s] > most[s] ? size[s] : most[s];
    }
    int level[4];
    bool higher = steps == 0;
    for (int s = 0; s < 4; s++) {
      level[s] = level_above(s < 3 ? (double)most[s] * (double)most[s] : (double)most[2]);
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
  finish<T, 0>(counter, rules, tables, counts, maximum);
}

// work: 32-bit [WORK_ROWS][2^15] and low_sums: [2][2^15], both zero; rules: cuts, limits in order, the count each limit belongs
// to; tables, counts, sums, maximum: the tally's, added to. Both dtypes are bf16.
extern "C" __global__ void __launch_bounds__(OPD_PAIR_THREADS, 1)
delta_count_bf16(const void* source, opd_i64, const void* trained, opd_i64, opd_u8* mask, opd_u32* work, opd_i64* low_sums, const opd_i64* rules,
                 opd_i64* tables, opd_i64* counts, opd_i64*, opd_u64* maximum, opd_i64 n, opd_i64 near_rows) {
  count_pair(source, trained, mask, work, low_sums, rules, tables, counts, maximum, n, (int)near_rows);
}
OPD_LAUNCHER(delta_count_bf16)

// As above, of any dtypes.
#define OPD_DELTA_COUNT(name, T, V)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(512, 1)                                                                                \
  name(const void* source, opd_i64 source_dtype, const void* trained, opd_i64 trained_dtype, opd_u8* mask, opd_u32* work,            \
       opd_i64* low_sums, const opd_i64* rules, opd_i64* tables, opd_i64* counts, opd_i64* sums, opd_u64* maximum, opd_i64 n,         \
       opd_i64 near_rows) {                                                                                                           \
    count<T, V>(source, (int)source_dtype, trained, (int)trained_dtype, mask, work, low_sums, rules, tables, counts, sums, maximum,  \
                n, (int)near_rows);                                                                                                   \
  }                                                                                                                                   \
  OPD_LAUNCHER(name)

OPD_DELTA_COUNT(delta_count_float, float, 4)
OPD_DELTA_COUNT(delta_count_double, double, 2)

// Adds the work tables to the tally's, and a bf16 pair's sums. A block is one exponent, a thread one bin.
extern "C" __global__ void __launch_bounds__(OPD_MANTISSAS)
delta_fold(const opd_u32* work, const opd_i64* low_sums, opd_i64* tables, opd_i64* sums, opd_i64 cuts, opd_i64 bf16_pair) {
  const opd_i64 bin = (opd_i64)blockIdx.x * OPD_MANTISSAS + threadIdx.x;
  const opd_u32* at = work + bin;
  const opd_i64 source = at[WORK_SOURCE * OPD_BINS], stored = at[WORK_STORED * OPD_BINS], trained = at[WORK_TRAINED * OPD_BINS];
  const opd_i64 delta = at[(bf16_pair ? Rows<1>::delta : Rows<0>::delta) * OPD_BINS];
  if (!__any_sync(OPD_ALL_LANES, (source | stored | trained | delta) != 0)) return;  // most exponents are nobody's
  opd_i64 visible = 0;
  for (int c = OPD_MAX_CUTS; c >= 0; c--) {
    visible += at[(WORK_VISIBLE + c) * OPD_BINS];
    if (0 < c && c <= cuts) add_count(tables + (CHANGED + c - 1) * OPD_BINS + bin, visible);
  }
  const opd_i64 moved = bf16_pair ? visible : at[Rows<0>::moved * OPD_BINS];
  add_count(tables + SOURCE * OPD_BINS + bin, source);
  add_count(tables + DELTA * OPD_BINS + bin, delta);
  add_count(tables + TRAINED * OPD_BINS + bin, trained);
  add_count(tables + MOVED * OPD_BINS + bin, moved);
  add_count(tables + STORED * OPD_BINS + bin, stored);
  if (!bf16_pair) return;
  // A bf16 magnitude is t * 2^(e - 134), e at least 1; a stored delta is (t * 2^16 + low) * 2^(e - 150).
  const int e = blockIdx.x ? (int)blockIdx.x : 1, square = 1074 + 2 * (e - 134), square_low = 1074 + 2 * (e - 150);
  const opd_i64 t = threadIdx.x + (blockIdx.x ? OPD_MANTISSAS : 0), low = low_sums[bin], low_square = low_sums[OPD_BINS + bin];
  const opd_i64 of_source = warp_sum(source * t * t), of_trained = warp_sum((source - moved + trained) * t * t);
  const opd_i64 of_tops = warp_sum(stored * t * t), of_cross = warp_sum(low * t), of_lows = warp_sum(low_square);
  const opd_i64 tops = warp_sum(stored * t), lows = warp_sum(low);
  if (threadIdx.x % OPD_WARP) return;
  sum_add_atomic(sums, of_source, square);
  sum_add_atomic(sums + OPD_SUM_LIMBS, of_trained, square);
  sum_add_atomic(sums + 2 * OPD_SUM_LIMBS, of_tops, square_low + 32);
  sum_add_atomic(sums + 2 * OPD_SUM_LIMBS, of_cross, square_low + 17);
  sum_add_atomic(sums + 2 * OPD_SUM_LIMBS, of_lows, square_low);
  sum_add_atomic(sums + 3 * OPD_SUM_LIMBS, tops, 1074 + e - 134);
  sum_add_atomic(sums + 3 * OPD_SUM_LIMBS, lows, 1074 + e - 150);
}
OPD_LAUNCHER(delta_fold)

// Each limb but the last of every sum below 2^32: the one form of a sum. A thread a sum.
extern "C" __global__ void __launch_bounds__(OPD_WARP) delta_carry(opd_i64* sums) {
  if (threadIdx.x >= 4) return;
  opd_i64* limbs = sums + threadIdx.x * OPD_SUM_LIMBS;
  opd_i64 above = 0;
#pragma unroll 1
  for (int i = 0; i + 1 < OPD_SUM_LIMBS; i++) {
    opd_i64 value = limbs[i] + above;
    limbs[i] = value & 0xFFFFFFFF;
    above = value >> 32;
  }
  limbs[OPD_SUM_LIMBS - 1] += above;
}
OPD_LAUNCHER(delta_carry)
