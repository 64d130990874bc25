// `overlap` on a CUDA device: the base and all runs are read once, and one launch adds everything to the outputs.
//
// Every coordinate increments the table of |w|. Which runs changed it is one number, the set, with one bit per run.
// Coordinates with a set that is not empty are queued, |w| and the set, and counted 32 at a time: in the table of |w|
// of each run of the set, and in a histogram of sets, from which the counts of pairs and of numbers of runs follow. For
// more than eight runs there is a histogram for every pair of groups of four runs.
//
// The common path is for values below 2: changes are compared as bfloat16, two at a time, which gives what overlap.h
// defines (`changed_halves`). Other values, and indices from n on, are compared by `compare_one_by_one`.
//
// Rows are the tables of |w|, that of all coordinates first. Shared memory holds as many as there is space for, with
// magnitudes from 2^-31 to below 2, and the zeros of all rows. A block adds these counts to the outputs at its end;
// everything else it adds to the outputs at once.
#include "overlap.h"
#include "../common/cuda/grid.h"
#include "../common/cuda/queue.h"

#define OPD_BF16_THREADS 640    // at most per block of a kernel for bf16
#define OPD_MIXED_THREADS 1024  // per block of the kernel for all dtypes
#define OPD_BF16_STEP 16        // coordinates that a thread takes per step
#define OPD_MIXED_STEP 8
#define OPD_GROUPS (OPD_MAX_RUNS / OPD_GROUP)
#define OPD_PAIRS_OF_GROUPS (OPD_GROUPS * (OPD_GROUPS - 1) / 2)
#define OPD_PAIR_SETS (OPD_GROUP_SETS * OPD_GROUP_SETS)
#define OPD_NOT_COUNTED 0xFFFFu  // in place of |w|: not finite, or beyond n

// Offsets in a block's shared memory, in bytes.
enum SharedOffset {
  AT_TRAINED,                                                       // addresses [OPD_MAX_RUNS]
  AT_SETS = AT_TRAINED + 8 * OPD_MAX_RUNS,                          // [OPD_PAIRS_OF_GROUPS][OPD_PAIR_SETS]
  AT_NUM_RUNS = AT_SETS + 4 * OPD_PAIRS_OF_GROUPS * OPD_PAIR_SETS,  // [OPD_MAX_RUNS + 1], element 0 unused
  AT_ZEROS = AT_NUM_RUNS + 4 * (OPD_MAX_RUNS + 1),                  // [1 + OPD_MAX_RUNS]: bin 0 of every row
  AT_NONFINITE = AT_ZEROS + 4 * (OPD_MAX_RUNS + 1),
  AT_ROWS = AT_NONFINITE + 8  // [smem_rows][OPD_SMEM_BINS]; then one queue per warp
};
#define OPD_BF16_QUEUE_BYTES (4 * (OPD_QUEUE_REST + OPD_WARP * OPD_BF16_STEP))
#define OPD_MIXED_QUEUE_BYTES (4 * (OPD_QUEUE_REST + OPD_WARP * OPD_MIXED_STEP))

// The histogram of the sets of groups g < h, whose index has that of g in the lower bits.
OPD_FN int pair_of_groups(int g, int h) { return h * (h - 1) / 2 + g; }

// The arguments of a kernel. base: [n]; trained: addresses of [n], null from `runs` on; dtypes: two bits for the base,
// then for each run; threshold: a bf16 magnitude. hist_base: int64 [OPD_BINS], hist_changed: int64 [runs][OPD_BINS],
// both: int64 [runs][runs], hist_num_runs: int64 [runs + 1] and counts: int64 [OVERLAP_NUM_COUNTS] are added to.
struct Arguments {
  const void* base;
  opd_u64 dtypes;
  opd_i64 *hist_base, *hist_changed, *both, *hist_num_runs, *counts;
  opd_i64 n;
  int runs;
  opd_u32 threshold;
  int smem_rows;
  const void* trained[OPD_MAX_RUNS];

  __device__ __forceinline__ int dtype_of(int row) const { return (int)(dtypes >> 2 * row & 3); }
  __device__ __forceinline__ opd_i64* row(int row) const {  // of the base, then of the runs
    return row == 0 ? hist_base : hist_changed + (row - 1) * (opd_i64)OPD_BINS;
  }
};

