// `delta` of a bf16 pair, for devices whose shared memory holds all tables of a block. (`count_pair` of cuda.cu is for
// the others.)
//
// Every coordinate increments one table, that of |w|. If its bits changed, it is queued, and increments four more: of
// ULP distances, of stored |delta|, of |w'|, and of |w| by class. `fold_bins` derives everything else. The visible
// |delta| of nearly all changes has the upper 16 bits of the stored one, whose lower 16 bits are zero: HIST_DELTA, the
// counts below thresholds and the maximum are then sums over HIST_DELTA_STORED. The few others are counted in
// WORK_ROUNDED_UP and WORK_REACHED (`count_other_change`).
//
// The common path takes magnitudes from 2^-31 to below 2: bits 12 to 14 are 011, and the bits themselves, shifted, are
// the index of a bin. All others, and indices from n on, are counted by `count_other_bases` and `count_other_change`.
//
// Most changes are powers of two, whose bins are multiples of 128, all in one bank: the tables over stored |delta| have
// an unused element after every 128 bins ("padded").
#define OPD_PAIR_STEP 16  // coordinates of either tensor that a thread takes per step
#define OPD_PADDED_BINS (OPD_SMEM_BINS + OPD_SMEM_BINS / 128)

// Offsets in a block's shared memory, in bytes.
enum PairOffset {
  PAIR_LANES,  // ULP distances, one column per lane
  PAIR_TOTALS = PAIR_LANES + 4 * OPD_ULP_BINS * OPD_WARP,  // of `enum PairTotal`
  PAIR_USED = PAIR_TOTALS + 32,  // bits of exponents
  PAIR_BASE = PAIR_USED + 32,
  PAIR_STORED = PAIR_BASE + 4 * OPD_SMEM_BINS,  // padded
  PAIR_CLASS_ROWS = PAIR_STORED + 4 * OPD_PADDED_BINS,  // padded: the row of PAIR_CLASSES for each stored |delta|
  PAIR_TRAINED = PAIR_CLASS_ROWS + 4 * OPD_PADDED_BINS,
  PAIR_CLASSES = PAIR_TRAINED + 4 * OPD_SMEM_BINS  // |w| of changes, one row per class; then one queue per warp
};
#define OPD_PAIR_QUEUE_BYTES (4 * (OPD_QUEUE_REST + OPD_WARP * OPD_PAIR_STEP))
#define OPD_PADDED_BIN_0(table) (table - 4 * (OPD_SMEM_FIRST_BIN + OPD_SMEM_FIRST_BIN / 128))

enum PairTotal { TOTAL_NONFINITE, TOTAL_NONFINITE_CHANGED, TOTAL_SIGN_OF_ZERO, TOTAL_ZERO, TOTAL_CHANGED, IS_LAST };

// Counts of one thread off the common path.
struct OtherCounts {
  opd_u32 nonfinite, nonfinite_changed, sign_of_zero, zero, largest;
};

struct PairCounter {
  SharedAddress base, lane_base, queue;  // of shared memory, of this lane's column of PAIR_LANES, of this warp's queue
  opd_u32* used;
  const Arguments& arguments;
  OtherCounts other;
};

__device__ __forceinline__ void add_work(const PairCounter& counter, int row, opd_u32 bin, opd_u32 count) {
  atomicAdd(counter.arguments.workspace + AT_WORK + row * OPD_BINS + bin, count);
  mark_used(counter.used, bin);
}

// The class of a visible |delta| that is not zero: how many thresholds it exceeds.
__device__ __forceinline__ opd_u32 exceeded(const Arguments& arguments, opd_u32 visible) {
  opd_u32 thresholds = 0;
#pragma unroll
  for (int k = 0; k < OPD_MAX_VISIBLE_THRESHOLDS; k++) thresholds += visible > arguments.threshold(k);
  return thresholds;
}

