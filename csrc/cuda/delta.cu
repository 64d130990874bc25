// `delta` on a CUDA device: both tensors are read once, sixteen bytes at a time, and leave everything that the tally holds.
//
// Tables. What a coordinate adds to a table is one integer atomic. Magnitudes below 2, which nearly all are, count in tables of
// 2^14 bins in shared memory, of as many rows as the device has room for (three with 227 KB, one with 99), the busiest first;
// the rest goes to the work tables of 2^15 bins in memory, which stay in the L2 cache. Zeros are counted in registers: one bin
// may hold half a tensor. A block flushes its tables once.
// Small histograms (ULP distances, thresholds, totals) have a column a lane: no two lanes of a warp meet in a bank.
//
// Sums are exact, so neither blocks nor atomics in any order can change a bit. Of a bf16 pair they follow from the tables
// (`delta_fold`): w^2 and w'^2 from the counts of their values, |delta| and delta^2 from STORED, whose bins hold the upper 16 bits
// of a difference, with the sums of the lower 16 bits and of their squares. Other dtypes are summed in windows (`Window`).
#include "../delta.h"
#include "grid.h"

#define OPD_LIMITS (2 * OPD_THRESHOLDS)
#define OPD_MANTISSAS 128     // bins of one exponent, of one scale: a block of `delta_fold`
#define OPD_WINDOW 4          // limbs that a thread holds of an exact sum
#define OPD_FLUSH_STEPS 1024  // after which a warp lets go of its windows: one outlier must not hold them high

// The tally's rows and counts.
enum Table { SOURCE, DELTA, TRAINED, MOVED, STORED, CHANGED };
enum Count { NUMEL, NONFINITE, BIT_EQUAL, ETA, LT, LE = LT + OPD_THRESHOLDS, ULP = LE + OPD_THRESHOLDS };

// Rows of the work tables, the busiest first. Where a bf16 pair moved is where it visibly changed: it has no row MOVED.
enum Work { WORK_SOURCE, WORK_STORED, WORK_THIRD, WORK_FOURTH, WORK_TRAINED, WORK_VISIBLE, WORK_ROWS = WORK_VISIBLE + OPD_MAX_CUTS + 1 };
template <int PAIR> struct Rows { static const int delta = PAIR ? WORK_THIRD : WORK_FOURTH, moved = PAIR ? WORK_FOURTH : WORK_THIRD; };

enum Rules { RULE_CUT, RULE_LIMIT = OPD_MAX_CUTS, RULE_SLOT = RULE_LIMIT + OPD_LIMITS };

// Rows of the small histograms: ULP distances, ranks among the limits, totals.
enum Small { SMALL_RANK = OPD_ULP_BINS, FINITE = SMALL_RANK + OPD_LIMITS + 1, EQUAL, WITHIN_ETA, SHOWN, SHIFTED, DISTANT, ZERO, INSIDE, SMALL };

struct Block {  // in shared memory, before the tables
  opd_u64 limits[OPD_LIMITS];
  opd_u32 totals[SMALL];
  opd_u32 lanes[SMALL * OPD_WARP];
};
static_assert(sizeof(Block) <= OPD_SMALL_BYTES, "the tables begin here");

struct Tables {
  opd_u32 *near_by, *work;  // rows in shared memory, all rows in memory
  int near_rows;
  __device__ __forceinline__ void add(int row, opd_u32 bin) const {
    if (row < near_rows && bin < OPD_SHARED_BINS) atomicAdd(near_by + row * OPD_SHARED_BINS + bin, 1u);
    else atomicAdd(work + row * OPD_BINS + bin, 1u);
  }
};

struct Totals { opd_u32 finite, equal, eta, shown, moved, distant, zero; };  // of one thread

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
// and the bits of that sum count the units (csrc/cpu/exact_sum.inl).
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
  sum_add_shared(limbs, bits >> 63 ? -integer : integer, exponent ? exponent - 1 : 0);
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
    if (total && threadIdx.x % OPD_WARP == 0) sum_add_shared(limbs, total, 32 * (window.level - k));
    window.part[k] = 0;
  }
}