struct BlockState {
  const Arguments& a;
  opd_u8* shared;
  int smem_rows;
  SharedAddress begin, queue;  // of shared memory, of this warp's queue

  __device__ __forceinline__ opd_u32* words(int offset) const { return (opd_u32*)(shared + offset); }
  __device__ __forceinline__ const void** trained() const { return (const void**)(shared + AT_TRAINED); }
  __device__ __forceinline__ void add(int row, opd_u32 bin) const {
    if (bin == 0) atomicAdd(words(AT_ZEROS) + row, 1u);
    else if (row < smem_rows && is_in_smem(bin))
      atomicAdd(words(AT_ROWS) + row * OPD_SMEM_BINS + (bin - OPD_SMEM_FIRST_BIN), 1u);
    else add_count(a.row(row) + bin, 1);
  }
};

// The bfloat16 bits of coordinates [i, i + 8), two per word; zeros from n on.
__device__ __forceinline__ void load_as_bf16(const void* data, int dtype, opd_i64 i, opd_i64 n, opd_u32* words) {
  const auto pair_of = [&](const Vector& x, int as, int j) -> opd_u32 {
    return bf16_bits_of(x, as, j) | (opd_u32)bf16_bits_of(x, as, j + 1) << 16;
  };
  if (dtype == FP32) {
#pragma unroll
    for (int part = 0; part < 2; part++) {
      const Vector x = load<4>(data, 4, i + 4 * part, n);
#pragma unroll
      for (int k = 0; k < 2; k++) words[2 * part + k] = pair_of(x, FP32, 2 * k);
    }
  } else if (dtype == FP64) {
#pragma unroll
    for (int part = 0; part < 4; part++) words[part] = pair_of(load<2>(data, 8, i + 2 * part, n), FP64, 0);
  } else {
    const Vector x = load<8>(data, 2, i, n);
#pragma unroll
    for (int k = 0; k < 4; k++) words[k] = dtype == BF16 ? x.word[k] : pair_of(x, FP16, 2 * k);
  }
}

// The step of a lane: |w| of its coordinates and the sets of runs that changed them, in the halves of words. Vectors of
// eight coordinates are 256 apart.
template <int STEP> struct Step {
  static const int WORDS = STEP / 2;
  opd_u32 magnitudes[WORDS], sets[WORDS];
};

// The sets of a step from index i on, for any values; of w, the words of the base.
template <int STEP>
__device__ __forceinline__ void compare_one_by_one(const BlockState& block, opd_i64 i, const opd_u32* w,
                                                   Step<STEP>& step) {
  const Arguments& a = block.a;
#pragma unroll
  for (int first = 0; first < STEP; first += 8, i += 256) {
    opd_u32* magnitudes = step.magnitudes + first / 2;
    opd_u32* sets = step.sets + first / 2;
    opd_u32 infinite = 0;
#pragma unroll
    for (int k = 0; k < 4; k++) sets[k] = 0;
#pragma unroll 1
    for (int run = 0; run < a.runs; run++) {
      opd_u32 v[4];
      load_as_bf16(block.trained()[run], a.dtype_of(run + 1), i, a.n, v);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const opd_u32 shift = 16 * (j & 1), w_j = w[(first + j) / 2] >> shift, v_j = v[j / 2] >> shift;
        const opd_u32 difference = difference_bits((opd_u16)w_j, (opd_u16)v_j);
        sets[j / 2] |= (opd_u32)(difference >= change_limit(a.threshold)) << (run + shift);
        infinite |= (opd_u32)!difference_finite(difference) << j;
      }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (i + j < a.n && !(infinite >> j & 1)) continue;
      magnitudes[j / 2] |= OPD_NOT_COUNTED << 16 * (j & 1);
      sets[j / 2] &= ~(0xFFFFu << 16 * (j & 1));
      if (i + j < a.n) atomicAdd(block.words(AT_NONFINITE), 1u);
    }
  }
}

