// Ranges of coordinates for threads. OpenMP shares torch's pool and its setting; without it, or for little work,
// serial.
#pragma once
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
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

// Calls body(thread, start, stop) on contiguous ranges whose starts are multiples of `grain`.
template <class Body>
void parallel_ranges(int64_t n, int threads, int64_t grain, Body body) {
  threads = threads_for(n, threads);
  int64_t range = (n + threads - 1) / threads;
  range = (range + grain - 1) / grain * grain;
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
      int64_t start = t * range, stop = start + range < n ? start + range : n;
      if (start >= stop) continue;
      KeepSubnormals keep;
      body(t, start, stop);
    }
    return;
  }
#endif
  if (n <= 0) return;
  KeepSubnormals keep;
  body(0, int64_t(0), n);
}
