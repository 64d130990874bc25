// Ranges of coordinates for threads. OpenMP shares torch's pool and its setting; without it, or for little work,
// serial.
#pragma once
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef OPD_STD_THREADS  // for ThreadSanitizer, which does not know the synchronization of OpenMP's runtime
#include <atomic>
#include <thread>
#include <vector>
#endif

#if defined(__SSE__)
#include <xmmintrin.h>
// Keeps subnormals, whatever torch.set_flush_denormal set for this thread.
class KeepSubnormals {
  unsigned before = _mm_getcsr();

 public:
  KeepSubnormals() { _mm_setcsr(before & ~0x8040u); }  // flush to zero, denormals are zero: off
  ~KeepSubnormals() { _mm_setcsr(before); }
};
#else
struct KeepSubnormals { KeepSubnormals() {} };
#endif

constexpr int64_t SERIAL_BELOW = 1 << 16;

// Threads for work of n elements.
inline int threads_for(int64_t n, int threads) { return n < SERIAL_BELOW || threads < 1 ? 1 : threads; }

// Calls body(i) for i in [0, n), in parallel: each thread takes the next one, from the first on.
template <class Body>
void parallel_tasks(int n, [[maybe_unused]] int threads, Body body) {
#if defined(OPD_STD_THREADS)
  std::atomic<int> next{0};
  std::vector<std::thread> pool;
  for (int t = 0; t < threads && t < n; t++)
    pool.emplace_back([&] {
      KeepSubnormals keep;
      // Relaxed: the counter orders no accesses of different tasks, which would hide their races.
      const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
      for (int i = take(); i < n; i = take()) body(i);
    });
  for (std::thread& thread : pool) thread.join();
  return;
#elif defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int i = 0; i < n; i++) {
      KeepSubnormals keep;
      body(i);
    }
    return;
  }
#endif
  KeepSubnormals keep;
  for (int i = 0; i < n; i++) body(i);
}

// Calls body(thread, start, stop) on contiguous ranges whose starts are multiples of `grain`.
template <class Body>
void parallel_ranges(int64_t n, int threads, int64_t grain, Body body) {
  threads = threads_for(n, threads);
  int64_t range = (n + threads - 1) / threads;
  range = (range + grain - 1) / grain * grain;
  const auto run = [&](int t) {
    const int64_t start = t * range, stop = start + range < n ? start + range : n;
    if (start < stop) body(t, start, stop);
  };
#if defined(_OPENMP) && !defined(OPD_STD_THREADS)
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
      KeepSubnormals keep;
      run(t);
    }
    return;
  }
#endif
  parallel_tasks(threads, threads, run);
}