// Counts a coordinate whose bits changed: w in the lower half of `both`, v in the upper, any bits.
__device__ __forceinline__ void count_other_change(PairCounter& counter, opd_u32 both) {
  const opd_u16 w = (opd_u16)both, v = (opd_u16)(both >> 16);
  const opd_u32 abs_w = w & 0x7FFFu, abs_v = v & 0x7FFFu;
  if (!coordinate_finite(w, v)) {
    counter.other.nonfinite++;
    counter.other.nonfinite_changed++;
    // |w| has been counted if it is finite.
    if (abs_w == 0) counter.other.zero--;
    else if (abs_w < OPD_INFINITY_BITS) add_work(counter, WORK_BASE, abs_w, ~0u);
    return;
  }
  shared_increment<PAIR_LANES>(counter.lane_base + ulp_bin(w, v) * (4 * OPD_WARP));
  const opd_u32 abs_delta = magnitude_bits(bf16_to_float(v) - bf16_to_float(w));
  if (!abs_delta) {
    counter.other.sign_of_zero++;
    return;
  }
  const opd_u32 top = abs_delta >> 16, low = abs_delta & 0xFFFFu, visible = visible_delta(w, v);
  if (low) {
    opd_i64* low_sums = (opd_i64*)(counter.arguments.workspace + AT_LOW_SUMS) + top;
    add_count(low_sums, low);
    add_count(low_sums + OPD_BINS, (opd_i64)low * low);
    counter.other.largest = abs_delta > counter.other.largest ? abs_delta : counter.other.largest;
    if (visible != top) {
      add_work(counter, WORK_ROUNDED_UP, top, 1);
      mark_used(counter.used, top + 1);
    }
#pragma unroll
    for (int k = 0; k < OPD_LIMITS; k++) {
      const opd_u32 limit = (opd_u32)counter.arguments.limits[k];
      if (limit >> 16 == top && (limit & 0xFFFFu) && abs_delta >= limit)
        atomicAdd(counter.arguments.workspace + AT_WORK + WORK_REACHED * OPD_BINS + k, 1u);
    }
  }
  if (is_in_smem(top)) shared_increment<OPD_PADDED_BIN_0(PAIR_STORED)>(counter.base + 4 * (top + top / 128));
  else add_work(counter, WORK_STORED, top, 1);
  if (is_in_smem(abs_v)) shared_increment<OPD_BIN_0(PAIR_TRAINED)>(counter.base + 4 * abs_v);
  else add_work(counter, WORK_TRAINED, abs_v, 1);
  const opd_u32 row = exceeded(counter.arguments, visible);
  if (is_in_smem(abs_w))
    shared_increment<OPD_BIN_0(PAIR_CLASSES)>(counter.base + 4 * (row * OPD_SMEM_BINS + abs_w));
  else add_work(counter, WORK_VISIBLE + row, abs_w, 1);
}

// Counts a coordinate whose bits changed: w in the lower half of `both`, v in the upper.
__device__ __forceinline__ void count_change(PairCounter& counter, opd_u32 both) {
  const opd_u32 delta = float_bits(bits_float(both & 0xFFFF0000u) - bits_float(both << 16));
  // w, v and delta from 2^-31 to below 2, and no lower bits of delta
  if (((both & 0x70007000u) ^ 0x30003000u) | ((delta & 0x7000FFFFu) ^ 0x30000000u)) {
    OPD_RARE(count_other_change(counter, both));
    return;
  }
  const opd_u32 magnitudes = both & 0x7FFF7FFFu, abs_delta = delta & 0x7FFFFFFFu, signs = sign_masks(both);
  // v - w in steps: the magnitudes with their signs, ~m + 1 being -m, from the middle of the bins on.
  const int steps_of_magnitudes = dot_halves((int)(magnitudes ^ signs), 0x01FF, OPD_ULP_BINS / 2);
  const int bin = clamp_to(dot_halves((int)signs, 0xFF01, steps_of_magnitudes), OPD_ULP_BINS - 1);
  shared_increment<PAIR_LANES>(counter.lane_base + bin * (4 * OPD_WARP));
  const SharedAddress at = counter.base + ((abs_delta >> 14) + (abs_delta >> 23) * 4);
  shared_increment<OPD_PADDED_BIN_0(PAIR_STORED)>(at);
  const opd_u32 row = shared_load<OPD_PADDED_BIN_0(PAIR_CLASS_ROWS)>(at);
  shared_increment<OPD_BIN_0(PAIR_TRAINED)>(counter.base + (magnitudes >> 14));
  shared_increment<OPD_BIN_0(PAIR_CLASSES)>(element_of_lower(loaded_address(counter.base, row), magnitudes));
}

// Counts |w| of the coordinates of a step, of any bits; `left` and `left_of_second`: how many exist of either vector.
__device__ __forceinline__ void count_other_bases(PairCounter& counter, const opd_u32* a, const opd_u32* b,
                                                  opd_i64 left, opd_i64 left_of_second) {
#pragma unroll
  for (int j = 0; j < OPD_PAIR_STEP; j++) {
    const opd_u32 w = a[j / 2] >> 16 * (j & 1) & 0xFFFFu, v = b[j / 2] >> 16 * (j & 1) & 0xFFFFu;
    const opd_u32 abs_w = w & 0x7FFFu;
    if (j % 8 >= (j < 8 ? left : left_of_second)) continue;
    if (abs_w >= OPD_INFINITY_BITS) counter.other.nonfinite += w == v;
    else if (abs_w == 0) counter.other.zero++;
    else if (is_in_smem(abs_w)) shared_increment<OPD_BIN_0(PAIR_BASE)>(counter.base + 4 * abs_w);
    else add_work(counter, WORK_BASE, abs_w, 1);
  }
}