template <int ROW>
__device__ __forceinline__ void count_change_in_row(SharedAddress at, opd_u32 change) {
  if (change & 0x8000u << ROW) shared_increment<OPD_BIN_0(AT_ROWS + 4 * ROW * OPD_SMEM_BINS)>(at);
}

// Counts a coordinate that a run changed: |w| in the lower half of `change`, the set in the upper. RUNS: 0 for any
// number.
template <int RUNS>
__device__ __forceinline__ void count_change(const BlockState& block, opd_u32 change) {
  const opd_u32 bin = change & 0xFFFFu, set = change >> 16;
  if (RUNS) {
    shared_increment<AT_SETS>(element_of_upper(block.begin, change));
    if ((change & 0x7000u) == 0x3000u) {
      const SharedAddress at = element_of_lower(block.begin, change);
      count_change_in_row<1>(at, change);
      count_change_in_row<2>(at, change);
      if (RUNS > 2) count_change_in_row<3>(at, change);
      if (RUNS > 3) count_change_in_row<4>(at, change);
      return;
    }
    OPD_RARE(for (int run = 0; run < RUNS; run++) if (set >> run & 1) block.add(run + 1, bin));
    return;
  }
  const int groups = (block.a.runs + OPD_GROUP - 1) / OPD_GROUP;
  for (int h = 1; h == 1 || h < groups; h++)
    for (int g = 0; g < h; g++) {
      const opd_u32 set_g = set >> OPD_GROUP * g & (OPD_GROUP_SETS - 1);
      const opd_u32 set_h = set >> OPD_GROUP * h & (OPD_GROUP_SETS - 1);
      atomicAdd(block.words(AT_SETS) + pair_of_groups(g, h) * OPD_PAIR_SETS + (set_h * OPD_GROUP_SETS | set_g), 1u);
    }
  if (groups > 2) atomicAdd(block.words(AT_NUM_RUNS) + __popc(set), 1u);
  for (int run = 0; run < block.a.runs; run++)
    if (set >> run & 1) block.add(run + 1, bin);
}

// Counts |w| of a step, and what runs changed through the queue, which has `queued` elements. Returns how many it has
// then.
template <int RUNS, int STEP>
__device__ __forceinline__ opd_u32 count_step(const BlockState& block, const Step<STEP>& step, opd_u32 queued) {
  // Bits 12 to 15 of a sum are zero for magnitudes from 2^-31 to below 2.
  opd_u32 largest = 0, bits = 0;  // bits: of lower halves, and from bit 16 on of upper halves
#pragma unroll
  for (int k = 0; k < step.WORDS; k++) largest = max_of_sums(step.magnitudes[k], 0xD000D000u, largest);
  if (largest & 0xF000F000u || (RUNS == 0 && block.smem_rows == 0)) {
    OPD_RARE(_Pragma("unroll") for (int j = 0; j < STEP; j++) {
      const opd_u32 bin = step.magnitudes[j / 2] >> 16 * (j & 1) & 0xFFFFu;
      if (bin != OPD_NOT_COUNTED) block.add(0, bin);
    });
  } else {
#pragma unroll
    for (int k = 0; k < step.WORDS; k++) {
      shared_increment<OPD_BIN_0(AT_ROWS)>(element_of_lower(block.begin, step.magnitudes[k]));
      shared_increment<OPD_BIN_0(AT_ROWS)>(block.begin + (step.magnitudes[k] >> 14));
    }
  }
#pragma unroll
  for (int k = 0; k < step.WORDS; k++) bits += nonzero_halves(step.sets[k]) << k;
  queued += append_to_queue<STEP / 2>(block.queue + 4 * queued, bits, step.magnitudes, step.sets);
  return drain_queue(block.queue, queued, [&](opd_u32 change) { count_change<RUNS>(block, change); });
}

