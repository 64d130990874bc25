// `patch` with threads: blocks are independent. Each thread gathers its range into the memory that the range needs at
// most; then the ranges are moved together, so the result does not depend on the number of threads.
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../common/cpu/boundary.h"
#include "../common/cpu/parallel.h"
#include "cpu.h"

namespace {
int block_size(int64_t n, int64_t block) {
  const int64_t left = n - block * OPD_PATCH_BLOCK;
  return (int)(left < OPD_PATCH_BLOCK ? left : OPD_PATCH_BLOCK);
}

int64_t blocks_of(int64_t n) { return (n + OPD_PATCH_BLOCK - 1) / OPD_PATCH_BLOCK; }

// Lowers `bad` to an invalid block; -1 means none.
void note_bad(std::atomic<int64_t>& bad, int64_t block) {
  int64_t before = bad.load();
  while ((before < 0 || block < before) && !bad.compare_exchange_weak(before, block)) {}
}

// Computes where the positions and values of each block begin, and at the end the totals. Returns -1, or the first
// block with an impossible count.
int64_t find_starts(const int32_t* counts, int64_t n, std::vector<int64_t>& positions, std::vector<int64_t>& values) {
  const int64_t blocks = blocks_of(n);
  positions.assign((size_t)blocks + 1, 0);
  values.assign((size_t)blocks + 1, 0);
  for (int64_t b = 0; b < blocks; b++) {
    const int m = block_size(n, b), count = counts[b];
    if (count < 0 || count > m) return b;
    positions[b + 1] = positions[b] + patch_position_bytes(count, m);
    values[b + 1] = values[b] + count;
  }
  return -1;
}
}  // namespace

void patch_gather(const void* base, const void* trained, int bytes, int64_t n, bool difference, int threads,
                  int32_t* counts, unsigned char* positions, void* values, uint64_t* digests) {
  const int64_t blocks = blocks_of(n);
  struct Range { int64_t start = 0, blocks = 0; };
  const PatchKernels& kernels = OPD_KERNELS(patch_kernels);
  std::vector<Range> ranges((size_t)threads_for(n, threads));
  opd_u64* digest = (opd_u64*)digests;
  parallel_ranges(n, threads, OPD_PATCH_BLOCK, [&](int t, int64_t start, int64_t stop) {
    const int64_t first = start / OPD_PATCH_BLOCK, last = blocks_of(stop);
    ranges[(size_t)t] = {start, last - first};
    unsigned char* to_positions = positions + start / 8;
    char* to_values = (char*)values + start * bytes;
    for (int64_t b = first; b < last; b++) {
      const int m = block_size(n, b);
      const int64_t at = b * OPD_PATCH_BLOCK * bytes;
      counts[b] = kernels.gather((const char*)base + at, (const char*)trained + at, bytes, m, difference,
                                 to_positions, to_values, digest + 2 * b, digest + 2 * (blocks + b));
      to_positions += patch_position_bytes(counts[b], m);
      to_values += (int64_t)counts[b] * bytes;
    }
  });
  int64_t position = 0, value = 0;
  for (const Range& range : ranges) {
    const int64_t first = range.start / OPD_PATCH_BLOCK;
    int64_t range_positions = 0, range_values = 0;
    for (int64_t b = first; b < first + range.blocks; b++) {
      range_positions += patch_position_bytes(counts[b], block_size(n, b));
      range_values += counts[b];
    }
    if (position != range.start / 8)
      std::memmove(positions + position, positions + range.start / 8, (size_t)range_positions);
    if (value != range.start)
      std::memmove((char*)values + value * bytes, (char*)values + range.start * bytes, (size_t)(range_values * bytes));
    position += range_positions;
    value += range_values;
  }
}

int64_t patch_check(const int32_t* counts, const unsigned char* positions, int64_t position_bytes, int64_t n,
                    int64_t n_values, int threads) {
  std::vector<int64_t> position, value;
  const int64_t impossible = find_starts(counts, n, position, value);
  if (impossible >= 0) return impossible;
  if (position.back() != position_bytes || value.back() != n_values) return blocks_of(n);
  std::atomic<int64_t> bad{-1};
  const PatchKernels& kernels = OPD_KERNELS(patch_kernels);
  parallel_ranges(n, threads, OPD_PATCH_BLOCK, [&](int, int64_t start, int64_t stop) {
    for (int64_t b = start / OPD_PATCH_BLOCK; b < blocks_of(stop); b++) {
      const int count = (int)(value[b + 1] - value[b]);
      if (!kernels.check(positions + position[b], count, block_size(n, b))) note_bad(bad, b);
    }
  });
  return bad;
}

