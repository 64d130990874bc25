#include "mapped.h"

#include <atomic>
#include <mutex>
#include <stdexcept>

#if defined(__unix__) || defined(__APPLE__)
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

namespace {
constexpr int SLOTS = 4096;  // files mapped at once
struct Slot { std::atomic<uintptr_t> start{0}, stop{0}; std::atomic<int64_t> faults{0}; };
Slot slots[SLOTS];
std::mutex lock;
struct sigaction before;
bool installed = false;
uintptr_t page;

// Runs inside the signal: only atomics and mmap, which the kernel allows here.
void on_bus_error(int number, siginfo_t* info, void* context) {
  uintptr_t address = (uintptr_t)info->si_addr;
  for (Slot& slot : slots) {
    uintptr_t start = slot.start.load(), stop = slot.stop.load();
    if (!start || address < start || address >= stop) continue;
    uintptr_t base = address & ~(page - 1);
    if (mmap((void*)base, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) break;
    slot.faults.fetch_add(1);
    return;
  }
  if (before.sa_flags & SA_SIGINFO) { before.sa_sigaction(number, info, context); return; }
  if (before.sa_handler != SIG_IGN && before.sa_handler != SIG_DFL) { before.sa_handler(number); return; }
  signal(SIGBUS, SIG_DFL);  // returning repeats the access, now fatally
}
}  // namespace

int64_t guard_mapping(uintptr_t address, int64_t nbytes) {
  std::lock_guard<std::mutex> hold(lock);
  if (!installed) {
    page = (uintptr_t)sysconf(_SC_PAGESIZE);
    struct sigaction action {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, &action, &before)) throw std::runtime_error("cannot install the SIGBUS handler");
    installed = true;
  }
  for (int i = 0; i < SLOTS; i++)
    if (!slots[i].start.load()) {
      slots[i].faults = 0;
      slots[i].stop = address + nbytes;
      slots[i].start = address;
      return i;
    }
  throw std::runtime_error("too many mapped files");
}
int64_t mapping_faults(int64_t handle) { return slots[handle].faults.load(); }
void unguard_mapping(int64_t handle) { slots[handle].start = 0; }

#else
int64_t guard_mapping(uintptr_t, int64_t) { throw std::runtime_error("mapped files are not guarded on this system"); }
int64_t mapping_faults(int64_t) { return 0; }
void unguard_mapping(int64_t) {}
#endif