// One coordinate: bfloat16 patterns w -> v of x -> y. Returns whether it is finite; `bit` tells whether it exceeds the first cut.
template <class T, int PAIR>
__device__ __forceinline__ bool count_one(T x, T y, opd_u16 w, opd_u16 v, bool one_dtype, const opd_u16* cuts, Block& block, const Tables& tables,
                                          opd_i64* low_sums, Totals& totals, typename Float<T>::Bits& largest, opd_u32& bit) {
  const opd_u32 lane = threadIdx.x % OPD_WARP, from = w & 0x7FFFu;
  const opd_u16 visible = (opd_u16)visible_delta(w, v);
  bit = 0;
  totals.equal += bits_of(x) == bits_of(y) && (one_dtype || x == x);  // of two dtypes, a NaN equals nothing
  if (!coordinate_finite(w, v)) return false;
  totals.finite++;
  if (from) tables.add(WORK_SOURCE, from);
  else totals.zero++;
  if (w != v) {
    totals.distant++;
    atomicAdd(block.lanes + ulp_bin(w, v) * OPD_WARP + lane, 1u);
  }
  const typename Float<T>::Bits size = magnitude_bits(y - x);
  const T stored = from_bits(size);
  if (!PAIR) totals.eta += stored <= (T)1e-3 * (magnitude(x) > magnitude(y) ? magnitude(x) : magnitude(y));
  if (size) {
    int rank = 0;
    for (int k = 0; k < OPD_LIMITS; k++) rank += size >= block.limits[k];
    atomicAdd(block.lanes + (SMALL_RANK + rank) * OPD_WARP + lane, 1u);
    largest = size > largest ? size : largest;
    totals.moved++;
    if (!PAIR) tables.add(Rows<PAIR>::moved, from);
    const opd_u32 narrow = float_bits((float)stored), top = narrow >> 16;
    tables.add(WORK_STORED, top);
    if (PAIR && (narrow & 0xFFFFu)) {
      const opd_i64 low = narrow & 0xFFFFu;
      add_count(low_sums + top, low);
      add_count(low_sums + OPD_BINS + top, low * low);
    }
  }
  if (visible) {
    totals.shown++;
    tables.add(Rows<PAIR>::delta, visible);
    tables.add(WORK_TRAINED, v & 0x7FFFu);
    tables.add(WORK_VISIBLE + change_class(visible, cuts) - 1, from);
    bit = visible > cuts[0];
  }
  return true;
}

template <class T, int V, int PAIR>
__device__ __forceinline__ void count(const void* source, int source_dtype, const void* trained, int trained_dtype, opd_u8* mask, opd_u32* work,
                                      opd_i64* low_sums, const opd_i64* rules, opd_i64* tables, opd_i64* counts, opd_i64* sums,
                                      opd_u64* maximum, opd_i64 n, int near_rows) {
  OPD_DYNAMIC_SHARED(shared);
  Block& block = *(Block*)shared;
  const Tables counted = {(opd_u32*)(shared + OPD_SMALL_BYTES), work, near_rows};
  const opd_u16 cuts[OPD_MAX_CUTS] = {(opd_u16)rules[0], (opd_u16)rules[1], (opd_u16)rules[2], (opd_u16)rules[3]};
  for (int i = threadIdx.x; i < OPD_LIMITS; i += blockDim.x) block.limits[i] = (opd_u64)rules[RULE_LIMIT + i];
  for (int i = threadIdx.x; i < SMALL * OPD_WARP; i += blockDim.x) block.lanes[i] = 0;
  for (int i = threadIdx.x; i < near_rows * OPD_SHARED_BINS; i += blockDim.x) counted.near_by[i] = 0;
  __syncthreads();

  Totals totals = {0, 0, 0, 0, 0, 0, 0};
  typename Float<T>::Bits largest = 0;
  Window windows[4] = {};
  opd_u32 inside = 0;
  int steps = 0;
  const int source_bytes = PAIR ? 2 : element_bytes(source_dtype), trained_bytes = PAIR ? 2 : element_bytes(trained_dtype);
  const opd_i64 tile = (opd_i64)blockDim.x * V, step = gridDim.x * tile, first = blockIdx.x * tile;
  opd_i64 i = first + (opd_i64)threadIdx.x * V;
  Vector a = load<V>(source, source_bytes, i, n), b = load<V>(trained, trained_bytes, i, n);
  for (opd_i64 base = first; base < n; base += step, i += step) {  // the same turns in every thread: lanes vote below
    const Vector next_a = load<V>(source, source_bytes, i + step, n), next_b = load<V>(trained, trained_bytes, i + step, n);
    const int here = n - i >= V ? V : n > i ? (int)(n - i) : 0;
    inside += here;
    opd_u32 bits = 0;
    T x[V], y[V];
#pragma unroll
    for (int j = 0; j < V; j++) {
      opd_u16 w = pattern_of(a, PAIR ? BF16 : source_dtype, j), v = pattern_of(b, PAIR ? BF16 : trained_dtype, j);
      x[j] = value_of<T>(a, PAIR ? BF16 : source_dtype, j);
      y[j] = value_of<T>(b, PAIR ? BF16 : trained_dtype, j);
      opd_u32 bit = 0;
      bool finite = j < here && count_one<T, PAIR>(x[j], y[j], w, v, PAIR || source_dtype == trained_dtype, cuts, block, counted, low_sums, totals, largest, bit);
      if (!finite) x[j] = y[j] = 0;
      bits |= bit << j;
    }
    if (mask) {
      bits = byte_of_lanes<V>(bits);
      if (here && i % 8 == 0) mask[i >> 3] = (opd_u8)bits;
    }
    if (!PAIR) {
      T most[4] = {0, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < V; j++) {
        T size[3] = {magnitude(x[j]), magnitude(y[j]), magnitude(y[j] - x[j])};
        for (int s = 0; s < 3; s++) most[s] = size[s] > most[s] ? size[s] : most[s];
      }
      int level[4];
      bool higher = steps == 0;
      for (int s = 0; s < 4; s++) {
        double largest_of = s < 3 ? (double)most[s] * (double)most[s] : (double)most[2];
        level[s] = level_above(largest_of);
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
        double p = x[j], q = y[j], d = magnitude(y[j] - x[j]);
        window_add(windows[0], p * p, sums);
        window_add(windows[1], q * q, sums + OPD_SUM_LIMBS);
        window_add(windows[2], d * d, sums + 2 * OPD_SUM_LIMBS);
        window_add(windows[3], d, sums + 3 * OPD_SUM_LIMBS);
      }
    }
    a = next_a;
    b = next_b;
  }
  if (!PAIR)
    for (int s = 0; s < 4; s++) window_flush(windows[s], sums + s * OPD_SUM_LIMBS);

  const opd_u32 lane = threadIdx.x % OPD_WARP;
  const opd_u32 of_thread[] = {totals.finite, totals.equal, totals.eta, totals.shown, totals.moved, totals.distant, totals.zero, inside};
#pragma unroll
  for (int k = 0; k < INSIDE - FINITE + 1; k++) atomicAdd(block.lanes + (FINITE + k) * OPD_WARP + lane, of_thread[k]);
  largest = warp_max(largest);
  if (lane == 0 && largest) atomicMax(maximum, double_bits((double)from_bits(largest)));
  __syncthreads();

  for (int row = threadIdx.x / OPD_WARP; row < SMALL; row += blockDim.x / OPD_WARP) {
    opd_u32 total = warp_sum(block.lanes[row * OPD_WARP + lane]);
    if (lane == 0) block.totals[row] = total;
  }
  for (int row = 0; row < near_rows; row++)
    for (int bin = threadIdx.x; bin < OPD_SHARED_BINS; bin += blockDim.x) {
      opd_u32 some = counted.near_by[row * OPD_SHARED_BINS + bin];
      if (some) atomicAdd(work + row * OPD_BINS + bin, some);
    }
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
    if (total[ZERO]) atomicAdd(work + WORK_SOURCE * OPD_BINS, total[ZERO]);
  }
}