// Adds the counts of a block to the outputs.
__device__ __forceinline__ void flush_block(const BlockState& block) {
  const Arguments& a = block.a;
  const opd_u32 *sets = block.words(AT_SETS), *zeros = block.words(AT_ZEROS);
  opd_u32* num_runs = block.words(AT_NUM_RUNS);
  __syncthreads();
  if (a.runs <= 2 * OPD_GROUP) {
    for (int set = threadIdx.x; set < OPD_PAIR_SETS; set += blockDim.x)
      if (sets[set]) atomicAdd(num_runs + __popc(set), sets[set]);
  }
  for (int row = 0; row <= a.runs; row++) {
    const opd_u32* table = block.words(AT_ROWS) + row * OPD_SMEM_BINS;
    if (row < block.smem_rows)
      for (int i = threadIdx.x; i < OPD_SMEM_BINS; i += blockDim.x)
        add_count(a.row(row) + OPD_SMEM_FIRST_BIN + i, table[i]);
    if (threadIdx.x == 0) add_count(a.row(row), zeros[row]);
  }
  for (int pair = threadIdx.x; pair < a.runs * a.runs; pair += blockDim.x) {
    const int first = pair / a.runs, second = pair % a.runs;
    int g = first / OPD_GROUP, h = second / OPD_GROUP;
    if (g > h) continue;  // as its transpose
    if (g == h) h = g == 0 ? 1 : g, g = 0;  // any histogram that has the group
    const auto bit_of = [&](int run) -> opd_u32 {  // in the index of a set
      return 1u << (run % OPD_GROUP + (run / OPD_GROUP == h ? OPD_GROUP : 0));
    };
    const opd_u32 both = bit_of(first) | bit_of(second);
    opd_u32 total = 0;
    for (opd_u32 set = both; set < OPD_PAIR_SETS; set = (set + 1) | both)
      total += sets[pair_of_groups(g, h) * OPD_PAIR_SETS + set];
    add_count(a.both + pair, total);
    if (first / OPD_GROUP != second / OPD_GROUP) add_count(a.both + second * a.runs + first, total);
  }
  __syncthreads();
  if (threadIdx.x) return;
  const opd_i64 nonfinite = *block.words(AT_NONFINITE);
  opd_i64 unchanged = (blockIdx.x == 0 ? a.n : 0) - nonfinite;  // of all coordinates, less those of this block
  for (int k = 1; k <= a.runs; k++) {
    add_count(a.hist_num_runs + k, num_runs[k]);
    unchanged -= num_runs[k];
  }
  add_count(a.hist_num_runs, unchanged);
  add_count(a.counts + OVERLAP_COUNT_NONFINITE, nonfinite);
  if (blockIdx.x == 0) add_count(a.counts + OVERLAP_COUNT_NUMEL, a.n);
}

// RUNS: how many, of bf16 like the base; or 0 for any number, of any dtypes.
template <int RUNS, int STEP>
__device__ __forceinline__ void count(const Arguments& a) {
  const int WORDS = STEP / 2;
  OPD_DYNAMIC_SHARED(shared);
  const opd_u32 lane = threadIdx.x % OPD_WARP, warp = threadIdx.x / OPD_WARP;
  const int smem_rows = RUNS ? RUNS + 1 : a.smem_rows, queues = AT_ROWS + 4 * OPD_SMEM_BINS * smem_rows;
  const int queue_bytes = RUNS ? OPD_BF16_QUEUE_BYTES : OPD_MIXED_QUEUE_BYTES;
  const SharedAddress begin = shared_address(shared);
  const BlockState block = {a, shared, smem_rows, begin, begin + queues + warp * queue_bytes};
  for (int i = AT_SETS / 4 + threadIdx.x; i < queues / 4; i += blockDim.x) ((opd_u32*)shared)[i] = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int run = 0; run < OPD_MAX_RUNS; run++) block.trained()[run] = a.trained[run];
  }
  __syncthreads();

  const opd_i64 tile = (opd_i64)blockDim.x * STEP, stride = gridDim.x * tile;
  opd_u64 addresses = (opd_u64)a.base;
#pragma unroll
  for (int run = 0; run < RUNS; run++) addresses |= (opd_u64)a.trained[run];
  const bool aligned = (addresses & 15) == 0;
  const opd_u32 threshold = a.threshold << 16 | a.threshold;
  opd_i64 i = blockIdx.x * tile + warp * (OPD_WARP * STEP) + lane * 8;
  opd_u32 queued = 0;  // by the warp
  Step<STEP> step;
