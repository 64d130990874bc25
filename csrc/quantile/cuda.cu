// `quantile` on a CUDA device: a pass counts one digit, sixteen bits, of the magnitudes whose upper digits equal a
// prefix, and finds the digit of each rank's threshold, most significant first: one pass for two-byte dtypes, two for
// fp32, four for fp64. The order of the bits of magnitudes is the order of the magnitudes.
//
// The first digit, which every value has, is counted in shared memory if it is below that of 2, in one table outside
// the mask and one inside; later digits, of the few values that share a threshold's upper ones, in the tables in global
// memory. Where shared memory holds both tables, a value costs one increment (`count_first`); otherwise zeros, which
// may be most of a change, are counted in registers. A NaN counts as the largest magnitude bits, beyond infinity.
#include "quantile.h"
#include "../common/cuda/grid.h"
#include "../common/cuda/packed.h"

#define OPD_MAX_RANKS 8  // of a launch

// What is known of a rank's threshold after a pass: its upper digits, its rank among the values with these digits, and
// the values before those, all of them and within the mask. int64 [ranks][NUM_RANK_STATES].
enum RankState { RANK_KEY, RANK_LEFT, RANK_BEFORE, RANK_BEFORE_MASKED, RANK_NAN, NUM_RANK_STATES };

template <int BYTES> struct Magnitude {};
template <> struct Magnitude<2> {
  typedef opd_u32 Key;
  static __device__ __forceinline__ Key of(const Vector& x, int j) { return half_of(x, j) & 0x7FFFu; }
};
template <> struct Magnitude<4> {
  typedef opd_u32 Key;
  static __device__ __forceinline__ Key of(const Vector& x, int j) {
    float value = single_of(x, j);
    return value == value ? magnitude_key(value, 0) >> 1 : 0x7FFFFFFFu;
  }
};
template <> struct Magnitude<8> {
  typedef opd_u64 Key;
  static __device__ __forceinline__ Key of(const Vector& x, int j) {
    double value = double_of(x, j);
    return value == value ? magnitude_key(value, 0) >> 1 : 0x7FFFFFFFFFFFFFFFull;
  }
};

// Adds the tables in shared memory to the first ones in global memory.
__device__ __forceinline__ void flush_digits(const opd_u32* smem_tables, int smem_rows, opd_u32* tables) {
  for (int row = 0; row < smem_rows; row++)
    for (int digit = threadIdx.x; digit < OPD_SMEM_DIGITS; digit += blockDim.x) {
      const opd_u32 count = smem_tables[row * OPD_SMEM_DIGITS + digit];
      if (count) atomicAdd(tables + row * OPD_DIGITS + digit, count);
    }
}

// The first digit of values of two or four bytes, with both tables (or, without a mask, one) in shared memory.
// Arguments as `quantile_count_2`.
template <int BYTES, bool MASKED>
__device__ __forceinline__ void count_first(const void* values, const opd_u8* mask, opd_u32* tables, opd_i64 n) {
  const int V = 16 / BYTES, rows = MASKED ? 2 : 1;
  const opd_u32 beyond = BYTES == 2 ? 0x40004000u : 0x40000000u;  // a bit of magnitudes from 2 on, and of NaN
  OPD_DYNAMIC_SHARED(shared);
  opd_u32* smem_tables = (opd_u32*)(shared + OPD_SMEM_HEADER_BYTES);
  for (int i = threadIdx.x; i < rows * OPD_SMEM_DIGITS; i += blockDim.x) smem_tables[i] = 0;
  __syncthreads();
  const SharedAddress base = shared_address(smem_tables);
  const SharedAddress inside_base = shared_address(smem_tables + (MASKED ? OPD_SMEM_DIGITS : 0));
  const opd_i64 tile = (opd_i64)blockDim.x * V, step = gridDim.x * tile;
  const bool aligned = ((opd_u64)values & 15) == 0;
  const auto load_values = [&](opd_i64 at) {
    if (aligned && at + V <= n) return load_now((const char*)values + at * BYTES);
    Vector some = {};
    OPD_RARE(some = load<V>(values, BYTES, at, n));
    return some;
  };
  opd_i64 i = blockIdx.x * tile + (opd_i64)threadIdx.x * V;
  Vector x = load_values(i);
  opd_u32 bits = MASKED && i < n ? mask[i >> 3] >> (i & 7) : 0;
#pragma unroll 1
  for (; i < n; i += step) {
    const opd_i64 next = i + step;
    const Vector next_x = load_values(next);
    const opd_u32 next_bits = MASKED && next < n ? mask[next >> 3] >> (next & 7) : 0;
    if (i + V > n || ((x.word[0] | x.word[1] | x.word[2] | x.word[3]) & beyond)) {
      OPD_RARE(for (int j = 0; j < V; j++) if (i + j < n) {
        const opd_u32 inside = MASKED ? bits >> j & 1 : 0;
        const opd_u32 digit = (opd_u32)(Magnitude<BYTES>::of(x, j) >> (8 * BYTES - OPD_DIGIT_BITS));
        if (digit < OPD_SMEM_DIGITS) atomicAdd(smem_tables + inside * OPD_SMEM_DIGITS + digit, 1u);
        else atomicAdd(tables + inside * OPD_DIGITS + digit, 1u);
      });
    } else {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const auto table_of = [&](int j) { return MASKED && bits & 1u << j ? inside_base : base; };
        if (BYTES == 2) {
          const opd_u32 magnitudes = x.word[k] & 0x7FFF7FFFu;
          shared_increment<0>(element_of_lower(table_of(2 * k), magnitudes));
          shared_increment<0>(table_of(2 * k + 1) + (magnitudes >> 14));
        } else {
          shared_increment<0>(table_of(k) + (x.word[k] >> 14 & 0xFFFCu));
        }
      }
    }
    x = next_x;
    bits = next_bits;
  }
  __syncthreads();
  flush_digits(smem_tables, rows, tables);
}

