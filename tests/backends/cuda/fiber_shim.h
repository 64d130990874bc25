// Stands in for a CUDA device where g++ compiles a .cu file: the threads of a block are fibers, one runs at a time, and blocks
// run one after another. A fiber runs until it meets a barrier or its warp; what runs next is the order's choice, so that a
// missing barrier shows as a wrong result in some order. Shared memory holds garbage at the start of a block.
//
// Refused with a message: a barrier or a warp-wide function that not all the threads it names reach, or reach at different
// lines, and a thread that is not in its own mask. Out of reach: two threads at the same time, caches, blocks side by side.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define OPD_CONSTANT static const
#define __launch_bounds__(...)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct Index { unsigned x; };

namespace shim {
enum State { READY, AT_BARRIER, AT_WARP, DONE };
constexpr size_t STACK_BYTES = 96 << 10;
constexpr long long MANY_BLOCKS = 1 << 14;  // of a larger grid only the last two blocks run: they test the offsets

struct Fiber {
  State state;
  bool begun;
  int line;              // where it waits
  uint32_t mask;         // with whom
  uint64_t given[2];     // to its warp; the next exchange uses the other place, so that slower lanes still read this one
  int turn;
  ucontext_t context;
  jmp_buf place;
};

struct Device {
  std::vector<Fiber> fibers;
  std::vector<unsigned char> stacks;
  unsigned char* shared = nullptr;
  unsigned current = 0;
  Index block{}, blocks{}, threads{};
  jmp_buf home;
  ucontext_t scheduler;
  void (*body)(void*) = nullptr;
  void* of_body = nullptr;
  int order = 0;         // 0 warps one by one, ascending; 1 descending; others shuffle all threads anew every round
  char message[200] = "";
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* home_stack = nullptr;
  size_t home_bytes = 0;
#endif
};
static Device device;  // one per library: several are loaded
static long long rare_runs = 0;  // of OPD_RARE code, by single threads

inline Fiber& me() { return device.fibers[device.current]; }
inline unsigned lane() { return device.current % 32; }
inline Fiber& neighbour(unsigned of) { return device.fibers[device.current - lane() + of]; }

#if defined(__SANITIZE_ADDRESS__)  // the sanitizer follows only switches that are reported to it
inline void pause() {
  Fiber& fiber = me();
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(fiber.state == DONE ? nullptr : &fake, device.home_stack, device.home_bytes);
  swapcontext(&fiber.context, &device.scheduler);
  __sanitizer_finish_switch_fiber(fake, &device.home_stack, &device.home_bytes);
}
inline void entry() {
  __sanitizer_finish_switch_fiber(nullptr, &device.home_stack, &device.home_bytes);
  device.body(device.of_body);
  me().state = DONE;
  pause();
}
inline void resume() {
  __sanitizer_start_switch_fiber(&device.fake_stack, device.stacks.data() + device.current * STACK_BYTES, STACK_BYTES);
  swapcontext(&device.scheduler, &me().context);
  __sanitizer_finish_switch_fiber(device.fake_stack, nullptr, nullptr);
}
#else  // contexts start a fiber and jumps resume it, since each swapcontext is a system call
inline void pause() {
  if (_setjmp(me().place) == 0) _longjmp(device.home, 1);
}
inline void entry() {
  device.body(device.of_body);
  me().state = DONE;
  pause();
}
inline void resume() {
  if (_setjmp(device.home)) return;
  Fiber& fiber = me();
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}
#endif

inline bool refuse(unsigned thread, const char* what) {
  const int line = device.fibers[thread].line;
  std::snprintf(device.message, sizeof device.message, "block %u, thread %u, line %d: %s", device.block.x, thread, line, what);
  return false;
}

// Lets a warp go on where all lanes that its waiting ones name wait at the same line for each other; false where none can.
inline bool release_warp(unsigned first, bool& moved) {
  auto& fibers = device.fibers;
  for (unsigned t = first; t < first + 32; t++) {
    Fiber& fiber = fibers[t];
    if (fiber.state != AT_WARP) continue;
    if (!(fiber.mask >> (t - first) & 1)) return refuse(t, "a thread is not in the mask it passes");
    bool all = true;
    for (unsigned l = 0; l < 32; l++) {
      Fiber& other = fibers[first + l];
      if (!(fiber.mask >> l & 1)) continue;
      if (other.state == DONE) return refuse(t, "a lane of the mask has ended");
      if (other.state == AT_BARRIER) return refuse(t, "a lane of the mask waits at a barrier");
      if (other.state == AT_WARP && (other.line != fiber.line || other.mask != fiber.mask))
        return refuse(t, "lanes of a warp meet at different places");
      all &= other.state == AT_WARP;
    }
    if (!all) continue;
    moved = true;
    for (unsigned l = 0; l < 32; l++)
      if (fiber.mask >> l & 1 && first + l != t) fibers[first + l].state = READY;
    fiber.state = READY;
  }
  return true;
}

inline bool release_block(bool& moved) {
  auto& fibers = device.fibers;
  unsigned waiting = 0, done = 0, first = 0;
  for (unsigned t = 0; t < fibers.size(); t++) {
    if (fibers[t].state == AT_BARRIER && waiting++ == 0) first = t;
    done += fibers[t].state == DONE;
  }
  if (!waiting || waiting + done < fibers.size()) return true;
  if (done) return refuse(first, "a barrier that not all threads reach");
  for (Fiber& fiber : fibers) {
    if (fiber.line != fibers[first].line) return refuse(first, "threads meet at different barriers");
    fiber.state = READY;
  }
  return moved = true;
}

inline void shuffle_turns(std::vector<unsigned>& turns, uint64_t& random) {
  for (size_t i = turns.size() - 1; i > 0; i--) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(turns[i], turns[(random >> 33) % (i + 1)]);
  }
}