// work: 32-bit [WORK_ROWS][2^15] and low_sums: [2][2^15], both zero; rules: cuts, limits in order, the count each limit belongs
// to; tables, counts, sums, maximum: the tally's, added to.
#define OPD_DELTA_COUNT(name, T, V, PAIR, threads)                                                                                      \
  extern "C" __global__ void __launch_bounds__(threads, 1)                                                                              \
  name(const void* source, opd_i64 source_dtype, const void* trained, opd_i64 trained_dtype, opd_u8* mask, opd_u32* work,              \
       opd_i64* low_sums, const opd_i64* rules, opd_i64* tables, opd_i64* counts, opd_i64* sums, opd_u64* maximum, opd_i64 n,           \
       opd_i64 near_rows) {                                                                                                             \
    count<T, V, PAIR>(source, (int)source_dtype, trained, (int)trained_dtype, mask, work, low_sums, rules, tables, counts, sums,       \
                      maximum, n, (int)near_rows);                                                                                      \
  }                                                                                                                                     \
  OPD_LAUNCHER(name)

OPD_DELTA_COUNT(delta_count_bf16, float, 8, 1, 1024)
OPD_DELTA_COUNT(delta_count_float, float, 4, 0, 512)
OPD_DELTA_COUNT(delta_count_double, double, 2, 0, 512)

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
  sum_add_shared(sums, of_source, square);
  sum_add_shared(sums + OPD_SUM_LIMBS, of_trained, square);
  sum_add_shared(sums + 2 * OPD_SUM_LIMBS, of_tops, square_low + 32);
  sum_add_shared(sums + 2 * OPD_SUM_LIMBS, of_cross, square_low + 17);
  sum_add_shared(sums + 2 * OPD_SUM_LIMBS, of_lows, square_low);
  sum_add_shared(sums + 3 * OPD_SUM_LIMBS, tops, 1074 + e - 134);
  sum_add_shared(sums + 3 * OPD_SUM_LIMBS, lows, 1074 + e - 150);
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