#pragma unroll
  for (int k = 0; k < WORDS; k++) step.magnitudes[k] = ~0u, step.sets[k] = 0;
  // A turn counts one step and compares the next one, whose loads come first.
  for (opd_i64 left = a.n - blockIdx.x * tile;; left -= stride, i += stride) {
    opd_u32 w[WORDS], v[RUNS ? RUNS : 1][WORDS];
    if (RUNS && left > 0) {
      load_step((const char*)a.base + 2 * i, a.n - i, aligned && left >= tile, w);
#pragma unroll
      for (int run = 0; run < RUNS; run++)
        load_step((const char*)a.trained[run] + 2 * i, a.n - i, aligned && left >= tile, v[run]);
    }
    queued = count_step<RUNS>(block, step, queued);
    if (left <= 0) break;
    opd_u32 beyond = 0;  // bit 14 of a half is zero for values below 2
    const auto compare = [&](int run, const opd_u32* run_words) {
#pragma unroll
      for (int k = 0; k < WORDS; k++) {
        step.sets[k] += changed_halves(w[k], run_words[k], threshold) << run;
        beyond |= run_words[k];
      }
    };
#pragma unroll
    for (int k = 0; k < WORDS; k++) step.sets[k] = 0;
    if (RUNS) {
#pragma unroll
      for (int run = 0; run < RUNS; run++) compare(run, v[run]);
    } else {
      load_as_bf16(a.base, a.dtype_of(0), i, a.n, w);
#pragma unroll 1
      for (int run = 0; run < a.runs; run++) {
        load_as_bf16(block.trained()[run], a.dtype_of(run + 1), i, a.n, v[0]);
        compare(run, v[0]);
      }
    }
#pragma unroll
    for (int k = 0; k < WORDS; k++) step.magnitudes[k] = w[k] & 0x7FFF7FFFu, beyond |= w[k];
    if (left < tile || (beyond & 0x40004000u)) OPD_RARE(compare_one_by_one(block, i, w, step));
  }
  if (lane < queued) count_change<RUNS>(block, shared_load<0>(block.queue + 4 * lane));
  flush_block(block);
}

// A kernel with the members of `Arguments` as its arguments, each of eight bytes: no copy to the device is needed.
#define OPD_OVERLAP_KERNEL(name, threads, body)                                                                       \
  extern "C" __global__ void __launch_bounds__(threads, 1)                                                            \
  name(const void* base, opd_u64 dtypes, opd_i64* hist_base, opd_i64* hist_changed, opd_i64* both,                    \
       opd_i64* hist_num_runs, opd_i64* counts, opd_i64 n, opd_i64 runs, opd_i64 threshold, opd_i64 smem_rows,        \
       const void* run_0, const void* run_1, const void* run_2, const void* run_3, const void* run_4,                 \
       const void* run_5, const void* run_6, const void* run_7, const void* run_8, const void* run_9,                 \
       const void* run_10, const void* run_11, const void* run_12, const void* run_13, const void* run_14,            \
       const void* run_15) {                                                                                          \
    const Arguments arguments = {base, dtypes, hist_base, hist_changed, both, hist_num_runs, counts, n, (int)runs,    \
                                 (opd_u32)threshold, (int)smem_rows,                                                  \
                                 {run_0, run_1, run_2, run_3, run_4, run_5, run_6, run_7, run_8, run_9, run_10,       \
                                  run_11, run_12, run_13, run_14, run_15}};                                           \
    body;                                                                                                             \
  }                                                                                                                   \
  OPD_LAUNCHER(name)

// A bf16 base and two to four bf16 runs; all rows are in shared memory.
OPD_OVERLAP_KERNEL(overlap_count_bf16_2, OPD_BF16_THREADS, (count<2, OPD_BF16_STEP>(arguments)))
OPD_OVERLAP_KERNEL(overlap_count_bf16_3, OPD_BF16_THREADS, (count<3, OPD_BF16_STEP>(arguments)))
OPD_OVERLAP_KERNEL(overlap_count_bf16_4, OPD_BF16_THREADS, (count<4, OPD_BF16_STEP>(arguments)))
// The others.
OPD_OVERLAP_KERNEL(overlap_count, OPD_MIXED_THREADS, (count<0, OPD_MIXED_STEP>(arguments)))