inline bool run_block(uint64_t& random) {
  auto& fibers = device.fibers;
  const unsigned n = (unsigned)fibers.size();
  for (unsigned t = 0; t < n; t++) {
    Fiber& fiber = fibers[t];
    fiber.state = READY, fiber.begun = false, fiber.turn = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = device.stacks.data() + t * STACK_BYTES;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
  std::vector<unsigned> turns(n);
  for (unsigned t = 0; t < n; t++) turns[t] = device.order == 1 ? n - 1 - t : t;
  const unsigned together = device.order > 1 ? n : 32;  // a warp goes as far as it can, or all threads step by step
  for (unsigned done = 0; done < n;) {
    if (device.order > 1) shuffle_turns(turns, random);
    bool any_moved = false;
    for (unsigned from = 0; from < n; from += together)
      for (bool moved = true; moved;) {
        moved = false;
        for (unsigned i = from; i < from + together; i++) {
          if (fibers[turns[i]].state != READY) continue;
          device.current = turns[i];
          resume();
          any_moved = true;
        }
        for (unsigned i = from; i < from + together; i += 32)  // of shuffled turns, every warp all the same
          if (!release_warp(together == 32 ? turns[i] / 32 * 32 : i, moved)) return false;
        any_moved |= moved;
      }
    if (!release_block(any_moved)) return false;
    if (!any_moved) {
      for (unsigned t = 0; t < n; t++)
        if (fibers[t].state != DONE) return refuse(t, "threads wait for each other for ever");
    }
    done = 0;
    for (Fiber& fiber : fibers) done += fiber.state == DONE;
  }
  return true;
}

inline void barrier(int line) {
  me().line = line;
  me().state = AT_BARRIER;
  pause();
}

// Gives a value to the lanes of the mask and waits for theirs; which of the two places they are in.
template <class T>
int exchange(uint32_t mask, T value, int line) {
  static_assert(sizeof(T) <= 8, "");
  Fiber& fiber = me();
  const int turn = fiber.turn;
  fiber.turn ^= 1;
  fiber.given[turn] = 0;
  std::memcpy(&fiber.given[turn], &value, sizeof(T));
  fiber.mask = mask;
  fiber.line = line;
  fiber.state = AT_WARP;
  pause();
  return turn;
}

template <class T>
T take(unsigned of, int turn) {
  T value;
  std::memcpy(&value, &neighbour(of).given[turn], sizeof(T));
  return value;
}
template <class T>
T shuffle_xor(uint32_t mask, T value, int with, int line) {
  const int turn = exchange(mask, value, line);
  return take<T>(lane() ^ (unsigned)with, turn);
}
template <class T>
T shuffle_down(uint32_t mask, T value, unsigned by, int line) {
  const int turn = exchange(mask, value, line);
  return lane() + by < 32 ? take<T>(lane() + by, turn) : value;
}
template <class T>
T shuffle_up(uint32_t mask, T value, unsigned by, int line) {
  const int turn = exchange(mask, value, line);
  return lane() >= by ? take<T>(lane() - by, turn) : value;
}
template <class T>
T shuffle(uint32_t mask, T value, int from, int line) {
  const int turn = exchange(mask, value, line);
  return take<T>((unsigned)from % 32, turn);
}

inline unsigned ballot(uint32_t mask, bool holds, int line) {
  const int turn = exchange(mask, holds, line);
  unsigned found = 0;
  for (unsigned l = 0; l < 32; l++) found |= (unsigned)((mask >> l & 1) && take<bool>(l, turn)) << l;
  return found;
}

template <class... P, size_t... I>
int start(void (*kernel)(P...), const long long* arguments, long long blocks, int threads, int shared_bytes, std::index_sequence<I...>) {
  static_assert(((sizeof(P) == 8) && ...), "an argument of a kernel is a pointer or an opd_i64");
  auto call = [&] { kernel((P)arguments[I]...); };
  device.body = [](void* of) { (*(decltype(call)*)of)(); };
  device.of_body = &call;
  device.blocks.x = (unsigned)blocks;
  device.threads.x = (unsigned)threads;
  device.fibers.resize((size_t)threads);
  if (device.stacks.size() < (size_t)threads * STACK_BYTES) device.stacks.resize((size_t)threads * STACK_BYTES);
  uint64_t random = (uint64_t)device.order;
  bool ok = threads % 32 == 0;
  const long long first = blocks > MANY_BLOCKS ? blocks - 2 : 0;
  for (long long b = first; b < blocks && ok; b++) {
    device.block.x = (unsigned)(device.order == 1 ? first + blocks - 1 - b : b);
    device.shared = (unsigned char*)std::aligned_alloc(16, (size_t)(shared_bytes + 16) / 16 * 16);  // a block's own: sanitizers see its ends
    std::memset(device.shared, 0xA5, (size_t)shared_bytes);
    ok = run_block(random);
    std::free(device.shared);
  }
  return ok ? 0 : 1;
}
}  // namespace shim