// values: [n]; mask: uint8 [(n + 7) / 8] or null; states: int64 [n_prefixes][NUM_RANK_STATES], or null for the first
// digit; tables: 32-bit [n_prefixes][2][OPD_DIGITS], outside and inside the mask, added to. smem_rows is 0 but for the
// first digit.
template <int BYTES>
__device__ __forceinline__ void count(const void* values, const opd_u8* mask, const opd_i64* states, opd_u32* tables,
                                      opd_i64 n, int shift, int n_prefixes, int smem_rows) {
  typedef typename Magnitude<BYTES>::Key Key;
  const int V = 16 / BYTES;
  OPD_DYNAMIC_SHARED(shared);
  opd_u32* smem_tables = (opd_u32*)(shared + OPD_SMEM_HEADER_BYTES);
  for (int i = threadIdx.x; i < smem_rows * OPD_SMEM_DIGITS; i += blockDim.x) smem_tables[i] = 0;
  __syncthreads();

  const auto prefix_of = [&](int p) -> opd_i64 { return states ? states[p * NUM_RANK_STATES + RANK_KEY] : 0; };
  opd_u32 zeros[2] = {0, 0};
  const opd_i64 tile = (opd_i64)blockDim.x * V, step = gridDim.x * tile;
  opd_i64 i = blockIdx.x * tile + (opd_i64)threadIdx.x * V;
  Vector x = load<V>(values, BYTES, i, n);
  opd_u32 bits = mask && i < n ? mask[i >> 3] >> (i & 7) : 0;
  for (; i < n; i += step) {
    const opd_i64 next = i + step;
    const Vector next_x = load<V>(values, BYTES, next, n);
    const opd_u32 next_bits = mask && next < n ? mask[next >> 3] >> (next & 7) : 0;
#pragma unroll
    for (int j = 0; j < V; j++) {
      if (i + j >= n) continue;
      const Key key = Magnitude<BYTES>::of(x, j);
      const opd_u32 inside = bits >> j & 1, digit = (opd_u32)(key >> shift) & (OPD_DIGITS - 1);
      if (key == 0) {
        zeros[0] += 1 - inside;
        zeros[1] += inside;
      } else if ((int)inside < smem_rows && digit < OPD_SMEM_DIGITS) {
        atomicAdd(smem_tables + inside * OPD_SMEM_DIGITS + digit, 1u);
      } else {
        const opd_i64 upper = (opd_i64)(key >> shift >> 16);
        for (int p = 0; p < n_prefixes; p++)
          if (upper == prefix_of(p)) atomicAdd(tables + ((opd_i64)2 * p + inside) * OPD_DIGITS + digit, 1u);
      }
    }
    x = next_x;
    bits = next_bits;
  }
  for (int inside = 0; inside < 2; inside++) {
    const opd_u32 total = warp_sum(zeros[inside]);
    if (threadIdx.x % OPD_WARP || !total) continue;
    for (int p = 0; p < n_prefixes; p++)
      if (prefix_of(p) == 0) atomicAdd(tables + ((opd_i64)2 * p + inside) * OPD_DIGITS, total);
  }
  __syncthreads();
  flush_digits(smem_tables, smem_rows, tables);
}

