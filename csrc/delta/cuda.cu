// `delta` on a CUDA device: both tensors are read once, sixteen bytes at a time, and everything that the tally holds is
// counted.
//
// Tables. Adding a coordinate to a table is one integer atomic. Magnitudes from 2^-31 to below 2, which nearly all are,
// are counted in shared memory, in as many rows as the device has space for (all ten with 227 KB, four with 99 KB), the
// busiest first; the rest is counted in the work tables of 2^15 bins in global memory, which stay in the L2 cache.
// Zeros are counted in registers: one bin may hold half a tensor. A block flushes its tables once. Small histograms
// (ULP distances, limits, counts) have one column per lane: no two lanes of a warp access the same bank.
//
// In a bf16 pair most coordinates keep their bits, but hardly any warp has none that changed: if each lane counted its
// own changes, a warp would execute all of `count_difference` for every coordinate with most lanes idle. So a warp
// queues its changed coordinates in shared memory and counts them 32 at a time.
//
// Sums are exact, so the order of blocks and atomics cannot change a bit. For a bf16 pair they follow from the tables
// (`delta_fold`): w^2 and w'^2 from the counts of their values, |delta| and delta^2 from HIST_DELTA_STORED, whose bins
// hold the upper 16 bits of a difference, with the sums of the lower 16 bits and of their squares. Other dtypes are
// summed in windows (`Window`).
#include "delta.h"
#include "../common/cuda/grid.h"

#define OPD_WINDOW 4          // limbs of an exact sum that a thread holds
#define OPD_PAIR_THREADS 768  // per block of `delta_count_bf16`: with their queues, all tables fit 227 KB
#define OPD_QUEUE (OPD_WARP - 1 + OPD_WARP * 8)  // per warp: what was left, and all coordinates of a step
#define OPD_FLUSH_STEPS 1024  // steps after which a warp flushes its windows: one outlier must not keep them high

// Rows of the work tables, the busiest first. A bf16 pair has no row WORK_BASE_CHANGED: what differs in the stored view
// differs in the visible one.
enum Work {
  WORK_BASE, WORK_STORED, WORK_TRAINED, WORK_FOURTH, WORK_FIFTH, WORK_VISIBLE,
  WORK_ROWS = WORK_VISIBLE + OPD_MAX_VISIBLE_THRESHOLDS + 1
};
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
  opd_u32 totals[SMALL_ROWS];
  opd_u32 lanes[SMALL_ROWS * OPD_WARP];
  opd_u32 queue[OPD_PAIR_THREADS / OPD_WARP][OPD_QUEUE];  // per warp: w in the lower, v in the upper half
};
static_assert(sizeof(BlockState) <= OPD_SMEM_HEADER_BYTES, "the tables begin after the header");

struct Tables {
  opd_u32* smem_tables;  // [smem_rows][OPD_SMEM_BINS], in shared memory
  opd_u32* work;         // [WORK_ROWS][OPD_BINS], in global memory
  int smem_rows;
  __device__ __forceinline__ void add(int row, opd_u32 bin, opd_u32 count = 1) const {
    add_to_table(smem_tables, smem_rows, row, work + row * OPD_BINS, bin, count);
  }
};

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
__device__ __forceinline__ Counter<T> init_block(opd_u8* shared, opd_u32* work, opd_i64* low_sums,
                                                 const opd_i64* params, int smem_rows) {
  BlockState& block = *(BlockState*)shared;
  const Tables tables = {(opd_u32*)(shared + OPD_SMEM_HEADER_BYTES), work, smem_rows};
  for (int i = threadIdx.x; i < OPD_LIMITS; i += blockDim.x) block.limits[i] = (opd_u64)params[PARAM_LIMITS + i];
  for (int i = threadIdx.x; i < SMALL_ROWS * OPD_WARP; i += blockDim.x) block.lanes[i] = 0;
  for (int i = threadIdx.x; i < smem_rows * OPD_SMEM_BINS; i += blockDim.x) tables.smem_tables[i] = 0;
  __syncthreads();
  const opd_i64* bits = params + PARAM_VISIBLE;
  return {block, tables, low_sums, {(opd_u16)bits[0], (opd_u16)bits[1], (opd_u16)bits[2], (opd_u16)bits[3]}, {}, 0};
}