#define OPD_DYNAMIC_SHARED(name) unsigned char* const name = shim::device.shared
#define threadIdx (Index{shim::device.current})
#define blockIdx (shim::device.block)
#define blockDim (shim::device.threads)
#define gridDim (shim::device.blocks)
#define __syncthreads() shim::barrier(__LINE__)
#define __shfl_xor_sync(mask, value, with) shim::shuffle_xor(mask, value, with, __LINE__)
#define __shfl_down_sync(mask, value, by) shim::shuffle_down(mask, value, by, __LINE__)
#define __shfl_up_sync(mask, value, by) shim::shuffle_up(mask, value, by, __LINE__)
#define __shfl_sync(mask, value, from) shim::shuffle(mask, value, from, __LINE__)
#define __syncwarp() ((void)shim::exchange(0xFFFFFFFFu, 0, __LINE__))
#define __popc(x) __builtin_popcount(x)
#define __any_sync(mask, holds) (shim::ballot(mask, holds, __LINE__) != 0)
#define __ballot_sync(mask, holds) shim::ballot(mask, holds, __LINE__)

inline void __threadfence() {}
template <class T> T __ldcs(const T* from) { return *from; }
template <class T> T __ldcg(const T* from) { return *from; }
template <class T> T atomicAdd(T* to, T value) { T before = *to; *to = before + value; return before; }
template <class T> T atomicOr(T* to, T value) { T before = *to; *to = before | value; return before; }
template <class T> T atomicMin(T* to, T value) { T before = *to; *to = value < before ? value : before; return before; }
template <class T> T atomicMax(T* to, T value) { T before = *to; *to = value > before ? value : before; return before; }

#define OPD_RARE(...) do { shim::rare_runs++; __VA_ARGS__; } while (0)

#define OPD_LAUNCHER(kernel)                                                                                                        \
  template <class... P> static int kernel##_typed(void (*f)(P...), const opd_i64* arguments, int count, opd_i64 blocks, int threads, \
                                                  int shared_bytes) {                                                               \
    if (count != (int)sizeof...(P)) { std::snprintf(shim::device.message, 100, "%d arguments", count); return 1; }                  \
    return shim::start(f, arguments, blocks, threads, shared_bytes, std::index_sequence_for<P...>());                               \
  }                                                                                                                                 \
  extern "C" int kernel##_launch(const opd_i64* arguments, int count, opd_i64 blocks, int threads, int shared_bytes, int, void*) {  \
    return kernel##_typed(kernel, arguments, count, blocks, threads, shared_bytes);                                                 \
  }

extern "C" inline __attribute__((used)) const char* opd_cuda_error(int) { return shim::device.message; }
extern "C" inline __attribute__((used)) void shim_order(int order) { shim::device.order = order; }
extern "C" inline __attribute__((used)) long long shim_rare_runs() { return std::exchange(shim::rare_runs, 0); }