int64_t patch_scatter(const void* base, int bytes, int64_t n, bool difference, const int32_t* counts,
                      const unsigned char* positions, int64_t position_bytes, const void* values, int64_t n_values,
                      int threads, void* out, uint64_t* digests) {
  // Addresses are computed from these checked copies, so a concurrent change of `counts` has no effect.
  std::vector<int64_t> position, value;
  const int64_t impossible = find_starts(counts, n, position, value);
  if (impossible >= 0) return impossible;
  if (position.back() != position_bytes || value.back() != n_values) return blocks_of(n);
  std::atomic<int64_t> bad{-1};
  const PatchKernels& kernels = OPD_KERNELS(patch_kernels);
  parallel_ranges(n, threads, OPD_PATCH_BLOCK, [&](int, int64_t start, int64_t stop) {
    for (int64_t b = start / OPD_PATCH_BLOCK; b < blocks_of(stop); b++) {
      const int64_t at = b * OPD_PATCH_BLOCK * bytes;
      const int count = (int)(value[b + 1] - value[b]);
      const int done = kernels.scatter((const char*)base + at, bytes, block_size(n, b), difference, count,
                                       positions + position[b], (const char*)values + value[b] * bytes,
                                       n_values - value[b], (char*)out + at, (opd_u64*)digests + 2 * b);
      if (!done) note_bad(bad, b);
    }
  });
  return bad;
}

void patch_digest(const void* data, int bytes, int64_t n, int threads, uint64_t* digests) {
  const PatchKernels& kernels = OPD_KERNELS(patch_kernels);
  parallel_ranges(n, threads, OPD_PATCH_BLOCK, [&](int, int64_t start, int64_t stop) {
    for (int64_t b = start / OPD_PATCH_BLOCK; b < blocks_of(stop); b++)
      kernels.digest((const char*)data + b * OPD_PATCH_BLOCK * bytes, block_size(n, b) * bytes,
                     (opd_u64*)digests + 2 * b);
  });
}

namespace {
void require_width(int64_t bytes, int64_t n, std::initializer_list<const void*> addresses) {
  require(bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8, "coordinates must have 1, 2, 4 or 8 bytes");
  for (const void* address : addresses) {
    require_size(n, address != nullptr);
    require_aligned(address, bytes);
  }
}
}  // namespace

OPD_EXPORT int opd_patch_gather(const void* base, const void* trained, int64_t bytes, int64_t n, int64_t difference,
                                int64_t threads, int32_t* counts, unsigned char* positions, void* values,
                                uint64_t* digests) {
  return guarded([&] {
    require_width(bytes, n, {base, trained, values});
    require(n == 0 || (counts && positions && digests), "outputs must not be null");
    patch_gather(base, trained, (int)bytes, n, difference != 0, narrow(threads), counts, positions, values, digests);
  });
}

// result: what `patch_check` returns, [1].
OPD_EXPORT int opd_patch_check(const int32_t* counts, const unsigned char* positions, int64_t position_bytes,
                               int64_t n, int64_t n_values, int64_t threads, int64_t* result) {
  return guarded([&] {
    require_size(n, counts != nullptr);
    require_size(position_bytes, positions != nullptr);
    require(n_values >= 0, "the number of values must not be negative");
    *result = patch_check(counts, positions, position_bytes, n, n_values, narrow(threads));
  });
}

// result: what `patch_scatter` returns, [1].
OPD_EXPORT int opd_patch_scatter(const void* base, int64_t bytes, int64_t n, int64_t difference, const int32_t* counts,
                                 const unsigned char* positions, int64_t position_bytes, const void* values,
                                 int64_t n_values, int64_t threads, void* out, uint64_t* digests, int64_t* result) {
  return guarded([&] {
    require_width(bytes, n, {base, out});
    require_width(bytes, n_values, {values});
    require_size(position_bytes, positions != nullptr);
    require(n == 0 || (counts && digests), "counts and digests must not be null");
    *result = patch_scatter(base, (int)bytes, n, difference != 0, counts, positions, position_bytes, values, n_values,
                            narrow(threads), out, digests);
  });
}

OPD_EXPORT int opd_patch_digest(const void* data, int64_t bytes, int64_t n, int64_t threads, uint64_t* digests) {
  return guarded([&] {
    require_width(bytes, n, {data});
    require(n == 0 || digests, "digests must not be null");
    patch_digest(data, (int)bytes, n, narrow(threads), digests);
  });
}
