// `overlap` over threads: each counts its range into its own tables, then these are folded into the caller's int64 tables.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>

#include "../common/cpu/dispatch.h"
#include "../common/cpu/fold.h"
#include "../common/cpu/parallel.h"

namespace {
constexpr int64_t FOLD_AFTER = int64_t(1) << 30;  // coordinates a thread counts before its 32-bit counters are folded
enum Count { NUMEL, NONFINITE };

struct Worker {
  OverlapWork work{};
  int n_groups = 0;
  Worker() = default;
  Worker(const Worker&) = delete;
  ~Worker() { std::free(work.groups); }
  void make_room(int runs) {
    int wanted = (runs + 3) / 4;
    if (wanted <= n_groups) return;
    auto fresh = (opd_u32*)std::calloc((size_t)wanted * OPD_GROUP_BINS, sizeof(opd_u32));  // pages come when they are touched
    if (!fresh) throw std::bad_alloc();
    std::free(work.groups);  // empty between calls
    work.groups = fresh;
    n_groups = wanted;
  }
};

void add_set(opd_u32 set, int64_t count, int runs, int64_t* both, int64_t* exactly) {
  exactly[__builtin_popcount(set)] += count;
  for (int a = 0; a < runs; a++)
    for (int b = 0; b < runs; b++)
      if (set >> a & set >> b & 1) both[a * runs + b] += count;
}

void fold(OverlapWork& work, int runs, int64_t* source_table, int64_t* changed, int64_t* both, int64_t* exactly) {
  int64_t sets[16] = {};
  auto add = [&](opd_u32 set, int bin, opd_u32 count, int first_run) {
    if (first_run == 0) source_table[bin] += count;
    for (int r = 0; set >> r; r++)
      if (set >> r & 1) changed[int64_t(first_run + r) * OPD_BINS + bin] += count;
    sets[set] += count;
  };
  if (runs == 2) drain(work.two, 65536, [&](int i, opd_u32 count) { add(i >> 14, i & 0x3FFF, count, 0); });
  if (work.groups_used)
    for (int first = 0; first < runs; first += 4) {
      int classes = 1 << (runs - first < 4 ? runs - first : 4);
      drain(work.groups + first / 4 * OPD_GROUP_BINS, classes * OPD_BINS,
            [&](int i, opd_u32 count) { add(i >> 15, i & 0x7FFF, count, first); });
    }
  work.groups_used = false;
  if (runs <= 4)
    for (opd_u32 set = 0; set < 16; set++) { if (sets[set]) add_set(set, sets[set], runs, both, exactly); }
  else
    drain(work.sets, 65536, [&](int set, opd_u32 count) { add_set(set, count, runs, both, exactly); });
}

std::mutex lock;  // one call at a time owns the tables of the threads
std::vector<std::unique_ptr<Worker>> workers;
}  // namespace

void overlap(const void* source, int source_dtype, const std::vector<const void*>& trained, const std::vector<int>& trained_dtypes,
             int64_t n, int cut, int threads, int64_t* source_table, int64_t* changed, int64_t* both, int64_t* exactly, int64_t* counts) {
  std::lock_guard<std::mutex> hold(lock);
  const int runs = (int)trained.size();
  threads = threads_for(n, threads);
  while ((int)workers.size() < threads) workers.emplace_back(new Worker());
  for (int t = 0; t < threads; t++) workers[t]->make_room(runs);
  for (int64_t from = 0; from < n; from += FOLD_AFTER * threads) {
    int64_t part = n - from < FOLD_AFTER * threads ? n - from : FOLD_AFTER * threads;
    parallel_ranges(part, threads, 8, [&](int t, int64_t start, int64_t stop) {
      const void* v[OPD_MAX_RUNS];
      for (int r = 0; r < runs; r++) v[r] = (const char*)trained[r] + (from + start) * element_bytes(trained_dtypes[r]);
      kernels().overlap((const char*)source + (from + start) * element_bytes(source_dtype), source_dtype, v, trained_dtypes.data(), runs,
                        stop - start, (opd_u32)cut, &workers[t]->work);
    });
    counts[NUMEL] += part;
    for (int t = 0; t < threads; t++) {
      OverlapWork& work = workers[t]->work;
      fold(work, runs, source_table, changed, both, exactly);
      counts[NONFINITE] += work.nonfinite;
      work.nonfinite = 0;
    }
  }
}
