// CPU loops of `overlap`. Included once per instruction set.
//
// The |w| of a coordinate and the set of runs that changed it form one table index, so that one increment counts
// everything. Sets of four runs fit a table; more runs take one table per four, and a table of all sets without |w|.
#include "cpu.h"

namespace OPD_ISA {
#define OPD_OVERLAP_BLOCK 1024
#define OPD_OVERLAP_CHUNK 32    // coordinates that are indexed, then as many counted
#define OPD_OVERLAP_AHEAD 1024  // prefetch distance, in coordinates

typedef opd_u32 opd_pair __attribute__((aligned(2), may_alias));  // two adjacent bfloat16: no widening, no shuffles

static void count_indices(const opd_u16* index, int n, opd_u32* table) {
  for (int i = 0; i < n; i += 4) {
    opd_u64 four;
    __builtin_memcpy(&four, index + i, 8);
    table[four & 0xFFFF]++;
    table[(four >> 16) & 0xFFFF]++;
    table[(four >> 32) & 0xFFFF]++;
    table[four >> 48]++;
  }
}

// Two runs, |w| < 2: 14 bits of |w| and two change bits fit 16 bits. Computes the indices of a block and meanwhile
// counts those of the block before (`ready`): vector units, scalar increments and memory work at the same time. Returns
// nonzero if the indices are not valid: some |w| reaches 2, or some difference does, which then may not be finite.
static opd_u32 index_two(const opd_u16* base, const opd_u16* first, const opd_u16* second, opd_u32 limit,
                         opd_u16* index, const opd_u16* ready, opd_u32* table) {
  const opd_u32 last = limit - 1, upper = 0xFFFF0000u, magnitude = 0x7FFFFFFFu;
  opd_u32 wide[OPD_OVERLAP_CHUNK / 2] = {}, large[OPD_OVERLAP_CHUNK / 2] = {};
  for (int start = 0; start < OPD_OVERLAP_BLOCK; start += OPD_OVERLAP_CHUNK) {
    const opd_pair *w = (const opd_pair*)(base + start), *a = (const opd_pair*)(first + start);
    const opd_pair* b = (const opd_pair*)(second + start);
    opd_pair* out = (opd_pair*)(index + start);
    __builtin_prefetch(base + start + OPD_OVERLAP_AHEAD);
    __builtin_prefetch(first + start + OPD_OVERLAP_AHEAD);
    __builtin_prefetch(second + start + OPD_OVERLAP_AHEAD);
    OPD_SIMD()
    for (int i = 0; i < OPD_OVERLAP_CHUNK / 2; i++) {
      opd_u32 x = w[i], y = a[i], z = b[i];
      opd_u32 a0 = float_bits(bits_float(y << 16) - bits_float(x << 16)) & magnitude;
      opd_u32 a1 = float_bits(bits_float(y & upper) - bits_float(x & upper)) & magnitude;
      opd_u32 b0 = float_bits(bits_float(z << 16) - bits_float(x << 16)) & magnitude;
      opd_u32 b1 = float_bits(bits_float(z & upper) - bits_float(x & upper)) & magnitude;
      // The sign of last - difference is the change bit.
      out[i] = (x & 0x3FFF3FFFu) | ((last - a0) >> 17 & 0x4000u) | ((last - a1) >> 1 & 0x40000000u) |
               ((last - b0) >> 16 & 0x8000u) | ((last - b1) & 0x80000000u);
      wide[i] |= x;
      large[i] |= a0 | a1 | b0 | b1;
    }
    if (ready) count_indices(ready + start, OPD_OVERLAP_CHUNK, table);
  }
  opd_u32 any_wide = 0, any_large = 0;
  for (int i = 0; i < OPD_OVERLAP_CHUNK / 2; i++) { any_wide |= wide[i]; any_large |= large[i]; }
  return (any_wide & 0x40004000u) | (any_large & 0x40000000u);
}

// Marks the changes of run r; returns nonzero if a difference reaches 2 and so may not be finite.
static opd_u32 mark_changed(const opd_u16* w, const opd_u16* v, int n, opd_u32 limit, int r, opd_u16* changed_in) {
  opd_u32 large = 0;
  OPD_SIMD(reduction(| : large))
  for (int i = 0; i < n; i++) {
    opd_u32 d = difference_bits(w[i], v[i]);
    large |= d;
    changed_in[i] |= (opd_u16)((opd_u32)(d >= limit) << r);
  }
  return large & 0x40000000u;
}

static void count_runs(const opd_u16* w, const opd_u16* const* v, int runs, int n, opd_u32 limit, OverlapWork& work) {
  opd_u16 changed_in[OPD_OVERLAP_BLOCK], finite_w[OPD_OVERLAP_BLOCK];
  opd_u32 index[OPD_OVERLAP_BLOCK], large = 0;
  __builtin_memset(changed_in, 0, sizeof(opd_u16) * n);
  for (int r = 0; r < runs; r++) large |= mark_changed(w, v[r], n, limit, r, changed_in);
  if (large) {
    int k = 0;
    for (int i = 0; i < n; i++) {
      int finite = 1;
      for (int r = 0; r < runs; r++) finite &= difference_finite(difference_bits(w[i], v[r][i]));
      finite_w[k] = w[i];
      changed_in[k] = changed_in[i];
      k += finite;
    }
    work.nonfinite += n - k;
    w = finite_w;
    n = k;
  }
  for (int group = 0; group * OPD_GROUP < runs; group++) {
    opd_u32* table = work.groups + group * OPD_GROUP_BINS;
    OPD_SIMD()
    for (int i = 0; i < n; i++) {
      const opd_u32 set = (opd_u32)changed_in[i] >> OPD_GROUP * group & (OPD_GROUP_SETS - 1);
      index[i] = set << 15 | (w[i] & 0x7FFFu);
    }
    for (int i = 0; i < n; i++) table[index[i]]++;
  }
  if (runs > OPD_GROUP)
    for (int i = 0; i < n; i++) work.sets[changed_in[i]]++;
  work.groups_used = true;
}

// bfloat16 bits of [start, start + n): the data themselves, or their rounding in `scratch` (a double is rounded to
// float first, as in torch).
static const opd_u16* bf16_bits(const void* data, int dtype, opd_i64 start, int n, opd_u16* scratch) {
  if (dtype == BF16) return (const opd_u16*)data + start;
  if (dtype == FP16) {
    const opd_u16* p = (const opd_u16*)data + start;
    OPD_SIMD() for (int i = 0; i < n; i++) scratch[i] = float_to_bf16(fp16_to_float(p[i]));
  } else if (dtype == FP32) {
    const float* p = (const float*)data + start;
    OPD_SIMD() for (int i = 0; i < n; i++) scratch[i] = float_to_bf16(p[i]);
  } else {
    const double* p = (const double*)data + start;
    OPD_SIMD() for (int i = 0; i < n; i++) scratch[i] = float_to_bf16((float)p[i]);
  }
  return scratch;
}

static const opd_u16* fill(const opd_u16* from, int n, opd_u16* to) {
  __builtin_memcpy(to, from, sizeof(opd_u16) * n);
  __builtin_memset(to + n, 0, sizeof(opd_u16) * (OPD_OVERLAP_BLOCK - n));
  return to;
}

static void overlap(const void* base, int base_dtype, const void* const* trained, const int* trained_dtypes, int runs,
                    opd_i64 n, opd_u32 threshold_bits, OverlapWork* work) {
  static thread_local opd_u16 scratch[OPD_MAX_RUNS + 1][OPD_OVERLAP_BLOCK], index[2][OPD_OVERLAP_BLOCK];
  static thread_local opd_u16 padded[3][OPD_OVERLAP_BLOCK];
  const opd_u32 limit = change_limit(threshold_bits);
  opd_u16 *ready = nullptr, *next = index[0];
  for (opd_i64 start = 0; start < n; start += OPD_OVERLAP_BLOCK) {
    const int m = n - start < OPD_OVERLAP_BLOCK ? (int)(n - start) : OPD_OVERLAP_BLOCK;
    const opd_u16 *w = bf16_bits(base, base_dtype, start, m, scratch[OPD_MAX_RUNS]), *v[OPD_MAX_RUNS];
    for (int r = 0; r < runs; r++) v[r] = bf16_bits(trained[r], trained_dtypes[r], start, m, scratch[r]);
    if (runs == 2) {
      const opd_u16 *block_w = w, *block_v[2] = {v[0], v[1]};
      if (m < OPD_OVERLAP_BLOCK) {                   // padded with zeros that no run changed, subtracted below
        block_w = fill(w, m, padded[0]);
        for (int r = 0; r < 2; r++) block_v[r] = fill(v[r], m, padded[r + 1]);
      }
      const opd_u32 out_of_range = index_two(block_w, block_v[0], block_v[1], limit, next, ready, work->two);
      ready = out_of_range ? nullptr : next;
      next = index[next == index[0]];
      if (!out_of_range) {
        work->two[0] -= OPD_OVERLAP_BLOCK - m;
        continue;
      }
    }
    count_runs(w, v, runs, m, limit, *work);
  }
  if (ready) count_indices(ready, OPD_OVERLAP_BLOCK, work->two);
}

const OverlapKernels overlap_kernels = {overlap};
}  // namespace OPD_ISA