// One byte of the mask: the coordinates of one vector.
__device__ __forceinline__ opd_u32 mask_byte(const opd_u32* a, const opd_u32* b, opd_u32 threshold) {
  opd_u32 bits = 0;
  for (int j = 0; j < 8; j++) {
    const opd_u16 w = (opd_u16)(a[j >> 1] >> 16 * (j & 1)), v = (opd_u16)(b[j >> 1] >> 16 * (j & 1));
    bits |= (opd_u32)(w != v && coordinate_finite(w, v) && visible_delta(w, v) > threshold) << j;
  }
  return bits;
}

__device__ __forceinline__ void count_pair_in_smem(const Arguments& arguments) {
  const void *base = arguments.base, *trained = arguments.trained;
  const opd_i64 n = arguments.n;
  opd_u8* mask = arguments.mask;
  OPD_DYNAMIC_SHARED(shared);
  const opd_u32 lane = threadIdx.x % OPD_WARP, warp = threadIdx.x / OPD_WARP;
  const int queues = PAIR_CLASSES + 4 * OPD_SMEM_BINS * arguments.smem_tables;
  for (int i = threadIdx.x; i < queues / 4; i += blockDim.x) ((opd_u32*)shared)[i] = 0;
  __syncthreads();
  const SharedAddress begin = shared_address(shared);
  opd_u32* used = (opd_u32*)(shared + PAIR_USED);
  PairCounter counter = {begin, begin + 4 * lane, begin + queues + warp * OPD_PAIR_QUEUE_BYTES, used, arguments, {}};
  for (int bin = threadIdx.x; bin < OPD_SMEM_BINS; bin += blockDim.x)
    ((opd_u32*)(shared + PAIR_CLASS_ROWS))[bin + bin / 128] =
        stored_address(counter.base, exceeded(arguments, OPD_SMEM_FIRST_BIN + bin) * 4 * OPD_SMEM_BINS);
  __syncthreads();

  opd_u32 queued = 0, changed = 0;  // by the warp
  const opd_i64 tile = (opd_i64)blockDim.x * OPD_PAIR_STEP, step = gridDim.x * tile;
  const bool aligned = (((opd_u64)base | (opd_u64)trained) & 15) == 0;
  opd_i64 i = blockIdx.x * tile + warp * (OPD_WARP * OPD_PAIR_STEP) + lane * 8;
  const char *at_base = (const char*)base + 2 * i, *at_trained = (const char*)trained + 2 * i;
  opd_u32 a[OPD_PAIR_STEP / 2], b[OPD_PAIR_STEP / 2], next_a[OPD_PAIR_STEP / 2], next_b[OPD_PAIR_STEP / 2];
  opd_i64 left = n - blockIdx.x * tile;  // coordinates from the first of the tile on
  load_step(at_base, n - i, aligned && left >= tile, a);
  load_step(at_trained, n - i, aligned && left >= tile, b);
  for (; left > 0; left -= step) {
    at_base += 2 * step, at_trained += 2 * step;
    load_step(at_base, n - i - step, aligned && left - step >= tile, next_a);
    load_step(at_trained, n - i - step, aligned && left - step >= tile, next_b);
    // Bits 12 to 15 of a sum are zero for magnitudes from 2^-31 to below 2.
    opd_u32 largest = 0;
#pragma unroll
    for (int k = 0; k < OPD_PAIR_STEP / 2; k++) largest = max_of_sums(a[k] & 0x7FFF7FFFu, 0xD000D000u, largest);
    if (largest & 0xF000F000u) {
      OPD_RARE(count_other_bases(counter, a, b, n - i, n - i - 256));
    } else {
#pragma unroll
      for (int k = 0; k < OPD_PAIR_STEP / 2; k++) {
        const opd_u32 magnitudes = a[k] & 0x7FFF7FFFu;
        shared_increment<OPD_BIN_0(PAIR_BASE)>(element_of_lower(counter.base, magnitudes));
        shared_increment<OPD_BIN_0(PAIR_BASE)>(counter.base + (magnitudes >> 14));
      }
    }
    if (mask) {
      OPD_RARE(for (int h = 0; h < 2; h++) if (i + 256 * h < n)
        mask[(i + 256 * h) >> 3] = (opd_u8)mask_byte(a + 4 * h, b + 4 * h, arguments.threshold(0)));
    }
    opd_u32 bits = 0;  // of changed coordinates: those of lower halves, and from bit 16 on those of upper halves
#pragma unroll
    for (int k = 0; k < OPD_PAIR_STEP / 2; k++) bits += nonzero_halves(a[k] ^ b[k]) << k;
    const opd_u32 appended = append_to_queue<OPD_PAIR_STEP / 2>(counter.queue + 4 * queued, bits, a, b);
    changed += appended;
    queued = drain_queue(counter.queue, queued + appended, [&](opd_u32 both) { count_change(counter, both); });
    i += step;
#pragma unroll
    for (int k = 0; k < OPD_PAIR_STEP / 2; k++) a[k] = next_a[k], b[k] = next_b[k];
  }
  if (lane < queued) count_change(counter, shared_load<0>(counter.queue + 4 * lane));

  const OtherCounts& other = counter.other;
  const opd_u32 warp_totals[] = {warp_sum(other.nonfinite), warp_sum(other.nonfinite_changed),
                                 warp_sum(other.sign_of_zero), warp_sum(other.zero), changed};  // of `enum PairTotal`
  const opd_u32 largest = warp_max(other.largest);
  opd_u32* totals = (opd_u32*)(shared + PAIR_TOTALS);
  if (lane == 0) {
    for (int k = 0; k <= TOTAL_CHANGED; k++) atomicAdd(totals + k, warp_totals[k]);
    if (largest) atomicMax(arguments.maximum, double_bits((double)bits_float(largest)));
  }
  __syncthreads();
  opd_u32* work = arguments.workspace + AT_WORK;
  const opd_u32* classes = (const opd_u32*)(shared + PAIR_CLASSES);
  flush_row((const opd_u32*)(shared + PAIR_BASE), false, work + WORK_BASE * OPD_BINS, used);
  flush_row((const opd_u32*)(shared + PAIR_STORED), true, work + WORK_STORED * OPD_BINS, used);
  flush_row((const opd_u32*)(shared + PAIR_TRAINED), false, work + WORK_TRAINED * OPD_BINS, used);
  for (int row = 0; row < arguments.smem_tables; row++)
    flush_row(classes + row * OPD_SMEM_BINS, false, work + (WORK_VISIBLE + row) * OPD_BINS, used);

  const opd_i64 from_first = n - blockIdx.x * tile, steps = from_first > 0 ? (from_first - 1) / step : 0;
  const opd_i64 of_last = from_first - steps * step;
  const opd_i64 numel = steps * tile + (of_last > tile ? tile : of_last > 0 ? of_last : 0);  // of this block
  const opd_i64 finite = numel - totals[TOTAL_NONFINITE];
  const opd_i64 bits_differ = (opd_i64)totals[TOTAL_CHANGED] - totals[TOTAL_NONFINITE_CHANGED];
  const opd_i64 unchanged = finite - (bits_differ - totals[TOTAL_SIGN_OF_ZERO]);
  opd_i64* counts = arguments.counts;
  for (int k = warp; k < OPD_ULP_BINS; k += blockDim.x / OPD_WARP) {
    const opd_u32 total = warp_sum(((const opd_u32*)(shared + PAIR_LANES))[k * OPD_WARP + lane]);
    if (lane == 0) add_count(counts + COUNT_ULP + k, total + (k == OPD_ULP_BINS / 2 ? finite - bits_differ : 0));
  }
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < OPD_LIMITS; k++)
      if (arguments.limits[k]) add_count(arguments.limit_count(k), unchanged);
    add_count(counts + COUNT_NUMEL, numel);
    add_count(counts + COUNT_NONFINITE, totals[TOTAL_NONFINITE]);
    add_count(counts + COUNT_BIT_EQUAL, numel - totals[TOTAL_CHANGED]);
    // bf16 neighbours are 2^-8 apart, four times the relative tolerance of 1e-3.
    add_count(counts + COUNT_UNCHANGED_RTOL, unchanged);
    add_count(arguments.tables + HIST_DELTA * OPD_BINS, unchanged);
    add_count(arguments.tables + HIST_DELTA_STORED * OPD_BINS, unchanged);
    if (totals[TOTAL_ZERO]) add_work(counter, WORK_BASE, 0, totals[TOTAL_ZERO]);
  }
  __syncthreads();
  fold<FOLD_PAIR_IN_SMEM>(arguments, used, totals + IS_LAST);
}