// Adds the counts of a block's threads to the work tables and the tally.
template <class T, int PAIR>
__device__ __forceinline__ void flush_block(Counter<T>& counter, const opd_i64* params, opd_i64* tables,
                                            opd_i64* counts, opd_u64* maximum) {
  BlockState& block = counter.block;
  const opd_u32 lane = threadIdx.x % OPD_WARP;
  const ThreadCounts& c = counter.totals;
  const opd_u32 in_order[] = {c.finite,         c.bit_equal,   c.unchanged_rtol, c.visible_changed,
                              c.stored_changed, c.bits_differ, c.zero,           c.numel};  // of `enum Small`
#pragma unroll
  for (int k = 0; k < NUMEL - FINITE + 1; k++) atomicAdd(block.lanes + (FINITE + k) * OPD_WARP + lane, in_order[k]);
  const typename Float<T>::Bits largest = warp_max(counter.largest);
  if (lane == 0 && largest) atomicMax(maximum, double_bits((double)from_bits(largest)));
  __syncthreads();

  for (int row = threadIdx.x / OPD_WARP; row < SMALL_ROWS; row += blockDim.x / OPD_WARP) {
    opd_u32 total = warp_sum(block.lanes[row * OPD_WARP + lane]);
    if (lane == 0) block.totals[row] = total;
  }
  flush_tables(counter.tables.smem_tables, counter.tables.smem_rows, counter.tables.work, OPD_BINS);
  __syncthreads();

  const opd_u32* total = block.totals;
  const opd_u32 unchanged = total[FINITE] - total[STORED_CHANGED];
  for (int k = threadIdx.x; k < OPD_ULP_BINS; k += blockDim.x)
    add_count(counts + COUNT_ULP + k, total[k] + (k == OPD_ULP_BINS / 2 ? total[FINITE] - total[BITS_DIFFER] : 0));
  for (int k = threadIdx.x; k < OPD_LIMITS; k += blockDim.x) {  // values below limit k reach at most k limits
    opd_i64 below = block.limits[k] ? unchanged : 0;
    for (int rank = 0; rank <= k; rank++) below += total[SMALL_RANK + rank];
    add_count(counts + params[PARAM_COUNTS + k], below);
  }
  if (threadIdx.x == 0) {
    add_count(counts + COUNT_NUMEL, total[NUMEL]);
    add_count(counts + COUNT_NONFINITE, total[NUMEL] - total[FINITE]);
    add_count(counts + COUNT_BIT_EQUAL, total[BIT_EQUAL]);
    // bf16 neighbours are 2^-8 apart, four times the relative tolerance of 1e-3.
    add_count(counts + COUNT_UNCHANGED_RTOL, PAIR ? unchanged : total[UNCHANGED_RTOL]);
    add_count(tables + HIST_DELTA * OPD_BINS, total[FINITE] - total[VISIBLE_CHANGED]);
    add_count(tables + HIST_DELTA_STORED * OPD_BINS, unchanged);
    if (total[ZERO]) atomicAdd(counter.tables.work + WORK_BASE * OPD_BINS, total[ZERO]);
  }
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

// Arguments as `delta_count_bf16`.
__device__ __forceinline__ void count_pair(const void* base, const void* trained, opd_u8* mask, opd_u32* work,
                                           opd_i64* low_sums, const opd_i64* params, opd_i64* tables, opd_i64* counts,
                                           opd_u64* maximum, opd_i64 n, int smem_rows) {
  const int V = 8;
  OPD_DYNAMIC_SHARED(shared);
  Counter<float> counter = init_block<float>(shared, work, low_sums, params, smem_rows);
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
    int position = changed;  // after the loop: the number of changes in this lane and those before it
#pragma unroll
    for (int d = 1; d < OPD_WARP; d *= 2) {
      const int before = __shfl_up_sync(OPD_ALL_LANES, position, d);
      position += lane >= d ? before : 0;
    }
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
  flush_block<float, 1>(counter, params, tables, counts, maximum);
}

// Arguments as the kernels of `OPD_DELTA_COUNT`.
template <class T, int V>
__device__ __forceinline__ void count(const void* base, int base_dtype, const void* trained, int trained_dtype,
                                      opd_u8* mask, opd_u32* work, opd_i64* low_sums, const opd_i64* params,
                                      opd_i64* tables, opd_i64* counts, opd_i64* sums, opd_u64* maximum, opd_i64 n,
                                      int smem_rows) {
  OPD_DYNAMIC_SHARED(shared);
  Counter<T> counter = init_block<T>(shared, work, low_sums, params, smem_rows);
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
  flush_block<T, 0>(counter, params, tables, counts, maximum);
}

// base, trained: bf16 [n]; mask: uint8 [(n + 7) / 8] or null; work: 32-bit [WORK_ROWS][OPD_BINS] and low_sums: int64
// [2][OPD_BINS], both zero; params: int64 [NUM_PARAMS]; tables: int64 [HIST_BASE_OVER + thresholds][OPD_BINS], counts:
// int64 [NUM_COUNTS], sums: int64 [NUM_SUMS][OPD_SUM_LIMBS] and maximum: double [1], as its bits, are added to.
extern "C" __global__ void __launch_bounds__(OPD_PAIR_THREADS, 1)
delta_count_bf16(const void* base, opd_i64, const void* trained, opd_i64, opd_u8* mask, opd_u32* work,
                 opd_i64* low_sums, const opd_i64* params, opd_i64* tables, opd_i64* counts, opd_i64*,
                 opd_u64* maximum, opd_i64 n, opd_i64 smem_rows) {
  count_pair(base, trained, mask, work, low_sums, params, tables, counts, maximum, n, (int)smem_rows);
}
OPD_LAUNCHER(delta_count_bf16)

// As above, for any dtypes.
#define OPD_DELTA_COUNT(name, T, V)                                                                                   \
  extern "C" __global__ void __launch_bounds__(512, 1)                                                                \
  name(const void* base, opd_i64 base_dtype, const void* trained, opd_i64 trained_dtype, opd_u8* mask, opd_u32* work, \
       opd_i64* low_sums, const opd_i64* params, opd_i64* tables, opd_i64* counts, opd_i64* sums, opd_u64* maximum,   \
       opd_i64 n, opd_i64 smem_rows) {                                                                                \
    count<T, V>(base, (int)base_dtype, trained, (int)trained_dtype, mask, work, low_sums, params, tables, counts,     \
                sums, maximum, n, (int)smem_rows);                                                                    \
  }                                                                                                                   \
  OPD_LAUNCHER(name)

OPD_DELTA_COUNT(delta_count_float, float, 4)
OPD_DELTA_COUNT(delta_count_double, double, 2)

// Adds the work tables to the tally's, and the sums of a bf16 pair. One block per exponent, one thread per bin.
extern "C" __global__ void __launch_bounds__(OPD_MANTISSAS)
delta_fold(const opd_u32* work, const opd_i64* low_sums, opd_i64* tables, opd_i64* sums, opd_i64 n_thresholds,
           opd_i64 bf16_pair) {
  const opd_i64 bin = (opd_i64)blockIdx.x * OPD_MANTISSAS + threadIdx.x;
  const opd_u32* at = work + bin;
  const opd_i64 base = at[WORK_BASE * OPD_BINS], stored = at[WORK_STORED * OPD_BINS];
  const opd_i64 trained = at[WORK_TRAINED * OPD_BINS];
  const opd_i64 delta = at[(bf16_pair ? Rows<1>::delta : Rows<0>::delta) * OPD_BINS];
  if (!__any_sync(OPD_ALL_LANES, (base | stored | trained | delta) != 0)) return;  // most exponents are unused
  opd_i64 visible = 0;
  for (int c = OPD_MAX_VISIBLE_THRESHOLDS; c >= 0; c--) {
    visible += at[(WORK_VISIBLE + c) * OPD_BINS];
    if (0 < c && c <= n_thresholds) add_count(tables + (HIST_BASE_OVER + c - 1) * OPD_BINS + bin, visible);
  }
  const opd_i64 base_changed = bf16_pair ? visible : at[Rows<0>::base_changed * OPD_BINS];
  add_count(tables + HIST_BASE * OPD_BINS + bin, base);
  add_count(tables + HIST_DELTA * OPD_BINS + bin, delta);
  add_count(tables + HIST_TRAINED_CHANGED * OPD_BINS + bin, trained);
  add_count(tables + HIST_BASE_CHANGED * OPD_BINS + bin, base_changed);
  add_count(tables + HIST_DELTA_STORED * OPD_BINS + bin, stored);
  if (!bf16_pair) return;
  // A bf16 magnitude is t * 2^(e - 134), e at least 1; a stored delta is (t * 2^16 + low) * 2^(e - 150).
  const int e = blockIdx.x ? (int)blockIdx.x : 1;
  const int square = OPD_SUM_SHIFT + 2 * (e - 134), square_low = OPD_SUM_SHIFT + 2 * (e - 150);
  const opd_i64 t = threadIdx.x + (blockIdx.x ? OPD_MANTISSAS : 0);
  const opd_i64 low = low_sums[bin], low_square = low_sums[OPD_BINS + bin];
  const opd_i64 sum_base = warp_sum(base * t * t), sum_trained = warp_sum((base - base_changed + trained) * t * t);
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
OPD_LAUNCHER(delta_fold)

// Makes every limb but the last of each sum less than 2^32: the canonical form. One thread per sum.
extern "C" __global__ void __launch_bounds__(OPD_WARP) delta_propagate_carry(opd_i64* sums) {
  if (threadIdx.x >= NUM_SUMS) return;
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
OPD_LAUNCHER(delta_propagate_carry)