#define OPD_QUANTILE_COUNT(name, BYTES, FIRST)                                                                        \
  extern "C" __global__ void __launch_bounds__(1024, 1)                                                               \
  name(const void* values, const opd_u8* mask, const opd_i64* states, opd_u32* tables, opd_i64 n, opd_i64 shift,      \
       opd_i64 n_prefixes, opd_i64 smem_rows) {                                                                       \
    FIRST;                                                                                                            \
    count<BYTES>(values, mask, states, tables, n, (int)shift, (int)n_prefixes, (int)smem_rows);                       \
  }                                                                                                                   \
  OPD_LAUNCHER(name)

// Of two and four bytes, without a mask one table in shared memory is enough, with one two.
#define OPD_COUNT_FIRST(BYTES)                                                                                        \
  if (smem_rows == 2) return count_first<BYTES, true>(values, mask, tables, n);                                       \
  if (smem_rows == 1 && !mask) return count_first<BYTES, false>(values, mask, tables, n)
OPD_QUANTILE_COUNT(quantile_count_2, 2, OPD_COUNT_FIRST(2))
OPD_QUANTILE_COUNT(quantile_count_4, 4, OPD_COUNT_FIRST(4))
OPD_QUANTILE_COUNT(quantile_count_8, 8, (void)0)

// The magnitude with these bits.
OPD_FN double magnitude_of(opd_u64 key, int dtype) {
  if (dtype == BF16) return bf16_to_float((opd_u16)key);
  if (dtype == FP16) return fp16_to_float((opd_u16)key);
  return dtype == FP32 ? (double)bits_float((opd_u32)key) : bits_double(key);
}
// The first digit of infinity: any larger one belongs to a NaN.
OPD_FN opd_u32 infinity_digit(int dtype) {
  return dtype == FP16 ? 0x7C00u : dtype == FP64 ? 0x7FF0u : OPD_INFINITY_BITS;
}

