// `overlap` over threads: each counts its range in its own tables, which are then added to the caller's int64 tables.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "../common/cpu/boundary.h"
#include "../common/cpu/fold.h"
#include "../common/cpu/parallel.h"
#include "cpu.h"

namespace {
constexpr int64_t FOLD_AFTER = int64_t(1) << 30;  // coordinates a thread counts before its 32-bit counters are folded
struct ThreadWork {
  OverlapWork work{};
  int n_groups = 0;
  ThreadWork() = default;
  ThreadWork(const ThreadWork&) = delete;
  ~ThreadWork() { std::free(work.groups); }
  void reserve_groups(int runs) {
    int n = (runs + 3) / 4;
    if (n <= n_groups) return;
    // Pages are allocated on first use.
    auto fresh = (opd_u32*)std::calloc((size_t)n * OPD_GROUP_BINS, sizeof(opd_u32));
    if (!fresh) throw std::bad_alloc();
    std::free(work.groups);  // empty between calls
    work.groups = fresh;
    n_groups = n;
  }
};

void add_set(opd_u32 set, int64_t count, int runs, int64_t* both, int64_t* hist_num_runs) {
  hist_num_runs[__builtin_popcount(set)] += count;
  for (int a = 0; a < runs; a++)
    for (int b = 0; b < runs; b++)
      if (set >> a & set >> b & 1) both[a * runs + b] += count;
}

void fold(OverlapWork& work, int runs, int64_t* hist_base, int64_t* hist_changed, int64_t* both,
          int64_t* hist_num_runs) {
  int64_t sets[OPD_GROUP_SETS] = {};
  auto add = [&](opd_u32 set, int bin, opd_u32 count, int first_run) {
    if (first_run == 0) hist_base[bin] += count;
    for (int r = 0; set >> r; r++)
      if (set >> r & 1) hist_changed[int64_t(first_run + r) * OPD_BINS + bin] += count;
    sets[set] += count;
  };
  if (runs == 2) drain(work.two, 65536, [&](int i, opd_u32 count) { add(i >> 14, i & 0x3FFF, count, 0); });
  if (work.groups_used)
    for (int first = 0; first < runs; first += OPD_GROUP) {
      int classes = 1 << (runs - first < OPD_GROUP ? runs - first : OPD_GROUP);
      drain(work.groups + first / OPD_GROUP * OPD_GROUP_BINS, classes * OPD_BINS,
            [&](int i, opd_u32 count) { add(i >> 15, i & 0x7FFF, count, first); });
    }
  work.groups_used = false;
  if (runs <= OPD_GROUP)
    for (opd_u32 set = 0; set < OPD_GROUP_SETS; set++) {
      if (sets[set]) add_set(set, sets[set], runs, both, hist_num_runs);
    }
  else
    drain(work.sets, 65536, [&](int set, opd_u32 count) { add_set(set, count, runs, both, hist_num_runs); });
}

std::mutex lock;  // one call at a time uses the tables of the threads
std::vector<std::unique_ptr<ThreadWork>> workers;
}  // namespace

void overlap(const void* base, int base_dtype, const void* const* trained, const int* trained_dtypes, int runs,
             int64_t n, int threshold_bits, int threads, int64_t* hist_base, int64_t* hist_changed, int64_t* both,
             int64_t* hist_num_runs, int64_t* counts) {
  std::lock_guard<std::mutex> hold(lock);
  const OverlapKernels& kernels = OPD_KERNELS(overlap_kernels);
  threads = threads_for(n, threads);
  while ((int)workers.size() < threads) workers.emplace_back(new ThreadWork());
  for (int t = 0; t < threads; t++) workers[t]->reserve_groups(runs);
  for (int64_t from = 0; from < n; from += FOLD_AFTER * threads) {
    int64_t size = n - from < FOLD_AFTER * threads ? n - from : FOLD_AFTER * threads;
    parallel_ranges(size, threads, 8, [&](int t, int64_t start, int64_t stop) {
      const void* v[OPD_MAX_RUNS];
      for (int r = 0; r < runs; r++) v[r] = (const char*)trained[r] + (from + start) * element_bytes(trained_dtypes[r]);
      kernels.count((const char*)base + (from + start) * element_bytes(base_dtype), base_dtype, v,
                    trained_dtypes, runs, stop - start, (opd_u32)threshold_bits, &workers[t]->work);
    });
    counts[OVERLAP_COUNT_NUMEL] += size;
    for (int t = 0; t < threads; t++) {
      OverlapWork& work = workers[t]->work;
      fold(work, runs, hist_base, hist_changed, both, hist_num_runs);
      counts[OVERLAP_COUNT_NONFINITE] += work.nonfinite;
      work.nonfinite = 0;
    }
  }
}

// trained: [runs] addresses of [n] elements; trained_dtypes: [runs]; the others as for `overlap`.
OPD_EXPORT int opd_overlap(const void* base, int64_t base_dtype, const int64_t* trained, const int64_t* trained_dtypes,
                           int64_t runs, int64_t n, int64_t threshold_bits, int64_t threads, int64_t* hist_base,
                           int64_t* hist_changed, int64_t* both, int64_t* hist_num_runs, int64_t* counts) {
  return guarded([&] {
    require(runs >= 1 && runs <= OPD_MAX_RUNS, "1 to 16 runs, each with its dtype");
    require(threshold_bits >= 0 && threshold_bits < OPD_BINS, "threshold_bits must be a bf16 magnitude");
    require(hist_base && hist_changed && both && hist_num_runs && counts, "outputs must not be null");
    const void* addresses[OPD_MAX_RUNS];
    int dtypes[OPD_MAX_RUNS];
    for (int64_t r = 0; r < runs; r++) {
      addresses[r] = (const void*)(uintptr_t)trained[r];
      require_dtypes(base_dtype, trained_dtypes[r]);
      dtypes[r] = (int)trained_dtypes[r];
      require_size(n, base && addresses[r]);
      require_aligned(base, element_bytes((int)base_dtype));
      require_aligned(addresses[r], element_bytes(dtypes[r]));
    }
    overlap(base, (int)base_dtype, addresses, dtypes, (int)runs, n, (int)threshold_bits, narrow(threads), hist_base,
            hist_changed, both, hist_num_runs, counts);
  });
}