// Finds the digit of each rank's threshold from the counts of a pass, and clears the tables for the next one. The number
// of threads is a power of two. One block per table: of all ranks for the first digit, then of each rank. tables: as `quantile_count_2`; states: int64
// [n_ranks][NUM_RANK_STATES], read unless `first`, and written; thresholds: fp64 [n_ranks] and counts: int64
// [n_ranks][QUANTILE_NUM_COUNTS], written if `last`; rank_0 and so on: the ranks, from 1.
__device__ __forceinline__ void find(opd_u32* tables, opd_i64* states, double* thresholds, opd_i64* counts, int n_ranks,
                                     bool largest, int dtype, bool first, bool last,
                                     const opd_i64 (&ranks)[OPD_MAX_RANKS]) {
  OPD_DYNAMIC_SHARED(shared);
  const opd_u32 lane = threadIdx.x % OPD_WARP, warp = threadIdx.x / OPD_WARP, warps = blockDim.x / OPD_WARP;
  // Counts of all values, values in the mask, and NaN, per thread: then those of the threads before it.
  opd_i64(*sums)[3] = (opd_i64(*)[3])shared;
  opd_u32* table = tables + (first ? 0 : blockIdx.x) * 2ll * OPD_DIGITS;
  const int per_thread = OPD_DIGITS / blockDim.x;
  // Positions of digits, in the order from which ranks count.
  const auto digit_at = [&](int position) -> opd_u32 { return largest ? OPD_DIGITS - 1 - position : position; };
  const auto is_nan = [&](opd_u32 digit) { return first && digit > infinity_digit(dtype); };
  opd_i64 own[3] = {0, 0, 0};
  for (int k = 0; k < per_thread; k++) {
    const opd_u32 digit = digit_at(threadIdx.x * per_thread + k);
    const opd_u32 outside = table[digit], inside = table[OPD_DIGITS + digit];
    if (is_nan(digit)) {
      own[2] += outside + inside;
    } else {
      own[0] += outside + inside;
      own[1] += inside;
    }
  }
  for (int c = 0; c < 3; c++) sums[threadIdx.x][c] = own[c];
  __syncthreads();
  for (opd_u32 column = warp; column < 3; column += warps) {  // exclusive sums
    opd_i64 before = 0;
    for (opd_u32 start = 0; start < blockDim.x; start += OPD_WARP) {
      const opd_i64 value = sums[start + lane][column];
      const opd_i64 up_to = warp_scan(value);
      sums[start + lane][column] = before + up_to - value;
      before += __shfl_sync(OPD_ALL_LANES, up_to, OPD_WARP - 1);
    }
    if (lane == 0) sums[blockDim.x][column] = before;
  }
  __syncthreads();
  for (int r = first ? (int)warp : (int)blockIdx.x; r < n_ranks; r += first ? (int)warps : n_ranks) {
    if (!first && warp) break;  // one rank per table
    opd_i64* state = states + r * NUM_RANK_STATES;
    const opd_i64 total = sums[blockDim.x][0];
    opd_i64 rank = 0;
#pragma unroll
    for (int k = 0; k < OPD_MAX_RANKS; k++) rank = k == r ? ranks[k] : rank;
    rank = first ? (rank < total ? rank : total) : state[RANK_LEFT];  // a rank beyond the values means all of them
    const opd_i64 nan = first ? sums[blockDim.x][2] : state[RANK_NAN];
    opd_i64 key = first ? 0 : state[RANK_KEY], before = first ? 0 : state[RANK_BEFORE];
    opd_i64 before_masked = first ? 0 : state[RANK_BEFORE_MASKED];
    opd_i64 tied = 0, tied_masked = 0;
    key <<= OPD_DIGIT_BITS;
    if (rank > 0) {
      int low = 0, high = (int)blockDim.x - 1;  // the last thread with fewer values before it than the rank
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (sums[middle][0] < rank) low = middle;
        else high = middle - 1;
      }
      opd_i64 reached = sums[low][0], reached_masked = sums[low][1];
      for (int k = 0; k < per_thread; k += OPD_WARP) {
        const int position = low * per_thread + k + (int)lane;
        const opd_u32 digit = digit_at(position);
        const bool counted = k + (int)lane < per_thread && !is_nan(digit);
        const opd_u32 inside = counted ? table[OPD_DIGITS + digit] : 0, all = counted ? table[digit] + inside : 0;
        const opd_u32 up_to = warp_scan(all), up_to_masked = warp_scan(inside);  // at most 2^30 values
        const opd_u32 beyond = __ballot_sync(OPD_ALL_LANES, reached + up_to >= rank);
        if (!beyond) {
          reached += __shfl_sync(OPD_ALL_LANES, up_to, OPD_WARP - 1);
          reached_masked += __shfl_sync(OPD_ALL_LANES, up_to_masked, OPD_WARP - 1);
          continue;
        }
        const int at = __popc(beyond ^ (beyond - 1)) - 1;  // the first lane
        tied = __shfl_sync(OPD_ALL_LANES, all, at);
        tied_masked = __shfl_sync(OPD_ALL_LANES, inside, at);
        reached += __shfl_sync(OPD_ALL_LANES, up_to, at) - tied;
        reached_masked += __shfl_sync(OPD_ALL_LANES, up_to_masked, at) - tied_masked;
        key |= digit_at(low * per_thread + k + at);
        break;
      }
      before += reached;
      before_masked += reached_masked;
      rank -= reached;
    }
    if (lane) continue;
    state[RANK_KEY] = key;
    state[RANK_LEFT] = rank;
    state[RANK_BEFORE] = before;
    state[RANK_BEFORE_MASKED] = before_masked;
    state[RANK_NAN] = nan;
    if (!last) continue;
    thresholds[r] = tied ? magnitude_of((opd_u64)key, dtype) : bits_double(0x7FF8000000000000ull);
    opd_i64* result = counts + r * QUANTILE_NUM_COUNTS;
    result[QUANTILE_COUNT_ABOVE] = before;
    result[QUANTILE_COUNT_TIED] = tied;
    result[QUANTILE_COUNT_ABOVE_MASKED] = before_masked;
    result[QUANTILE_COUNT_TIED_MASKED] = tied_masked;
    result[QUANTILE_COUNT_NAN] = nan;
  }
  if (last) return;
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * OPD_DIGITS; i += blockDim.x) table[i] = 0;
}

extern "C" __global__ void __launch_bounds__(1024)
quantile_find(opd_u32* tables, opd_i64* states, double* thresholds, opd_i64* counts, opd_i64 n_ranks, opd_i64 largest,
              opd_i64 dtype, opd_i64 first, opd_i64 last, opd_i64 rank_0, opd_i64 rank_1, opd_i64 rank_2,
              opd_i64 rank_3, opd_i64 rank_4, opd_i64 rank_5, opd_i64 rank_6, opd_i64 rank_7) {
  const opd_i64 ranks[OPD_MAX_RANKS] = {rank_0, rank_1, rank_2, rank_3, rank_4, rank_5, rank_6, rank_7};
  find(tables, states, thresholds, counts, (int)n_ranks, largest != 0, (int)dtype, first != 0, last != 0, ranks);
}
OPD_LAUNCHER(quantile_find)
